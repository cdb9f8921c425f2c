"""Is this the base the adapter was trained on?  What was recorded, held against what is here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.digests import layout_digest, touched_digest
from adapterkit.hub.bases.fingerprint import Fingerprint
from adapterkit.hub.bases.likeness import EXACT, OTHER, SketchResult, compare_sketch
from adapterkit.hub.bases.sketch import parse_sketch
from adapterkit.hub.findings import (
    ERROR,
    FITS,
    IDENTICAL,
    INFO,
    OTHER_WEIGHTS,
    SAME_CAST,
    WARNING,
    Finding,
)
from adapterkit.hub.sources import Folder

SHOWN = 5


@dataclass(frozen=True)
class Identity:
    """verdict: identical, same-weights-cast, other-weights, or fits when nothing was comparable.
    level: the strongest comparison made: touched, sketch, layout or none."""

    verdict: str
    level: str
    findings: tuple[Finding, ...]


Compare = Callable[[bytes], SketchResult]


def identify(folder: Folder, base: Base, *, deep: bool, compare: Compare | None = None) -> Identity:
    """Compares the base recorded with the adapter with this one.

    deep: read every tensor the adapter touches, not a sketch of it. compare: how a sketch is held
    against the base; its files when None.
    """
    record = folder.manifest.base if folder.manifest is not None else None
    known = Fingerprint.parse(record) if record else Fingerprint()
    notes = _notes(known, base)
    if folder.sketch is None:
        return _without_sketch(known, base, notes)
    sketch = folder.sketch.read(0, folder.sketch.size)
    result = compare(sketch) if compare is not None else compare_sketch(sketch, base)
    if result.verdict == OTHER:
        return Identity(OTHER_WEIGHTS, "sketch", (*notes, *_differing(result, known)))
    uncompared = tuple(
        Finding(WARNING, "not-compared", name, "the weights recorded", why)
        for name, why in sorted(result.uncompared.items())
    )
    if not result.compared:
        return Identity(FITS, _layout(known, base), (*notes, *uncompared))
    if deep and known.touched is not None and base.tensors:
        return _touched(known, base, sketch, result, (*notes, *uncompared))
    verdict = FITS if uncompared else SAME_CAST
    return Identity(verdict, "sketch", (*notes, *uncompared))


def _without_sketch(known: Fingerprint, base: Base, notes: tuple[Finding, ...]) -> Identity:
    hint = "adapter add ... --base BASE records it"
    doubt = Finding(
        WARNING,
        "base-not-recorded",
        "base",
        "the identity of the base it was trained on",
        "none recorded",
        hint,
    )
    return Identity(FITS, _layout(known, base), (*notes, doubt))


def _layout(known: Fingerprint, base: Base) -> str:
    """`layout` when names, dtypes and shapes are those recorded, else `none`."""
    same = known.layout is not None and known.layout == layout_digest(base.tensors)
    return "layout" if same else "none"


def _touched(
    known: Fingerprint,
    base: Base,
    sketch: bytes,
    result: SketchResult,
    notes: tuple[Finding, ...],
) -> Identity:
    names = list(parse_sketch(sketch))
    if touched_digest(base, names) == known.touched:
        return Identity(IDENTICAL, "touched", notes)
    if result.verdict == EXACT:  # the same format, so that other bytes are other values
        found = Finding(ERROR, "other-weights", "weights", "the digest recorded", "another one")
        return Identity(OTHER_WEIGHTS, "touched", (*notes, found))
    return Identity(SAME_CAST, "sketch", notes)


def _differing(result: SketchResult, known: Fingerprint) -> list[Finding]:
    made_for = known.id or "the base recorded"
    found = [
        Finding(
            ERROR,
            "other-weights",
            row.tensor,
            f"{row.recorded:.6g} at {row.position}, as in {made_for}",
            f"{row.found:.6g}",
        )
        for row in result.differing[:SHOWN]
    ]
    rest = len(result.differing) - len(found)
    about = f"{rest} more tensors with other weights than the base recorded"
    return found + ([Finding(INFO, "other-weights", about)] if rest else [])


def _notes(known: Fingerprint, base: Base) -> tuple[Finding, ...]:
    """What differs beside the weights."""
    pairs = {
        "tokenizer-differs": (known.tokenizer, base.tokenizer),
        "vocabulary-differs": (known.vocabulary, base.vocabulary),
        "architecture-differs": (known.architecture, base.architecture or None),
    }
    return tuple(
        Finding(WARNING, code, code.removesuffix("-differs"), str(recorded)[:80], str(here)[:80])
        for code, (recorded, here) in pairs.items()
        if recorded is not None and here is not None and recorded != here
    )

"""A folder becomes a version: what is read, checked, recorded, stored, and what is left out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.hub import papers
from adapterkit.hub.adapter import Adapter, AdapterInfo
from adapterkit.hub.bases.base import CONV1D, LINEAR, METHODS, Base, Quantization
from adapterkit.hub.bases.spelling import spelled
from adapterkit.hub.check import check
from adapterkit.hub.describe import summarize
from adapterkit.hub.findings import (
    ERROR,
    INCOMPATIBLE,
    OTHER_WEIGHTS,
    WARNING,
    Finding,
    clean,
    listing,
)
from adapterkit.hub.fit import fit
from adapterkit.hub.formats.config import is_number
from adapterkit.hub.kinds import kind
from adapterkit.hub.kinds.base import Whole
from adapterkit.hub.locate import locate
from adapterkit.hub.read import read_adapter
from adapterkit.hub.recipe_versions import add_recipe, info_of
from adapterkit.hub.recipes import is_recipe
from adapterkit.hub.rooting import rooted
from adapterkit.hub.settings import refined
from adapterkit.hub.sources import Folder
from adapterkit.hub.task import doubt, for_task
from adapterkit.hub.values import check_values
from adapterkit.registry.errors import InvalidError, MismatchError
from adapterkit.registry.manifest import Meaning
from adapterkit.registry.strictjson import canonical

if TYPE_CHECKING:
    from adapterkit.registry import Registry
    from adapterkit.registry.records import Added

Progress = Callable[[int], None]
# Linear layers that stand for a whole base: at least so many where it has them, less than twice.
SPREAD = 8

# Beside the files that the adapter was read from: pattern of the path -> role. Everything else is
# skipped unless asked for.
KEPT = {
    "tokenizer.json": "tokenizer",
    "tokenizer.model": "tokenizer",
    "tokenizer_config.json": "tokenizer",
    "special_tokens_map.json": "tokenizer",
    "added_tokens.json": "tokenizer",
    "vocab.json": "tokenizer",
    "vocab.txt": "tokenizer",
    "merges.txt": "tokenizer",
    "spiece.model": "tokenizer",
    "sentencepiece.bpe.model": "tokenizer",
    "chat_template.jinja": "chat-template",
    "chat_template.json": "chat-template",
    "README.md": "card",
    "LICENSE*": "license",
    "LICENCE*": "license",
    "NOTICE*": "license",
}


@dataclass(frozen=True)
class Ingested:
    """skipped: (path, bytes) of what was not stored; a folder is one entry ending in a slash."""

    added: Added
    info: AdapterInfo
    skipped: tuple[tuple[str, int], ...]
    warnings: tuple[Finding, ...]


@dataclass(frozen=True)
class Options:
    """base: a model folder or Hub id whose identity is recorded. trained_on: how the base was
    quantized in training. weights: record the digests of the base's weights too, which reads them.
    cache: folder that remembers hashes of the base's files. include: patterns of further files to
    store. allow_fields: unknown config fields to accept."""

    base: str | Path | None = None
    trained_on: str | None = None
    weights: bool = False
    cache: Path | None = None
    include: Collection[str] = ()
    allow_fields: Collection[str] = ()
    progress: Progress | None = None


def add(  # noqa: PLR0913
    registry: Registry,
    path: str | Path | Folder,
    name: str,
    *,
    version: str | None = None,
    tags: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
    note: str | None = None,
    options: Options | None = None,
    **settings: Any,
) -> Ingested:
    """Stores the adapter in folder `path` as a version of `name`. settings: fields of Options.
    `locate.folder` gives a folder with what its files do not say.

    Raises DamagedError or NotFoundError if the folder is not a complete, finite adapter, and
    MismatchError if it does not fit the base given; then nothing is stored.
    """
    chosen = refined(options or Options(), settings)
    folder = path if isinstance(path, Folder) else locate(Path(path))
    if is_recipe(folder):
        return _recipe(registry, folder, name, version, tags, _attachments(metrics, note), chosen)
    adapter = read_adapter(folder, chosen.allow_fields)
    adapter = replace(adapter, findings=(*adapter.findings, *check_values(adapter)))
    base = _base(chosen.base)
    if base is None:
        adapter.require_sound()
        findings = list(adapter.findings)
    else:
        doubts = doubt(adapter, base)
        base = for_task(base, adapter)
        findings = doubts + _fitting(adapter, base)
    info = summarize(adapter, digest=True)
    kept, skipped = _sorted_out(folder, adapter.files, chosen.include)
    skipped = tuple((path, n_bytes) for path, n_bytes in skipped if path != papers.FILE)
    said = papers.read(folder)
    meaning = _meaning(adapter, info, base, chosen)
    meaning = replace(meaning, parents=said.parents, recipe=said.recipe)
    added = registry.add(
        name,
        {path: _path(folder, path) for path in kept},
        meaning,
        version=version,
        tags=tags,
        attachments=_attachments(metrics, note),
        roles=kept,
    )
    doubts = [*findings, *said.findings]
    warnings = tuple(sorted({f for f in doubts if f.severity == WARNING}))
    return Ingested(added, info, skipped, warnings)


def _recipe(  # noqa: PLR0913
    registry: Registry,
    folder: Folder,
    name: str,
    version: str | None,
    tags: Sequence[str],
    attachments: Mapping[str, bytes],
    chosen: Options,
) -> Ingested:
    """What is known of the base of a recipe is known of the bases of its parts."""
    given = [field for field in ("trained_on", "include", "weights") if getattr(chosen, field)]
    if given:
        raise InvalidError(f"{clean(folder.name)} is a recipe, which takes no {', '.join(given)}")
    findings: Collection[Finding] = ()
    if chosen.base is not None:
        report = check(folder, base=chosen.base, registry=registry)
        findings = report.warnings
        if report.verdict in (INCOMPATIBLE, OTHER_WEIGHTS):
            raise MismatchError(f"{clean(folder.name)} does not fit:\n{listing(report.findings)}")
    added = add_recipe(
        registry, folder, name, version=version, tags=tags, attachments=attachments
    )
    return Ingested(added, info_of(folder), (), tuple(findings))


def _fitting(adapter: Adapter, base: Base) -> list[Finding]:
    """All findings; raises if one is an error."""
    found = fit(adapter, base)
    adapter.require_sound(found)
    if any(finding.severity == ERROR for finding in found):
        raise MismatchError(
            f"{clean(adapter.name)} does not fit {clean(base.name)}:\n{listing(found)}"
        )
    return found


def _base(base: str | Path | None) -> Base | None:
    if base is None:
        return None
    from adapterkit.hub.bases.folder import find_base, read_base

    return read_base(base if isinstance(base, Path) else find_base(base))


def _meaning(adapter: Adapter, info: AdapterInfo, base: Base | None, chosen: Options) -> Meaning:
    record: dict[str, Any] = {"id": adapter.base_name, "revision": adapter.revision}
    extra: list[bytes] = []
    trained = _trained_on(base, chosen.trained_on)
    if base is not None:
        from adapterkit.hub.bases.fingerprint import fingerprint

        names = touched(adapter, base)
        found = fingerprint(
            base,
            weights=chosen.weights,
            touched=names,
            cache=chosen.cache,
            progress=chosen.progress,
        )
        record |= found.record()
        extra += [found.sketch_data] if found.sketch_data else []
    return Meaning(info.record(), record, trained, extra=extra)


def touched(adapter: Adapter, base: Base) -> list[str]:
    """Checkpoint tensors of the base that the adapter changes, sorted. Of one that acts between
    weights, all of which it depends on, some from the first layer to the last."""
    from adapterkit.hub.bases.fingerprint import tensors_of

    adapter = rooted(adapter, base)
    base = spelled(base, adapter.modules).base
    names = {module for module, _ in adapter.tensors} & base.modules.keys()
    found = tensors_of(base, names)
    if not found or isinstance(kind(adapter.kind), Whole):
        found = sorted({*found, *tensors_of(base, _spread(base))})
    return found


def _spread(base: Base) -> list[str]:
    """Some of the linear layers, at even distances."""
    every = [m.name for m in base.modules.values() if m.type in (LINEAR, CONV1D) and m.weight]
    return every[:: max(1, len(every) // SPREAD)]


def _trained_on(base: Base | None, method: str | None) -> dict[str, Any] | None:
    if method is not None and method not in METHODS:
        raise InvalidError(f"trained_on is {method!r}, expected one of {', '.join(METHODS)}")
    if method is not None:
        known = base is not None and base.quantization.method == method
        quantization = base.quantization if known and base else Quantization(method)
        return {"trained_on": quantization.record()}
    if base is not None and base.quantization.method != "none":
        return {"trained_on": base.quantization.record()}
    return None


def _sorted_out(
    folder: Folder, read: Mapping[str, str], include: Collection[str]
) -> tuple[dict[str, str], tuple[tuple[str, int], ...]]:
    """(path -> role of what is stored, what is skipped)."""
    kept: dict[str, str] = {}
    skipped: dict[str, int] = {}
    for path, source in folder.files.items():
        top_level = "/" not in path
        role = read.get(path)
        if role is None and top_level:
            role = next((r for p, r in KEPT.items() if fnmatch(path, p)), None)
        if role is None and any(fnmatch(path, pattern) for pattern in include):
            role = "extra"
        if role is not None:
            kept[path] = role
        else:
            top, slash, _ = path.partition("/")
            skipped[top + slash] = skipped.get(top + slash, 0) + source.size
    return kept, tuple(sorted(skipped.items()))


def _path(folder: Folder, path: str) -> Path:
    if folder.root is None:
        raise InvalidError(f"{folder.name} is not a folder of this machine")
    return folder.root / path


def _attachments(metrics: Mapping[str, float] | None, note: str | None) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name, value in (metrics or {}).items():
        if not is_number(value):
            raise InvalidError(f"the metric {clean(name)} is {value!r}, expected a finite number")
    if metrics:
        found["metrics"] = canonical(dict(metrics))
    if note:
        found["note"] = note.encode()
    return found

"""How much of an adapter is left once it is in the weights.

For a parameter with base W, wanted change D and what was stored W': applied = W' - Q(W), where Q is
what the output's format makes of the base alone; gain = <applied, D> / |D|^2, the share of D that
survived; cosine of the two; error = |applied - D| / |D|.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapterkit.hub.findings import clean
from adapterkit.registry.errors import AdapterError, AdapterWarning

if TYPE_CHECKING:
    from adapterkit.hub.merge.rival import Comparison


@dataclass(frozen=True)
class Fidelity:
    """One parameter, or several together; what is not finite was never written.

    name: the parameter at run time. format: what it is stored as (float32, bfloat16, nf4, int8).
    base: |W|^2, delta: |D|^2, lost: |applied - D|^2, kept: <applied - D, D>, own: |Q(W) - W|^2, the
    base's own loss in that format. correction: where there is one, what is stored means both.
    """

    name: str
    format: str
    base: float = 0.0
    delta: float = 0.0
    lost: float = 0.0
    kept: float = 0.0
    own: float = 0.0
    correction: Correction | None = None

    @property
    def gain(self) -> float:
        return 1 + self.kept / self.delta if self.delta else 1.0

    @property
    def cosine(self) -> float:
        applied = self.delta + 2 * self.kept + self.lost
        if not self.delta:
            return 1.0
        # of an applied change of nothing, rounding may leave something below 0
        return (self.delta + self.kept) / math.sqrt(self.delta * applied) if applied > 0 else 0.0

    @property
    def error(self) -> float:
        return math.sqrt(self.lost / self.delta) if self.delta else 0.0

    @property
    def own_error(self) -> float:
        """The base's own loss in this format, over |D|."""
        return math.sqrt(self.own / self.delta) if self.delta else 0.0

    @property
    def size(self) -> float:
        """|D| / |W|."""
        return math.sqrt(self.delta / self.base) if self.base else 0.0

    @property
    def is_quantized(self) -> bool:
        return self.format in ("nf4", "fp4", "int8")

    def record(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in ("name", "format", "size", *FIGURES)}
        return {name: round(v, 6) if isinstance(v, float) else v for name, v in found.items()}


FIGURES = ("gain", "cosine", "error", "own_error")
SUMS = tuple(field.name for field in fields(Fidelity) if field.type == "float")


@dataclass(frozen=True)
class Correction:
    """What else could have been done with a parameter that is corrected by a LoRA of a rank.

    plain: codes without one. rival: the base, quantized, and a blended adapter of that rank. left,
    rival_left: |result - what was wanted|^2 of the correction and of the rival.
    """

    plain: Fidelity
    rival: Fidelity
    left: float
    rival_left: float

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Correction:
        """As `asdict` has it."""
        plain, rival = (Fidelity(**record[name]) for name in ("plain", "rival"))
        return cls(plain, rival, record["left"], record["rival_left"])


# Of a block, by the names of the sums of Fidelity.
Sums = dict[str, float]


def sums(
    w: Tensor, target: Tensor, stored: Tensor, base: Tensor | None = None, *, spent: bool = False
) -> Sums:
    """w: the base's block, target: what it should become, stored: what the file's values mean.
    base: Q(w), where the format loses something of w itself. spent: w and stored are needed no
    more, and may be written over."""
    flat = w.reshape(-1)
    found = {"base": flat.dot(flat)}
    lost = torch.sub(stored, target, out=stored if spent else None)
    if base is not None:
        own = (base - w).reshape(-1)
        lost = lost - own.reshape(lost.shape)
        found["own"] = own.dot(own)
    delta = torch.sub(target, w, out=w if spent else None).reshape(-1)
    lost = lost.reshape(-1)
    found |= {"delta": delta.dot(delta), "lost": lost.dot(lost), "kept": lost.dot(delta)}
    return {name: float(value) for name, value in found.items()}


def added(a: Sums, b: Sums) -> Sums:
    return {name: a.get(name, 0.0) + b.get(name, 0.0) for name in a | b}


def is_finite(found: Sums) -> bool:
    return all(map(math.isfinite, found.values()))


class Measure:
    """Sums over the blocks of one parameter."""

    def __init__(self, name: str, format_: str) -> None:
        self.name, self.format = name, format_
        self._sums: dict[str, Any] = dict.fromkeys(SUMS, 0.0)

    def add(self, found: Sums) -> None:
        self._sums = added(self._sums, found)

    def result(self) -> Fidelity:
        return Fidelity(self.name, self.format, **self._sums)


def measured(
    name: str, format_: str, w: Tensor, target: Tensor, stored: Tensor, base: Tensor | None = None
) -> Fidelity:
    """Of a parameter as a whole, see `sums`."""
    measure = Measure(name, format_)
    measure.add(sums(w, target, stored, base))
    return measure.result()


def together(every: Iterable[Fidelity], name: str = "in all", format_: str = "") -> Fidelity:
    held = list(every)
    total: dict[str, Any] = {s: math.fsum(getattr(one, s) for one in held) for s in SUMS}
    return Fidelity(name, format_, **total)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, or with dry_run would do.

    folder: what was written, None for a dry run and for a live model. parameters: one row for each
    that changed. onto: `original` or `dequantized`, why: how that was chosen. quantization: of
    what was written.
    added: tensors that the base's files do not have. untied: whether a tied head became its own.
    size: bytes of the weights written. recipe: inputs by digest, weights, settings, tool version.
    correction: beside its rival, where parameters are corrected.
    """

    folder: Path | None
    parameters: tuple[Fidelity, ...]
    onto: str
    why: str
    quantization: str
    recipe: Mapping[str, Any]
    added: tuple[str, ...] = ()
    untied: bool = False
    size: int = 0
    correction: Comparison | None = None

    @property
    def total(self) -> Fidelity:
        return together(self.parameters)

    @property
    def guarded(self) -> Fidelity:
        """Those whose format loses most: the quantized ones, or all where there are none."""
        lossy = [each for each in self.parameters if each.is_quantized]
        return together(lossy or self.parameters, format_=lossy[0].format if lossy else "")

    @property
    def gain(self) -> float:
        return self.total.gain

    @property
    def cosine(self) -> float:
        return self.total.cosine

    @property
    def error(self) -> float:
        return self.total.error

    def record(self) -> dict[str, Any]:
        """The JSON form: stable names."""
        known = asdict(self)
        for name in ("folder", "parameters", "recipe", "correction"):
            del known[name]
        return {
            "folder": None if self.folder is None else str(self.folder),
            "dry_run": self.folder is None,
            **known,
            "added": list(self.added),
            "total": self.total.record(),
            "guarded": self.guarded.record(),
            "correction": None if self.correction is None else self.correction.record(),
            "parameters": [each.record() for each in self.parameters],
            "recipe": dict(self.recipe),
        }


def guarded(report: MergeReport, min_gain: float, *, stop: bool) -> MergeReport:
    """The report, if enough of the adapters survived. Raises AdapterError where the output is
    quantized; else warns."""
    found = report.guarded
    if found.gain >= min_gain or not report.parameters:
        return report
    worst = min(report.parameters, key=lambda each: each.gain)
    about = (
        f"of the adapters {found.gain:.0%} would survive in {_format(report)} (gain"
        f" {found.gain:.3f}, cosine {found.cosine:.3f}; least in {clean(worst.name)},"
        f" {worst.gain:.3f}), less than min_gain {min_gain:g}"
    )
    advice = (
        "write bf16: --quantize none --dtype bfloat16, or keep the base as it is and attach one"
        " adapter that is blended of these, or correct it: --correction-rank R;"
        " --min-gain 0 merges all the same"
    )
    if found.is_quantized and stop:
        raise AdapterError(about, hint=advice)
    warnings.warn(f"{about}; {advice}", AdapterWarning, stacklevel=4)
    return report


def _format(report: MergeReport) -> str:
    return " and ".join(sorted({row.format for row in report.parameters}))

"""Any change of weights as a plain PEFT LoRA: exact where it is one, else the best of a rank."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.hub import papers
from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases import base as bases
from adapterkit.hub.bases.base import CONV1D, EMBEDDING, LINEAR, METHODS, OTHER, Base
from adapterkit.hub.check import check
from adapterkit.hub.findings import INCOMPATIBLE, OTHER_WEIGHTS, clean, listing
from adapterkit.hub.formats import peft_write
from adapterkit.hub.formats.peft_write import Part, Place
from adapterkit.hub.ingest import touched
from adapterkit.hub.kinds import kind
from adapterkit.hub.laid_out import biases, by_expert, grouped, roles, shaped
from adapterkit.hub.locate import Source, locate
from adapterkit.hub.made import Made, input_of, origin_of, tool
from adapterkit.hub.offline import Ground, lowered
from adapterkit.hub.primitives import Replace
from adapterkit.hub.read import read_adapter
from adapterkit.hub.rooting import rooted
from adapterkit.hub.settings import refined
from adapterkit.hub.sources import Folder
from adapterkit.hub.task import for_task
from adapterkit.registry.errors import InvalidError, MismatchError

if TYPE_CHECKING:
    import torch

    from adapterkit.hub.change import Change
    from adapterkit.hub.reduce import Reduced
    from adapterkit.registry import Registry

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
HALVES = ("F16", "BF16")
REPEATED = ("wrapper.", "frozen.")
# Of modules that PEFT's LoRA gives two factors; routers of experts are OTHER.
TYPES = (LINEAR, CONV1D, EMBEDDING, OTHER, bases.EXPERTS, bases.CONV)


@dataclass(frozen=True)
class Options:
    """quantization: how the base is loaded where the adapter runs; as it is stored when None.
    dtype: of the factors; the source's half precision where that is exact, else float32.
    allow_fields: unknown config fields that change nothing."""

    quantization: str | None = None
    dtype: str | None = None
    allow_fields: Collection[str] = ()

    def __post_init__(self) -> None:
        choices = {"quantization": METHODS, "dtype": tuple(DTYPES)}
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in (None, *known):
                raise InvalidError(f"{name} is {value!r}, expected one of {', '.join(known)}")


@dataclass(frozen=True)
class Converted:
    """One module. needed: the rank at which it is exact. rank: what it has. error: |change - it| /
    |change| before rounding, rounding: the same of what rounding to the dtype adds. size: |change|.
    """

    module: str
    needed: int
    rank: int
    error: float
    rounding: float
    size: float


@dataclass(frozen=True)
class Conversion(Made):
    """rank: of every module of the file, smaller ones filled up with zeros. modules: what became of
    each."""

    rank: int = 0
    dtype: str = ""
    modules: tuple[Converted, ...] = ()

    def papers(self) -> Mapping[str, bytes]:
        """How it was made, so that a folder that is added later still has its lineage."""
        return {papers.FILE: papers.dump(self.files, self.parents, self.recipe)}

    @property
    def error(self) -> float:
        """|change - it| / |change| over all modules together; 0 where it is exact."""
        whole = sum(m.size**2 for m in self.modules)
        lost = sum((m.error * m.size) ** 2 for m in self.modules)
        return (lost / whole) ** 0.5 if whole else 0.0

    @property
    def rounding(self) -> float:
        """The largest of any module."""
        return max((m.rounding for m in self.modules), default=0.0)


def convert(
    source: Source,
    to: str = "lora",
    rank: int | None = None,
    base: str | Path | Base | None = None,
    *,
    registry: Registry | None = None,
    options: Options | None = None,
    **settings: Any,
) -> Conversion:
    """The adapter as a plain LoRA: no patterns, no rsLoRA, alpha equal to the rank.

    rank: at most; needed where the change is no low-rank one. base: needed where the change refers
    to the base's weights or shapes. settings: the fields of Options.
    Raises InvalidError for what no LoRA carries, and where a rank or a base has to be given;
    MismatchError if it does not fit the base.
    """
    chosen = refined(options or Options(), settings)
    if to != "lora":
        raise InvalidError(f"adapters are converted to lora, not to {clean(repr(to), 60)}")
    if rank is not None and not (isinstance(rank, int) and 0 < rank <= peft_write.MAX_RANK):
        raise InvalidError(f"rank is {rank!r}, expected 1 to {peft_write.MAX_RANK}")
    folder = locate(source, registry)
    adapter = read_adapter(folder, chosen.allow_fields)
    adapter.require_sound()
    described = fitting(folder, adapter, base, chosen)
    adapter = rooted(adapter, described) if described is not None else adapter
    ground = Ground.of(adapter, described, chosen.quantization)
    return _converted(folder, ground, rank, chosen)


def fitting(
    folder: Folder, adapter: Adapter, base: str | Path | Base | None, chosen: Options
) -> Base | None:
    if base is None:
        return None
    from adapterkit.hub.bases.folder import find_base, read_base

    if not isinstance(base, Base):
        base = read_base(base if isinstance(base, Path) else find_base(base))
    report = check(
        folder, base=base, quantization=chosen.quantization, allow_fields=chosen.allow_fields
    )
    if report.verdict in (INCOMPATIBLE, OTHER_WEIGHTS):
        raise MismatchError(
            f"{clean(folder.name)} on {clean(base.name)}: {report.verdict}\n"
            f"{listing(report.findings)}"
        )
    return for_task(base, adapter)


def _converted(folder: Folder, ground: Ground, rank: int | None, chosen: Options) -> Conversion:
    from adapterkit.hub import factored
    from adapterkit.hub.reduce import reduced

    adapter = ground.adapter
    carried, own = _split(adapter)
    found: dict[str, Reduced] = {}
    shifts: dict[str, torch.Tensor] = {}
    for name, change in _changes(ground, own):
        found[name] = reduced(change, rank)
        if change.shift is not None:
            shifts[name] = change.shift
    _require_some(adapter, found, rank)
    wanted = DTYPES.get(chosen.dtype or "") or _kept_dtype(adapter, own)
    pairs = {name: one.factors for name, one in found.items() if one.factors is not None}
    dtype = factored.fitting_dtype(pairs.values(), wanted, exact=chosen.dtype is None)
    size = max(1, *(factors.rank for factors in pairs.values()))
    parts: dict[Place, Part] = {place: Part.of(adapter.tensors[place]) for place in carried}
    rows = []
    for name, every in grouped(pairs).items():
        labels, each = zip(*every, strict=True)
        fused = labels != (name,)
        stored = (
            factored.joined(each, size, dtype) if fused else factored.stored(each[0], size, dtype)
        )
        a, b = peft_write.FUSED if fused else roles(ground, name)
        parts[name, a], parts[name, b] = shaped(ground, name, stored.a, stored.b)
        for label, it in every:
            done, lost = found[label], stored.rounding
            rows.append(Converted(label, done.needed, it.rank, done.error, lost, done.size))
    if shifts:
        parts |= biases(ground, pairs, shifts, dtype)
    config = peft_write.lora_config(adapter, size, set(grouped(pairs)), lora_bias=bool(shifts))
    recipe = _recipe(folder, ground, rank, chosen)
    names = touched(adapter, ground.base) if ground.base is not None else []
    origin = origin_of(folder, ground.base, names, recipe, "converted-from")
    made = Conversion(
        f"{folder.name} as a LoRA", peft_write.files(config, parts), origin, size, dtype,
        tuple(rows),
    )  # fmt: skip
    _require_same(made, parts)
    return made


def _split(adapter: Adapter) -> tuple[list[Place], list[Place]]:
    """(what PEFT's LoRA carries beside its factors, the kind's own). What a file repeats of the
    base, or PEFT's wrappers of a saved module, is neither."""
    carried, own = [], []
    for place in adapter.tensors:
        role = place[1]
        if peft_write.is_replacing(role):
            carried += [] if role.startswith(REPEATED) else [place]
        elif not role.startswith(REPEATED):
            own.append(place)
    return carried, own


def _changes(ground: Ground, own: Collection[Place]) -> Iterator[tuple[str, Change]]:
    from adapterkit.hub.change import change_of
    from adapterkit.hub.tensors import read_finite

    tensors = {
        place: tensor.double()
        for place, tensor in read_finite(ground.adapter).items()
        if not place[1].startswith(REPEATED)
    }
    strange = []
    for name, made in lowered(ground, tensors):
        if all(isinstance(primitive, Replace) for primitive in made):
            continue
        if ground.module(name).type not in TYPES or ground.is_grouped(name):
            groups = "grouped " if ground.is_grouped(name) else ""
            strange.append(f"{clean(name)} ({groups}{ground.module(name).type})")
            continue
        for label, each in by_expert(name, made):
            change = change_of(ground, label, each)
            if change is not None:
                yield label, change
    if strange:
        raise InvalidError(
            f"{clean(ground.adapter.name)} changes modules that no plain LoRA of PEFT changes:"
            f" {', '.join(strange[:10])}"
        )


def _require_some(adapter: Adapter, found: Mapping[str, Reduced], rank: int | None) -> None:
    variant = kind(adapter.kind).summary(adapter).variant
    if not found:
        raise InvalidError(
            f"{clean(adapter.name)} ({variant}) replaces parts of the base and adds nothing to a"
            " weight: a LoRA without factors is none",
            hint="attach it beside a LoRA, or merge it into the base",
        )
    open_ = {name: one.needed for name, one in found.items() if one.factors is None}
    if open_ and rank is None:
        name = max(open_, key=lambda each: open_[each])
        more = f", and so are {len(open_) - 1} other modules" if len(open_) > 1 else ""
        raise InvalidError(
            f"{clean(adapter.name)} ({variant}) is no low-rank change: {clean(name)} is exact only"
            f" at rank {open_[name]}, that of a whole weight{more}",
            hint=f"give --rank R for the best of that rank; {open_[name]} is exact",
        )


def _kept_dtype(adapter: Adapter, own: Collection[Place]) -> str:
    """The half precision that all of the source's own tensors have, else float32."""
    held = {adapter.tensors[place].dtype for place in own}
    return held.pop() if len(held) == 1 and held <= set(HALVES) else "F32"


def _recipe(
    folder: Folder, ground: Ground, rank: int | None, chosen: Options
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operation": "convert",
        "inputs": [input_of(folder, ground.adapter)],
        "parameters": {"to": "lora", "rank": rank, "dtype": chosen.dtype},
        "tool": tool(),
    }
    if chosen.allow_fields:
        found["allowed_fields"] = sorted(chosen.allow_fields)
    if ground.base is not None:
        from adapterkit.hub.bases.digests import layout_digest

        layout = f"sha256:{layout_digest(ground.base.tensors)}"
        found["base"] = {"layout": layout, "quantization": chosen.quantization}
    return found


def _require_same(made: Conversion, parts: Mapping[Place, Part]) -> None:
    """What was written is what is read: a tensor or a field that would be lost is found here."""
    found = made.adapter
    if found.tensors.keys() != parts.keys() or any(
        found.fields.rank_of(m.module) != made.rank or found.fields.scaling(m.module) != 1
        for m in made.modules
    ):
        raise InvalidError(f"{clean(made.name)} cannot be written: PEFT would read other tensors")


__all__ = ["Conversion", "Converted", "Options", "biases", "convert"]

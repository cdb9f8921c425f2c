"""A LoRA out of a fine-tuned model: the best of a rank of what training changed, tensor by tensor.

Randomized SVD of each difference (Halko et al. 2011, arXiv:0909.4061); whatever no factors carry
(norms, biases) is kept as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapterkit.hub import factored
from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import CONV1D, EMBEDDING, LINEAR, NORM, Base, Module
from adapterkit.hub.bases.digests import layout_digest
from adapterkit.hub.bases.fingerprint import fingerprint, tensors_of
from adapterkit.hub.bases.folder import find_base, read_base
from adapterkit.hub.blend.streamed import Streamed, low_rank
from adapterkit.hub.convert import DTYPES, Conversion, Converted
from adapterkit.hub.fields import PlainFields, ReplacedFields
from adapterkit.hub.findings import clean
from adapterkit.hub.formats import peft_write
from adapterkit.hub.formats.peft_config import TIED_TABLES
from adapterkit.hub.formats.peft_write import Part, Place
from adapterkit.hub.made import Origin, tool
from adapterkit.hub.matching import Targets
from adapterkit.hub.quant.stored import read_stored
from adapterkit.hub.reduce import single_thread
from adapterkit.hub.tensors import DTYPES as TORCH
from adapterkit.registry.errors import InvalidError, MismatchError

if TYPE_CHECKING:
    from adapterkit.hub.blend.factors import Factors

MATRICES = (LINEAR, CONV1D, EMBEDDING)
Progress = Callable[[str], None]


@dataclass
class _Found:
    factors: dict[str, Factors] = field(default_factory=dict)
    rows: list[Converted] = field(default_factory=list)
    parts: dict[Place, Part] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    biases: bool = False


def extract(
    base: str | Path | Base,
    tuned: str | Path | Base,
    rank: int,
    *,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> Conversion:
    """tuned - base as a LoRA of that rank; its error is that of what no factors of the rank hold.

    Norms that changed are saved whole, changed biases too (`bias="all"`). Raises MismatchError if
    the two are not one architecture with the same shapes, InvalidError for a change that no LoRA of
    PEFT carries. progress: told of each module.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= peft_write.MAX_RANK:
        raise InvalidError(f"rank is {rank!r}, expected 1 to {peft_write.MAX_RANK}")
    if dtype not in DTYPES:
        raise InvalidError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    old, new = _read(base), _read(tuned)
    _require_alike(old, new)
    with single_thread():
        found = _Found()
        for module in old.modules.values():
            if progress is not None:
                progress(module.name)
            _module(old, new, module, rank, DTYPES[dtype], found)
    if not found.factors:
        raise InvalidError(
            f"{clean(new.name)} changes no weight of {clean(old.name)}: nothing to extract"
        )
    return _made(old, new, rank, DTYPES[dtype], found)


def _read(base: str | Path | Base) -> Base:
    if isinstance(base, Base):
        return base
    return read_base(base if isinstance(base, Path) else find_base(base))


def _require_alike(old: Base, new: Base) -> None:
    faults = []
    if old.model_type != new.model_type:
        kinds = f"model_type is {clean(old.model_type)} and {clean(new.model_type)}"
        raise MismatchError(f"{clean(new.name)} is not tuned from {clean(old.name)}: {kinds}")
    for name in sorted(old.modules.keys() ^ new.modules.keys()):
        where = old.name if name in old.modules else new.name
        faults.append(f"{clean(name)} is in {clean(where)} alone")
    for name in old.modules.keys() & new.modules.keys():
        a, b = old.modules[name], new.modules[name]
        if a.shape != b.shape or a.tied_to != b.tied_to:
            faults.append(f"{clean(name)} is {list(a.shape)} and {list(b.shape)}")
    if faults:
        shown = "; ".join(sorted(faults)[:20])
        raise MismatchError(f"{clean(new.name)} is not tuned from {clean(old.name)}: {shown}")


def _module(old: Base, new: Base, module: Module, rank: int, dtype: str, found: _Found) -> None:
    """What changed of one module; nothing of those that stayed."""
    changed = [
        key
        for key, other in _pairs(old, new, module)
        if not torch.equal(read_stored(old.tensors, key), read_stored(new.tensors, other))
    ]
    if not changed:
        return
    weight = bool(module.weight) and module.weight[0] in changed
    if module.type not in MATRICES:
        if module.type != NORM or len(module.weight) != 1:
            raise InvalidError(
                f"{clean(module.name)} ({module.type}) changed, which no LoRA of PEFT carries",
                hint="merge tools keep whole models; a LoRA cannot be this one",
            )
        _save(new, module, found)
        return
    if weight:
        _factor(old, new, module, rank, found)
    if module.bias in changed:
        found.biases = True


def _pairs(old: Base, new: Base, module: Module) -> Iterator[tuple[str, str]]:
    """(tensor of the base, the same of the tuned one)."""
    other = new.modules[module.name]
    yield from zip(module.weight, other.weight, strict=True)
    if module.bias and other.bias:
        yield module.bias, other.bias


def _save(new: Base, module: Module, found: _Found) -> None:
    row = new.modules[module.name]
    found.saved.append(module.name)
    keys = {"replace.weight": row.weight[0], **({"replace.bias": row.bias} if row.bias else {})}
    for role, key in keys.items():
        found.parts[module.name, role] = Part.of(new.tensors[key])


def _factor(old: Base, new: Base, module: Module, rank: int, found: _Found) -> None:
    delta = _weight(new, new.modules[module.name]) - _weight(old, module)
    tied = any(m.tied_to == module.name for m in old.modules.values())
    if tied and module.name.rpartition(".")[2] not in TIED_TABLES:
        raise InvalidError(f"{clean(module.name)} changed and is tied: PEFT changes one end of it")
    shape = (delta.shape[0], delta.shape[1])
    factors, error = low_rank(Streamed(shape, lambda start, stop: delta[start:stop]), rank)
    size = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
    exact = min(shape)
    found.factors[module.name] = factors
    found.rows.append(Converted(module.name, exact, factors.rank, error, 0.0, size))


def _weight(base: Base, module: Module) -> Tensor:
    """(out, in), float32."""
    stored = read_stored(base.tensors, module.weight[0]).float()
    return stored.mT if module.type in (CONV1D, EMBEDDING) else stored


def _made(old: Base, new: Base, rank: int, dtype: str, found: _Found) -> Conversion:
    parts, rows = dict(found.parts), []
    for row in found.rows:
        written = factored.stored(found.factors[row.module], rank, dtype)
        table = old.modules[row.module].type == EMBEDDING
        a, b = ("embedding_A", "embedding_B") if table else ("A", "B")
        parts[row.module, a], parts[row.module, b] = written.a, written.b
        rows.append(_rounded(row, written.rounding))
    if found.biases:
        parts |= _biases(new, dtype)
    adapter = _shell(old, found)
    config = peft_write.lora_config(adapter, rank, found.factors, lora_bias=False)
    names = tensors_of(old, [*found.factors, *found.saved])
    recipe: dict[str, Any] = {
        "operation": "extract",
        "base": {"layout": f"sha256:{layout_digest(old.tensors)}"},
        "tuned": _identity(new, tensors_of(new, [*found.factors, *found.saved])),
        "parameters": {"rank": rank, "dtype": dtype},
        "tool": tool(),
    }
    known = fingerprint(old, touched=names)
    extra = [known.sketch_data] if known.sketch_data else []
    origin = Origin(recipe, (), known.record(), None, extra)
    name = f"{new.name} - {old.name}"
    return Conversion(name, peft_write.files(config, parts), origin, rank, dtype, tuple(rows))


def _rounded(row: Converted, rounding: float) -> Converted:
    return Converted(row.module, row.needed, row.rank, row.error, rounding, row.size)


def _biases(new: Base, dtype: str) -> dict[Place, Part]:
    """Every bias of the tuned model: PEFT keeps all or none."""
    return {
        (module.name, "replace.bias"): factored.part(
            read_stored(new.tensors, module.bias).to(TORCH[dtype]), dtype
        )
        for module in new.modules.values()
        if module.bias
    }


def _shell(old: Base, found: _Found) -> Adapter:
    """All that a config says beside factors."""
    tie = any(
        old.modules[name].type == EMBEDDING
        and any(m.tied_to == name for m in old.modules.values())
        for name in found.factors
    )
    replaced = ReplacedFields(bias="all" if found.biases else "none", tie=tie)
    nothing: Mapping[Any, Any] = {}
    return Adapter(
        name=old.name, kind="lora", format="peft", fields=PlainFields(replaced),
        targets=Targets(saved=tuple(found.saved)), tensors=nothing, config=nothing,
        base_name=old.name, task=None,
    )  # fmt: skip


def _identity(base: Base, names: list[str]) -> dict[str, Any]:
    """Of the tuned model, which no registry knows."""
    record = fingerprint(base, touched=names).record()
    kept = ("id", "layout", "sketch", "config")
    return {name: record[name] for name in kept if name in record}

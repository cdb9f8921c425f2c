"""What is active on a live model, put into its weights; and taken out again, bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapterkit.hub.bases.base import EXPERTS, Base, Module
from adapterkit.hub.bases.folder import find_base, is_folder, read_base
from adapterkit.hub.change import reason
from adapterkit.hub.compose.lowering import Lowered, lower
from adapterkit.hub.compose.plan import Weighted
from adapterkit.hub.compose.spots import owner_of
from adapterkit.hub.findings import clean
from adapterkit.hub.merge.fidelity import Measure, MergeReport, guarded, sums
from adapterkit.hub.merge.update import (
    TRANSPOSED,
    Update,
    moves_bias,
    new_bias,
    of_expert,
    of_weight,
    on_bias,
    same,
)
from adapterkit.hub.primitives import Additive, BiasShift, Gain
from adapterkit.hub.quant import format_of
from adapterkit.hub.quant.stored import read_stored
from adapterkit.hub.read import read_adapter
from adapterkit.hub.sources import Folder
from adapterkit.registry.errors import ConflictError, InvalidError, MismatchError

if TYPE_CHECKING:
    from adapterkit.hub.merge.undo import Undo

LOG = logging.getLogger(__name__)
WORDS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True, eq=False)
class Target:
    """One parameter of the model. parameter: weight, bias, or the name of a fused one."""

    row: Module
    module: nn.Module
    parameter: str
    updates: Sequence[Weighted]
    peft: bool = False

    @property
    def name(self) -> str:
        is_own = self.parameter in ("weight", "bias")
        return f"{self.row.name}.{self.parameter}" if is_own else self.row.name

    @property
    def format(self) -> str:
        if self.parameter == "weight":
            method = format_of(self.module).method(self.module)
            if method != "none":
                return method
        dtype: torch.dtype = getattr(self.module, self.parameter).dtype
        return WORDS.get(dtype, str(dtype).removeprefix("torch."))

    def tensors(self) -> dict[str, Tensor]:
        """By reference."""
        if self.parameter == "weight":
            return format_of(self.module).tensors(self.module)
        return {"weight": getattr(self.module, self.parameter).data}

    def new(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(what it is, what it should be, both float32, the tensors it would have then)."""
        if self.parameter == "bias":
            bias: Tensor = getattr(self.module, "bias").detach().float()  # noqa: B009
            wanted = new_bias(self.row, bias, self.updates, peft=self.peft)
            return bias, wanted, {"weight": wanted.to(self.tensors()["weight"].dtype)}
        if self.row.type == EXPERTS:
            return self._experts()
        weight = format_of(self.module).read_weight(self.module)
        matrix = weight.flatten(1) if weight.ndim > 1 else weight[:, None]
        update = of_weight(self.row, self.updates, peft=self.peft)
        wanted = _applied(update, matrix, self.row.type in TRANSPOSED).reshape(weight.shape)
        return weight, wanted, format_of(self.module).write_weight(self.module, wanted)

    def _experts(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        whole = self.tensors()["weight"]
        turned = bool(getattr(self.module, "is_transposed", False))
        w = (whole.mT if turned else whole).float()
        parts = []
        for expert, matrix in enumerate(w):
            every = slice(0, len(matrix))
            own = [Weighted(u.weight, of_expert(u.primitive, expert, every)) for u in self.updates]
            parts.append(of_weight(self.row, own, peft=self.peft).applied(matrix))
        wanted = torch.stack(parts)
        stored = (wanted.mT if turned else wanted).to(whole.dtype)
        return w, wanted, {"weight": stored}

    def means(self, tensors: Mapping[str, Tensor]) -> Tensor:
        if self.parameter == "weight":
            return format_of(self.module).means(self.module, tensors)
        found = tensors["weight"].float()
        turned = self.row.type == EXPERTS and bool(getattr(self.module, "is_transposed", False))
        return found.mT if turned else found

    def from_source(self, base: Base) -> dict[str, Tensor] | None:
        """The tensors as they were loaded from these files; None if they are not there."""
        row = base.modules.get(self.row.name)
        if row is None:
            return None
        if self.parameter == "bias":
            return None if not row.bias else self._cast(read_stored(base.tensors, row.bias))
        owner = base.modules[row.tied_to] if row.tied_to and not row.weight else row
        if not owner.weight:
            return None
        found = [read_stored(base.tensors, key) for key in owner.weight]
        if self.row.type == EXPERTS:
            return self._cast(_fused(found, row.shape[0]))
        if self.format in WORDS.values():
            return self._cast(found[0])
        if _is_packed(base, owner.weight[0]):
            return _packed(base, owner.weight[0], self)
        dense = found[0].mT if row.type in TRANSPOSED else found[0]  # as a linear layer
        dtype = getattr(getattr(self.module.weight, "quant_state", None), "dtype", torch.float16)
        return format_of(self.module).write_weight(self.module, dense.to(dtype))

    def _cast(self, found: Tensor) -> dict[str, Tensor]:
        held = self.tensors()["weight"]
        return {"weight": found.to(held.dtype).reshape(held.shape)}


def _applied(update: Update, matrix: Tensor, transposed: bool) -> Tensor:
    """matrix as it is applied, (out, in)."""
    return update.applied(matrix.mT).mT if transposed else update.applied(matrix)


def _fused(parts: Sequence[Tensor], count: int) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    each = len(parts) // count
    return torch.stack([torch.cat(list(parts[e * each : (e + 1) * each])) for e in range(count)])


def _is_packed(base: Base, key: str) -> bool:
    return base.tensors[key].dtype in ("U8", "I8")


def _packed(base: Base, key: str, target: Target) -> dict[str, Tensor]:
    """The tensors of a weight that is stored quantized."""
    from adapterkit.hub.bases.packed import scales_of, state_of
    from adapterkit.hub.tensors import read_tensor

    codes = read_tensor(base.tensors[key]).reshape(target.tensors()["codes"].shape)
    scales, state = scales_of(base.tensors, key), state_of(base.tensors, key)
    if scales is not None:
        return {"codes": codes, "scales": read_tensor(scales)}
    found = {"codes": codes, "absmax": read_tensor(base.tensors[f"{key}.absmax"])}
    if state is not None and state.nested is not None:
        nested = read_tensor(base.tensors[f"{key}.nested_absmax"])
        found |= {"offset": torch.tensor(state.nested[1]), "nested_absmax": nested}
    return found


def source_of(folder: str) -> Base:
    """The files that a model says it came from. Raises AdapterError if there are none."""
    return read_base(Path(folder) if is_folder(Path(folder)) else find_base(folder))


class Merged:
    """A merge that happened. report: what became of the adapters."""

    def __init__(self, report: MergeReport, undo: Undo | None) -> None:
        self.report, self._undo = report, undo

    @property
    def is_final(self) -> bool:
        return self._undo is None

    def unmerge(self) -> None:
        """The base's weights, bit for bit. Raises ConflictError where nothing was kept of them."""
        if self._undo is None:
            raise ConflictError(
                "nothing was kept of the base's weights", hint="merge_(undo='memory')"
            )
        for target, tensors in self._undo.restored():
            _write(target, tensors)


def merged(
    model: nn.Module, base: Base, folders: Mapping[str, tuple[Folder, float]], undo: str | None,
    *, min_gain: float, peft: bool,
) -> Merged:  # fmt: skip
    """Puts adapters into the weights of a model on which nothing is active.

    folders: by name, each with its weight. Everything is computed and checked first.
    """
    from adapterkit.hub.merge import undo as undoing

    modules = dict(model.named_modules())
    lowered = {
        name: (lower(read_adapter(folder), base, modules, torch.float32), weight)
        for name, (folder, weight) in folders.items()
    }
    targets = _targets(base, modules, lowered, peft)
    report = guarded(_measured(targets), min_gain, stop=True)
    size = sum(t.numel() * t.element_size() for one in targets for t in one.tensors().values())
    LOG.info("merging into %d parameters, %d bytes, undo=%s", len(targets), size, undo)
    kept = undoing.made(undo, targets, base.name)
    for target in targets:
        _write(target, target.new()[2])
    return Merged(report, kept)


@torch.no_grad()
def _write(target: Target, tensors: Mapping[str, Tensor]) -> None:
    for name, held in target.tensors().items():
        held.copy_(tensors[name].reshape(held.shape))


def _targets(
    base: Base,
    modules: Mapping[str, nn.Module],
    lowered: Mapping[str, tuple[Lowered, float]],
    peft: bool,
) -> list[Target]:
    updates: dict[str, list[Weighted]] = {}
    for name, (made, weight) in lowered.items():
        for row, primitives in made.updates.items():
            for primitive in primitives:
                _require_weight(name, row, primitive)
                updates.setdefault(row, []).append(Weighted(weight, primitive))
    _require_alike(base, updates)
    _require_biases(base, updates)
    found = []
    for row, own in updates.items():
        module = base.modules[row]
        owner, parameter = owner_of(modules, row)
        spot = modules[owner]
        # a tied table is changed as the one that it is
        if module.tied_to not in updates and not all(on_bias(u.primitive) for u in own):
            found.append(Target(module, spot, parameter or "weight", tuple(own), peft))
        if module.bias is not None and moves_bias(own):
            found.append(Target(module, spot, "bias", tuple(own), peft))
    return found


def _require_weight(name: str, row: str, primitive: Any) -> None:
    if not isinstance(primitive, Additive | Gain):
        where = f" at {clean(row)}," if row else ""
        why = reason(primitive)
        raise InvalidError(f"{clean(name)}:{where} {why}", hint="leave it out: activate")


def _require_alike(base: Base, updates: Mapping[str, Sequence[Weighted]]) -> None:
    for row in base.modules.values():
        if not row.tied_to or not {row.name, row.tied_to} & updates.keys():
            continue
        owner = base.modules[row.tied_to]
        turned = (row.type in TRANSPOSED) != (owner.type in TRANSPOSED)
        if not same(updates.get(row.name, ()), updates.get(owner.name, ()), turned=turned):
            raise MismatchError(
                f"{clean(row.name)} and {clean(owner.name)} are one table, and the adapters change"
                " them differently",
                hint="merge on disk, which gives each a table of its own: adapter merge",
            )


def _require_biases(base: Base, updates: Mapping[str, Sequence[Weighted]]) -> None:
    lacking = [
        row
        for row, own in updates.items()
        if base.modules[row].bias is None and any(isinstance(u.primitive, BiasShift) for u in own)
    ]
    if lacking:
        shown = ", ".join(map(clean, lacking[:10]))
        raise MismatchError(f"the adapters add a bias to modules that have none: {shown}")


def _measured(targets: Sequence[Target]) -> MergeReport:
    rows = []
    for target in targets:
        w, wanted, tensors = target.new()
        means = target.means(tensors)
        if not torch.isfinite(means).all():
            raise MismatchError(f"{clean(target.name)} would hold NaN or Inf as {target.format}")
        measure = Measure(target.name, target.format)
        measure.add(sums(w, wanted, means))
        rows.append(measure.result())
    return MergeReport(None, tuple(rows), "live", "the weights of the model", "none", {})

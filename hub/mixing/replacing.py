"""Adapters that replace parts of the base or shift its biases, and do nothing else, as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from adapterkit.hub.bases.base import Base
from adapterkit.hub.findings import clean
from adapterkit.hub.formats import again, state_dict
from adapterkit.hub.formats.peft_write import Part, Place
from adapterkit.hub.mixing import replaced
from adapterkit.hub.mixing.inputs import Input, joined
from adapterkit.hub.mixing.options import Options
from adapterkit.hub.mixing.result import KEEP, averaged, parts_of, require, result, variant
from adapterkit.hub.mixing.written import Blend, common
from adapterkit.registry.errors import InvalidError

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("sum", "average")
SHIFT, BIAS = "shift", "replace.bias"
# What narrows the modules that a config names.
NARROWER = ("exclude_modules", "layers_to_transform", "layers_pattern")


def blended(inputs: Sequence[Input], base: Base | None, chosen: Options) -> Blend:
    """One of their kind: T0 + sum w (T - T0), b + sum w d."""
    require(inputs, chosen, METHODS)
    _require_one_kind(inputs)
    every = joined(inputs)
    every = averaged(every) if chosen.method == "average" else every
    tensors = replaced.blended(every)
    shifts = _shifts(every)
    if inputs[0].adapter.kind == "bitfit":
        tensors = _new_biases(every, base, tensors, shifts)
    else:
        tensors |= {(module, SHIFT): shift for module, shift in shifts.items()}
    parts = parts_of(tensors, chosen)
    return result(inputs, base, chosen, _files(every, parts), parts)


def _require_one_kind(inputs: Sequence[Input]) -> None:
    first = inputs[0]
    other = next((one for one in inputs if one.adapter.kind != first.adapter.kind), None)
    if other is not None:
        raise InvalidError(
            f"{variant(first)} and {variant(other)}: no one adapter is both", hint=KEEP
        )


def _shifts(inputs: Sequence[Input]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for one in inputs:
        for (module, role), tensor in one.tensors.items():
            if role == SHIFT:
                own = one.weight * tensor
                found[module] = found[module] + own if module in found else own
    return found


def _new_biases(
    inputs: Sequence[Input],
    base: Base | None,
    tensors: Mapping[Place, Tensor],
    shifts: Mapping[str, Tensor],
) -> dict[Place, Tensor]:
    """A dump has new values alone, and of biases that the base has."""
    ground = inputs[0].ground
    if base is None and any(one.adapter.fields.extends for one in inputs):
        raise ground.needs("the biases of the base, as a trainer that adds some made it")
    found = dict(tensors)
    for module, shift in shifts.items():
        start = found.get((module, BIAS))
        found[module, BIAS] = shift + (_bias(inputs[0], module) if start is None else start)
    if base is not None:
        for module, role in found:
            if role == BIAS and ground.bias(module) is None:
                _refuse(inputs[0], module)
    return found


def _bias(one: Input, module: str) -> Tensor:
    bias = one.ground.bias(module)
    if bias is None:
        _refuse(one, module)
    return bias.double()


def _refuse(one: Input, module: str) -> NoReturn:
    raise InvalidError(
        f"{variant(one)} gives {clean(module)} a bias, which it lacks in the base: a dump of new"
        " values has none",
        hint=KEEP,
    )


def _files(inputs: Sequence[Input], parts: Mapping[Place, Part]) -> dict[str, bytes]:
    adapters = [one.adapter for one in inputs]
    if adapters[0].kind == "bitfit":
        return state_dict.written(parts)
    about = common(inputs)
    changes: dict[str, Any] = {
        "base_model_name_or_path": about.base_name,
        "revision": about.revision,
        "task_type": about.task,
    }
    if about.targets.saved:
        changes["modules_to_save"] = list(about.targets.saved)
    if about.fields.replaced.bias != "none":
        changes["bias"] = about.fields.replaced.bias
    if len({adapter.targets for adapter in adapters}) > 1:
        changes |= {name: None for name in NARROWER if name in adapters[0].config}
        changes["target_modules"] = sorted({m for one in inputs for m in _targeted(one)})
    return again.peft(adapters, parts, changes)


def _targeted(one: Input) -> set[str]:
    """The modules of its own, not those that it saves as a whole."""
    adapter = one.adapter
    return {module for module, _ in adapter.tensors if not adapter.targets.is_saved(module)}

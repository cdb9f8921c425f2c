"""Gains as one IA3, which does what they do attached together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterkit.hub.bases.base import Base
from adapterkit.hub.blend import gains
from adapterkit.hub.findings import clean
from adapterkit.hub.formats import peft_write
from adapterkit.hub.formats.peft_write import Place
from adapterkit.hub.mixing import replaced
from adapterkit.hub.mixing.inputs import Input, joined
from adapterkit.hub.mixing.options import Options
from adapterkit.hub.mixing.result import KEEP, averaged, parts_of, require, result
from adapterkit.hub.mixing.written import Blend, common
from adapterkit.hub.primitives import InputGain, OutputGain
from adapterkit.registry.errors import InvalidError

if TYPE_CHECKING:
    from torch import Tensor

METHODS = {"sum": gains.product, "average": gains.mean, "linear": gains.linear}
Held = dict[str, list[tuple["Tensor", float]]]


def blended(inputs: Sequence[Input], base: Base | None, chosen: Options) -> Blend | None:
    """None where a rank, or another method, makes changes of weights of them."""
    if chosen.rank is not None or chosen.method not in METHODS:
        return None
    require(inputs, chosen, tuple(METHODS))
    every = joined(inputs)
    every = averaged(every) if chosen.method == "average" else every
    outputs, columns = _held(every)
    both = sorted(outputs.keys() & columns.keys())
    if both:
        raise InvalidError(
            f"{clean(both[0])} has its outputs scaled by one adapter and its inputs by another,"
            " as no IA3 does",
            hint=KEEP,
        )
    merge = METHODS[chosen.method]
    tensors: dict[Place, Tensor] = {(m, "gain"): merge(g)[:, None] for m, g in outputs.items()}
    tensors |= {(m, "gain"): merge(g)[None] for m, g in columns.items()}
    parts = parts_of(tensors | replaced.blended(every), chosen)
    own = {
        "peft_type": "IA3",
        "feedforward_modules": sorted(columns),
        "fan_in_fan_out": False,
    }
    about = common(every)
    config = peft_write.config_of(about, own, {*outputs, *columns}, about.task)
    return result(inputs, base, chosen, peft_write.files(config, parts), parts)


def _held(inputs: Sequence[Input]) -> tuple[Held, Held]:
    """(of outputs, of inputs), by module: each gain and its weight."""
    outputs: Held = {}
    columns: Held = {}
    for one in inputs:
        for module in one.modules:
            for primitive in one.primitives(module):
                if isinstance(primitive, OutputGain):
                    outputs.setdefault(module, []).append((primitive.l, one.weight))
                elif isinstance(primitive, InputGain):
                    columns.setdefault(module, []).append((primitive.l, one.weight))
                else:
                    raise InvalidError(f"{one.name} does more to {clean(module)} than scale it")
    return outputs, columns

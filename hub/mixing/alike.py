"""Adapters of one kind as one of that kind, where they are no changes of weights, or stay more than
that: an IA3 is one of the size of its vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from adapterkit.hub.bases.base import Base
from adapterkit.hub.blend.methods import method
from adapterkit.hub.change import NO_CHANGE
from adapterkit.hub.findings import clean
from adapterkit.hub.mixing import context, gains, library, parameters, replacing
from adapterkit.hub.mixing.inputs import Input, require_weights
from adapterkit.hub.mixing.options import Options
from adapterkit.hub.mixing.result import KEEP, variant
from adapterkit.hub.mixing.run import settings_of
from adapterkit.hub.mixing.written import Blend
from adapterkit.registry.errors import InvalidError

Way = Callable[[Sequence[Input], Base | None, Options], Blend | None]


def _none(why: str, inputs: Sequence[Input], base: Base | None, chosen: Options) -> Blend | None:
    """why: the name of a primitive that is no change of a weight."""
    method(chosen.method, settings_of(inputs, chosen))  # whether there is one of this name
    reason = NO_CHANGE.get(why, "what it does is no change of a weight")
    raise InvalidError(f"{', '.join(map(variant, inputs))}: {reason}", hint=KEEP)


def _average(why: str, inputs: Sequence[Input], base: Base | None, chosen: Options) -> Blend | None:
    if chosen.method != "average":
        return _none(why, inputs, base, chosen)
    return parameters.blended(inputs, base, chosen)


def _union(inputs: Sequence[Input], base: Base | None, chosen: Options) -> Blend | None:
    """One of several changes of weights is one itself."""
    return None if chosen.method != "average" else parameters.blended(inputs, base, chosen)


# kind -> what makes one of several; all others are changes of weights, which mix among each other
WAYS: dict[str, Way] = {
    "ia3": gains.blended,
    "fused_ia3": gains.blended,
    "bitfit": replacing.blended,
    "beft": replacing.blended,
    "ln_tuning": replacing.blended,
    "trainable_tokens": replacing.blended,
    "prefix": context.blended,
    "prompt": context.blended,
    "bottleneck": partial(_average, "Bottleneck"),
    "compacter": partial(_average, "Bottleneck"),
    "llm_bottleneck": partial(_average, "Bottleneck"),
    "reft": partial(_average, "Intervention"),
    "union": _union,
    "gated_lora": partial(_average, "GatedLowRank"),
    "oft": partial(_none, "InputRotation"),
    "boft": partial(_none, "InputRotation"),
    "fusion": partial(_none, "Fusion"),
}
# Those that a blend of changes of weights can take among others.
WEIGHTS = (gains.blended, replacing.blended)


def alike(inputs: Sequence[Input], base: Base | None, chosen: Options) -> Blend | None:
    """None where what is asked for is a blend of changes of weights, and all inputs are such.

    Raises InvalidError where no one adapter does what they do."""
    if chosen.settings.get("dialect") == "adapters":
        return library.blended(inputs, base, chosen)
    ways = {WAYS.get(one.adapter.kind) for one in inputs}
    way = ways.pop() if len(ways) == 1 else None
    made = None if way is None else way(inputs, base, chosen)
    if made is None:
        _require_weights(inputs)
    return made


def _require_weights(inputs: Sequence[Input]) -> None:
    apart = [one for one in inputs if WAYS.get(one.adapter.kind) not in (None, _union, *WEIGHTS)]
    others = [one for one in inputs if one not in apart]
    if apart and others:
        raise InvalidError(
            f"{variant(apart[0])} and {variant(others[0])}: no one adapter does what both do",
            hint=KEEP,
        )
    if len({one.adapter.kind for one in apart}) > 1:
        raise InvalidError(
            f"{', '.join(map(variant, apart))}: no one adapter does what all of them do", hint=KEEP
        )
    for one in inputs:
        _require_whole(one)
    require_weights(inputs, KEEP)


def _require_whole(one: Input) -> None:
    """A LoRA of PEFT replaces modules, and no bias of one alone."""
    targets, held = one.adapter.targets, one.adapter.tensors
    if WAYS.get(one.adapter.kind) is not replacing.blended:
        return
    alone = [
        module
        for module, role in held
        if role == replacing.BIAS
        and (module, "replace.weight") not in held
        and not targets.is_saved(module)
    ]
    if alone:
        raise InvalidError(
            f"{variant(one)} replaces the bias of {clean(alone[0])}, which a LoRA cannot", hint=KEEP
        )

"""Which weights an adapter can be active at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from adapterkit.hub.compose.admit import Dialect
from adapterkit.hub.compose.blocks import Block, Setup, channels, require_valid
from adapterkit.hub.compose.lowering import Lowered
from adapterkit.hub.findings import clean
from adapterkit.hub.primitives import (
    Bottleneck,
    Coupling,
    InputRotation,
    PrefixKV,
    Primitive,
    Replace,
    RowScale,
    VirtualTokens,
)
from adapterkit.registry.errors import InvalidError


def parse(weights: object) -> dict[str, float]:
    """names -> weights; a list of names means 1 each. Raises InvalidError for anything else."""
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise InvalidError(f"weights are {weights!r}, expected names -> numbers, or names")
    given = dict(weights) if isinstance(weights, Mapping) else dict.fromkeys(map(str, weights), 1.0)
    wrong = [f"{name}={weight!r}" for name, weight in given.items() if not is_weight(weight)]
    if wrong:
        raise InvalidError(f"weights must be finite numbers, found {clean(', '.join(wrong))}")
    return {name: float(weight) for name, weight in given.items()}


def setup(weights: object, given: Mapping[str, float]) -> Setup:
    """What is to be active. Raises InvalidError for blocks that are nested as they cannot be."""
    if not isinstance(weights, Block):
        return Setup({name: weight for name, weight in given.items() if weight != 0})
    require_valid(weights)
    channels(weights)
    return Setup(given, weights)


def is_weight(value: object) -> bool:
    """A finite real number, numpy's too; not a boolean."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer no float can hold
        return False


def require_usable(
    weights: Mapping[str, float], lowered: Mapping[str, Lowered], dialect: Dialect
) -> None:
    """Raises InvalidError naming every adapter whose weight means nothing."""
    partial = [name for name, weight in weights.items() if weight not in (0, 1)]
    if turning := _shown(partial, weights, lowered, InputRotation):
        raise InvalidError(
            f"rotations take no weight but 0 and 1: {turning}; a part of a rotation, or a negative"
            " one, is not a rotation"
        )
    if standing := _shown(partial, weights, lowered, PrefixKV | VirtualTokens):
        raise InvalidError(
            f"prefixes and virtual tokens take no weight but 0 and 1: {standing}; they stand in"
            " front of the input or do not: attention is not linear in them"
        )
    if fixed := _fixed(partial, weights, lowered):
        raise InvalidError(
            f"{fixed}: no weight but 0 and 1, as without what it adds its layer is not the base's"
        )
    scaled = _shown(partial, weights, lowered, RowScale) if dialect == "peft" else ""
    if scaled:
        raise InvalidError(
            f"the peft dialect gives DoRA no weight but 0 and 1: {scaled}",
            hint="attach without dialect='peft'",
        )


def _fixed(
    names: Iterable[str], weights: Mapping[str, float], lowered: Mapping[str, Lowered]
) -> str:
    """name=weight of those with a network that stands in its layer for more than what it adds."""
    return ", ".join(
        f"{clean(name)}={weights[name]:g}"
        for name in names
        if any(_stands_in(p) for made in lowered[name].updates.values() for p in made)
    )


def _stands_in(primitive: Primitive) -> bool:
    if not isinstance(primitive, Bottleneck):
        return isinstance(primitive, Coupling)
    wiring = primitive.wiring
    if wiring.parallel or not wiring.ln_after:
        return not wiring.ln_after
    inside = wiring.residual_inside and primitive.norm_after is not None
    return inside or (wiring.ln_before and wiring.residual != "before")


def whole_modules(lowered: Lowered) -> set[str]:
    """Modules whose weight the adapter replaces as a whole."""
    return {module for module, made in lowered.updates.items() if any(map(_is_whole, made))}


def _is_whole(primitive: Primitive) -> bool:
    return isinstance(primitive, Replace) and primitive.name == "weight" and primitive.rows is None


def require_whole(
    weights: Mapping[str, float], lowered: Mapping[str, Lowered], heads: Iterable[str]
) -> None:
    """Raises InvalidError if a head that only adapters have would be mixed with the random values
    it starts with: it takes the weights 0 and 1, and one active adapter."""
    for head in sorted(heads):
        active = [n for n, w in weights.items() if w and head in whole_modules(lowered[n])]
        if len(active) > 1 or any(weights[name] != 1 for name in active):
            shown = ", ".join(f"{clean(name)}={weights[name]:g}" for name in active)
            raise InvalidError(
                f"{head} is not in the base's checkpoint: it takes weight 1 from one adapter,"
                f" found {shown}"
            )


def _shown(
    names: Iterable[str], weights: Mapping[str, float], lowered: Mapping[str, Lowered], kind: Any
) -> str:
    """name=weight of those that lower to a primitive of this kind."""
    return ", ".join(
        f"{clean(name)}={weights[name]:g}"
        for name in names
        if any(isinstance(p, kind) for made in lowered[name].updates.values() for p in made)
    )

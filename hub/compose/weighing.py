"""Which weights an adapter can be active at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from adapterkit.hub.compose.admit import Dialect
from adapterkit.hub.compose.lowering import Lowered
from adapterkit.hub.findings import clean
from adapterkit.hub.formats.config import is_number
from adapterkit.hub.primitives import InputRotation, RowScale
from adapterkit.registry.errors import InvalidError


def require_usable(
    weights: Mapping[str, float], lowered: Mapping[str, Lowered], dialect: Dialect
) -> None:
    """Raises InvalidError naming every adapter whose weight means nothing."""
    wrong = [f"{name}={weight!r}" for name, weight in weights.items() if not is_number(weight)]
    if wrong:
        raise InvalidError(f"weights must be finite numbers, found {', '.join(wrong)}")
    partial = [name for name, weight in weights.items() if weight not in (0, 1)]
    if turning := _shown(partial, weights, lowered, InputRotation):
        raise InvalidError(
            f"rotations take no weight but 0 and 1: {turning}; a part of a rotation, or a negative"
            " one, is not a rotation"
        )
    scaled = _shown(partial, weights, lowered, RowScale) if dialect == "peft" else ""
    if scaled:
        raise InvalidError(
            f"the peft dialect gives DoRA no weight but 0 and 1: {scaled}",
            hint="attach without dialect='peft'",
        )


def _shown(
    names: Iterable[str], weights: Mapping[str, float], lowered: Mapping[str, Lowered], kind: type
) -> str:
    """name=weight of those that lower to a primitive of this kind."""
    return ", ".join(
        f"{clean(name)}={weights[name]:g}"
        for name in names
        if any(isinstance(p, kind) for made in lowered[name].updates.values() for p in made)
    )

"""What a method may be told, and the form every method has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from adapterkit.hub.blend.entries import ENTRYWISE
from adapterkit.hub.blend.factors import Factors, Term
from adapterkit.hub.blend.masks import Draws, Masks
from adapterkit.registry.errors import InvalidError

Dialect = Literal["paper", "peft", "mergekit", "adapters"]
DIALECTS = get_args(Dialect)
SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class Settings:
    """rank: of the result, None for the largest among the inputs where a method has to truncate.
    density: share of the entries that pruning keeps. gamma: share of the largest entries that
    breadcrumbs drops; epsilon: by how much della's keeping varies around the density.
    seed: of random choices. dialect: whose meaning a name has that is used for different things.
    sign: how ties elects one, by the sum of the values or by their number. inner: what merges the
    coordinates of knots and core. clamp: peft's svd_clamp, the quantile of the entries of both
    factors at which they are cut off."""

    rank: int | None = None
    density: float = 0.5
    gamma: float = 0.01
    epsilon: float = 0.1
    seed: int = 0
    dialect: Dialect = "paper"
    sign: str = "total"
    inner: str = "ties"
    clamp: float | None = None

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)!r}, expected {wanted}"
            for name, right, wanted in self._rules()
            if not right
        ]
        if faults:
            raise InvalidError("; ".join(faults))

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("rank", self.rank is None or self.rank >= 1, "a positive number"),
            ("density", 0 < self.density <= 1, "a number above 0, up to 1"),
            ("gamma", 0 <= self.gamma < 1, "a number from 0 to below 1"),
            ("epsilon", 0 <= self.epsilon <= 1, "a number from 0 to 1"),
            ("dialect", self.dialect in DIALECTS, f"one of {', '.join(DIALECTS)}"),
            ("sign", self.sign in SIGNS, f"one of {', '.join(SIGNS)}"),
            ("inner", self.inner in ENTRYWISE, f"one of {', '.join(ENTRYWISE)}"),
            ("clamp", self.clamp is None or 0 < self.clamp <= 1, "a number above 0, up to 1"),
        ]

    def rank_of(self, terms: Sequence[Term]) -> int:
        """The rank of a truncated result."""
        return self.rank or max(term.factors.rank for term in terms)


@dataclass(frozen=True)
class Place:
    """The module that is being blended. name: what random choices are keyed by. draws: where they
    come from, (name, index of the input) -> numbers in [0, 1); by the seed when None."""

    name: str
    settings: Settings
    draws: Callable[[str, int], Draws] | None = None

    def masks(self, term: Term) -> Draws:
        if self.draws is not None:
            return self.draws(self.name, term.index)
        return Masks(self.settings.seed, self.name, term.index)


@dataclass(frozen=True, eq=False)
class Blended:
    """A method's result for one module. error: |what the method means - factors| / |it|."""

    factors: Factors
    error: float = 0.0


Method = Callable[[Sequence[Term], Place], Blended]

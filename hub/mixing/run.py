"""The blend of one module after the other, so that one weight of the base is held at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from adapterkit.hub.blend.entries import ENTRYWISE
from adapterkit.hub.blend.factors import Factors, norm
from adapterkit.hub.blend.methods import method
from adapterkit.hub.blend.settings import Blended, Place, Settings
from adapterkit.hub.blend.truncate import spectrum
from adapterkit.hub.convert import Converted
from adapterkit.hub.findings import clean
from adapterkit.hub.matching import Patterns
from adapterkit.hub.mixing.inputs import Input
from adapterkit.hub.mixing.options import AUTO, LINEAR_METHODS, Options
from adapterkit.hub.mixing.terms import At, at, magnitude, single
from adapterkit.registry.errors import InvalidError

# A row scale nearer to 0 than this leaves a DoRA no direction to keep.
LEAST_SCALE = 1e-3
# Of the sum of ranks: as far as a rank is looked for in a change that has none of its own.
MOST = 4


def settings_of(inputs: Sequence[Input], chosen: Options) -> Settings:
    """What the methods are told. PEFT truncates to the largest rank of all modules, not of one."""
    known = {each.name for each in fields(Settings)} - {"rank"}
    unknown = sorted(chosen.settings.keys() - known)
    if unknown:
        every = ", ".join(sorted(known | {each.name for each in fields(Options)} - {"settings"}))
        raise InvalidError(f"no option {', '.join(unknown)} of blend; there are {every}")
    rank = chosen.rank if isinstance(chosen.rank, int) else None
    if rank is None and chosen.settings.get("dialect") == "peft" and chosen.method.endswith("svd"):
        rank = _largest_rank(inputs)
    return Settings(rank=rank, **chosen.settings)


@dataclass
class Found:
    """Of each module: factors, its row of the report, and what goes with them."""

    factors: dict[str, Factors] = field(default_factory=dict)
    rows: list[Converted] = field(default_factory=list)
    shifts: dict[str, Tensor] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)

    def add(self, more: Found) -> None:
        """The modules of another, after these."""
        self.factors |= more.factors
        self.rows += more.rows
        self.shifts |= more.shifts
        self.magnitudes |= more.magnitudes


class Mix:
    """One method at one rank over all modules of some inputs."""

    def __init__(self, inputs: Sequence[Input], chosen: Options) -> None:
        self._inputs, self._chosen = inputs, chosen
        self._settings = settings_of(inputs, chosen)
        # picked per module from the whole sum, which svd would cut to a rank before
        name = "sum" if chosen.rank == AUTO and chosen.method == "svd" else chosen.method
        self._method = method(name, self._settings)
        self._patterns = Patterns()
        self._exact = chosen.method in LINEAR_METHODS and chosen.rank is None
        # a DoRA is one for all of its modules
        doras = [one for one in inputs if getattr(one.adapter.fields, "dora", False)]
        self._dora = self._exact and bool(doras)

    def run(self, modules: Sequence[str]) -> Found:
        found = Found()
        for module in modules:
            self._one(module, found)
        return found

    def _one(self, module: str, found: Found) -> None:
        weights = self._weights(module)
        here = at(module, self._inputs, weights, apart=self._dora)
        factors, error, needed = self._factors(module, here)
        if self._dora:
            factors, found.magnitudes[module] = self._magnitude(module, factors, here)
        # what is exact everywhere has no error that a size would have to weigh
        size = norm(factors) / math.sqrt(1 - error**2) if not self._exact and error < 1 else 0.0
        found.factors[module] = factors
        found.rows.append(Converted(module, needed, factors.rank, error, 0.0, size))
        if here.shift is not None:
            found.shifts[module] = here.shift

    def _weights(self, module: str) -> list[float]:
        weights = [one.weight for one in self._inputs]
        for pattern, shares in self._chosen.at.items():
            if len(shares) != len(weights):
                raise InvalidError(
                    f"{clean(pattern)} has {len(shares)} weights, expected {len(weights)}"
                )
            if self._patterns.match(rf"(?:.*\.)?(?:{pattern})(?:\..*)?", module, "at"):
                return [one.weight * shares[one.given] for one in self._inputs]
        return weights

    def _factors(self, module: str, here: At) -> tuple[Factors, float, int]:
        """(factors, error, the rank at which they would be exact)."""
        entrywise = self._chosen.method in ENTRYWISE or self._settings.dialect == "peft"
        terms = single(here.terms) if entrywise else list(here.terms)
        self._require_bounded(module, here)
        needed = sum(term.factors.rank for term in terms)
        if any(term.rest is not None for term in terms):
            needed = min(terms[0].shape)  # a part without factors has the rank of the weight
        settings = self._settings
        if entrywise and self._chosen.rank == AUTO:
            settings = replace(settings, rank=min(MOST * needed, *terms[0].shape))
        made = self._method(terms, Place(module, settings))
        if self._chosen.rank == AUTO:
            return self._picked(module, made)
        return made.factors, made.error, max(needed, made.factors.rank)

    def _picked(self, module: str, made: Blended) -> tuple[Factors, float, int]:
        """The smallest rank that keeps the energy."""
        left = 1 - made.error**2  # what the factors hold of it
        if left < self._chosen.energy:
            raise InvalidError(
                f"{clean(module)}: rank {made.factors.rank} keeps only {left:.3g} of what"
                f" {self._chosen.method} means, not {self._chosen.energy:g}",
                hint="give a lower --energy, or --rank R",
            )
        values = spectrum(made.factors)
        keep = min(values.rank_for(self._chosen.energy / left), made.factors.rank)
        kept = left * (1 - values.error(keep) ** 2)
        return values.truncated(keep), math.sqrt(max(1 - kept, 0.0)), made.factors.rank

    def _require_bounded(self, module: str, here: At) -> None:
        """A sum of changes without factors has the rank of the weight."""
        loose = [term for term in here.terms if term.rest is not None]
        if loose and self._settings.rank is None and self._chosen.method in ("sum", "average"):
            names = ", ".join(self._inputs[term.index].name for term in loose)
            raise InvalidError(
                f"{names}: the change of {clean(module)} is no low-rank one",
                hint="give --rank R for the best of that rank, or --as recipe to keep it exact",
            )

    def _magnitude(self, module: str, factors: Factors, here: At) -> tuple[Factors, Tensor]:
        n_out = factors.shape[0]
        g = torch.zeros(n_out, dtype=torch.float64) if here.g is None else here.g
        least = float((1 + g).abs().min())
        if least < LEAST_SCALE:
            raise InvalidError(
                f"{clean(module)}: the weighted sum scales a row by {least:.2g}, as no DoRA does",
                hint="give --rank R for a LoRA, the best of that rank",
            )
        weight = self._inputs[0].ground.weight(module)
        return magnitude(weight, factors, g)


def _largest_rank(inputs: Sequence[Input]) -> int:
    sizes = [
        stored.shape[0]
        for one in inputs
        for (_, role), stored in one.adapter.tensors.items()
        if role in ("A", "embedding_A")
    ]
    return max(sizes, default=1)

"""A correction beside what else could be done at its cost: the base as it is, only quantized, and
one adapter of the same rank that is blended of all."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from adapterkit.hub.merge.fidelity import Fidelity, together

CORRECTION, BLEND = "correction", "blend"


@dataclass(frozen=True)
class Comparison:
    """Of all corrected parameters together. corrected: of codes and correction, plain: of codes
    without one, rival: of the quantized base and a blended adapter. left, rival_left: of what was
    wanted, |result - it| / |D|, in which the base's own loss counts too."""

    rank: int
    corrected: Fidelity
    plain: Fidelity
    rival: Fidelity
    left: float
    rival_left: float

    @property
    def better(self) -> str:
        return CORRECTION if self.left < self.rival_left else BLEND

    def record(self) -> dict[str, Any]:
        """The JSON form: stable names."""
        return {
            "rank": self.rank,
            "better": self.better,
            "corrected": {**_figures(self.corrected), "left": round(self.left, 6)},
            "plain": _figures(self.plain),
            "rival": {**_figures(self.rival), "left": round(self.rival_left, 6)},
        }


def compared(rows: Iterable[Fidelity], rank: int | None) -> Comparison | None:
    """None where nothing was corrected."""
    pairs = [(row, row.correction) for row in rows if row.correction is not None]
    if rank is None or not pairs:
        return None
    size = math.fsum(row.delta for row, _ in pairs)
    left, rival_left = (
        math.sqrt(math.fsum(values) / size) if size else 0.0
        for values in zip(*((one.left, one.rival_left) for _, one in pairs), strict=True)
    )
    return Comparison(
        rank,
        together(row for row, _ in pairs),
        together(one.plain for _, one in pairs),
        together(one.rival for _, one in pairs),
        left,
        rival_left,
    )


def _figures(of: Fidelity) -> dict[str, Any]:
    return {name: value for name, value in of.record().items() if name not in ("name", "format")}

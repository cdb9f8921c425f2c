"""What a merge can be told."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.hub.bases.base import METHODS
from adapterkit.hub.compose.admit import DIALECTS, Dialect
from adapterkit.hub.formats.peft_config import MAX_RANK
from adapterkit.hub.merge.onto import AUTO, CHOICES
from adapterkit.hub.quant.stored import DTYPES
from adapterkit.registry.errors import InvalidError

if TYPE_CHECKING:
    from adapterkit.registry import Registry


@dataclass(frozen=True)
class Options:
    """quantize: what is written; None: as the base is stored. onto: see `onto`. dtype: of dense
    weights; None: each its own. trained_on: what the adapters were trained on, where the registry
    does not know. min_gain: below it, a merge into 8 or 4 bits stops. correction_rank: of a LoRA
    beside such a merge that holds what quantization lost; None for none. allow_fields, dialect,
    strict, registry: as in `attach`."""

    quantize: str | None = None
    onto: str = AUTO
    dtype: str | None = None
    trained_on: str | None = None
    min_gain: float = 0.5
    correction_rank: int | None = None
    registry: Registry | None = None
    strict: bool = False
    allow_fields: Collection[str] = ()
    dialect: Dialect = "exact"

    def __post_init__(self) -> None:
        choices = {
            "quantize": (None, *METHODS), "onto": CHOICES, "dtype": (None, *DTYPES),
            "trained_on": (None, *METHODS), "dialect": DIALECTS,
        }  # fmt: skip
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                shown = ", ".join(str(each) for each in known if each is not None)
                raise InvalidError(f"{name} is {value!r}, expected one of {shown}")
        rank = self.correction_rank
        if rank is not None and (
            isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= MAX_RANK
        ):
            raise InvalidError(f"correction_rank is {rank!r}, expected 1 to {MAX_RANK}")
        gain = self.min_gain
        if isinstance(gain, bool) or not isinstance(gain, int | float) or not 0 <= gain <= 1:
            raise InvalidError(f"min_gain is {gain!r}, expected a number from 0 to 1")

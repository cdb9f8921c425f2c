"""How adapters are blended."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapterkit.hub.bases.base import METHODS
from adapterkit.hub.convert import DTYPES
from adapterkit.hub.formats.peft_write import MAX_RANK
from adapterkit.registry.errors import InvalidError

# Methods that are linear in the changes: what one DoRA can carry stays a DoRA.
LINEAR_METHODS = ("sum", "average")
AUTO = "auto"


@dataclass(frozen=True)
class Options:
    """method: a name of `blend.methods`. rank: of the result, at most; "auto" keeps `energy` of the
    squared norm of each module's change. at: (pattern of module names -> a weight for each source,
    multiplied with its own); the first that matches counts. settings: density, gamma, epsilon,
    seed, dialect, sign, inner, clamp. quantization: how the base is loaded where the result runs.
    """

    method: str = "sum"
    rank: int | str | None = None
    energy: float = 0.99
    at: Mapping[str, Sequence[float]] = field(default_factory=dict)
    quantization: str | None = None
    dtype: str | None = None
    allow_fields: Collection[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        right = isinstance(self.rank, int) and 0 < self.rank <= MAX_RANK
        if self.rank not in (None, AUTO) and (isinstance(self.rank, bool) or not right):
            raise InvalidError(f"rank is {self.rank!r}, expected 1 to {MAX_RANK}, or auto")
        if not 0 < self.energy <= 1:
            raise InvalidError(f"energy is {self.energy!r}, expected a number above 0, up to 1")
        choices = {"quantization": METHODS, "dtype": tuple(DTYPES)}
        for name, known in choices.items():
            if getattr(self, name) not in (None, *known):
                value = getattr(self, name)
                raise InvalidError(f"{name} is {value!r}, expected one of {', '.join(known)}")

    def parameters(self) -> dict[str, Any]:
        """What a recipe keeps."""
        found: dict[str, Any] = {"method": self.method, "rank": self.rank, "dtype": self.dtype}
        found |= {"energy": self.energy} if self.rank == AUTO else {}
        found |= {"at": {k: list(v) for k, v in self.at.items()}} if self.at else {}
        return found | dict(self.settings)

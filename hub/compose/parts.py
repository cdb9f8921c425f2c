"""What an engine for one class of primitives offers to `Adapters`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from adapterkit.hub.bases.base import Base
from adapterkit.hub.compose.admit import Options
from adapterkit.hub.compose.blocks import Setup
from adapterkit.hub.compose.here import Current
from adapterkit.hub.compose.lowering import Lowered
from adapterkit.hub.compose.rows import Rows


class Part(Protocol):
    """One class of primitives on the live model. A state is what it does while something is
    active; it is made before anything is switched, so that nothing is ever active by half.

    current: the state it is in; whatever it put on the model asks for it in each forward.
    """

    current: Current[Any]

    def plan(self, active: Setup, lowered: Mapping[str, Lowered]) -> Any:
        """The state for these weights; raises if there is none, and nothing has changed.
        active: names in the order given -> weights other than 0, and how they are composed."""
        ...

    def route(self, states: Sequence[Any], rows: Rows) -> Any:
        """The state in which each row of the batch has one of these. Raises InvalidError for what
        cannot differ by rows."""
        ...

    def remove(self) -> None:
        """The model as it was, bit for bit."""
        ...


# (the model, its description, what `attach` was given)
Make = Callable[[nn.Module, Base, Options], Part]

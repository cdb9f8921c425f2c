"""What an engine for one class of primitives offers to `Adapters`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import nn

from adapterkit.hub.bases.base import Base
from adapterkit.hub.compose.admit import Options
from adapterkit.hub.compose.blocks import Setup
from adapterkit.hub.compose.lowering import Lowered


class Part(Protocol):
    """One class of primitives on the live model.

    plan: makes ready what these weights need, and raises if they cannot be; what it returns then
    switches to them and cannot fail, so that nothing is ever active by half.
    """

    def plan(self, active: Setup, lowered: Mapping[str, Lowered]) -> Callable[[], None]:
        """active: names in the order given -> weights other than 0, and how they are composed."""
        ...

    def remove(self) -> None:
        """The model as it was, bit for bit."""
        ...


# (the model, its description, what `attach` was given)
Make = Callable[[nn.Module, Base, Options], Part]

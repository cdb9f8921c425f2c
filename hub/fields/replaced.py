"""What any kind may carry beside its own tensors: parts of the base that it replaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# What the roles of a head's layers start with.
HEAD = "replace.head."


@dataclass(frozen=True)
class Seat:
    """leaf: the module whose place the last layer takes. module: whose output becomes the head's.
    first: it gets the whole sequence, of which its first token counts. pooler: what it gets comes
    from there, and is the first token of what that gets where the head wants none of it."""

    leaf: str
    module: str
    first: bool = False
    pooler: str = ""


@dataclass(frozen=True)
class HeadFields:
    """A head of an adapter's own. seat: where it stands. bias: of its last layer. act: between its
    layers. pools: it gets what a pooler gives, where there is one."""

    seat: Seat
    labels: int
    layers: int = 1
    act: str | None = None
    bias: bool = True
    pools: bool = True


@dataclass(frozen=True)
class ReplacedFields:
    """What any PEFT kind may carry beside its own tensors.

    bias: "none", "all" or "lora_only": which biases of the base the file replaces.
    tokens: module suffix -> rows of its table that are replaced; "" is the input embedding.
    tie: what happens to the input embedding happens to a tied head as well.
    head: of several layers, in place of the base's.
    """

    bias: str = "none"
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tie: bool = False
    head: HeadFields | None = None

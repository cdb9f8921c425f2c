"""Recipes on a model: one name for several adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterkit.hub.compose import blocks
from adapterkit.hub.compose.blocks import Block
from adapterkit.hub.findings import clean
from adapterkit.hub.unfold import Unfolded
from adapterkit.registry.errors import DamagedError, InvalidError

# name in the file of a recipe -> what else the block takes. Not Fuse: a fusion names what it joins.
BLOCKS: dict[str, tuple[str, ...]] = {
    "Stack": (), "Parallel": (), "Split": ("splits",),
    "BatchSplit": ("batch_sizes",), "Average": ("weights", "normalize_weights"),
}  # fmt: skip
MAX_DEPTH = 8


@dataclass(frozen=True)
class Group:
    """members: names of attached adapters -> weights. block: how they are composed, if at all."""

    members: Mapping[str, float]
    block: Block | None = None


@dataclass
class Groups:
    """held: name of a recipe -> its members."""

    held: dict[str, Group] = field(default_factory=dict)

    @property
    def members(self) -> set[str]:
        return {member for group in self.held.values() for member in group.members}

    def of(self, name: str) -> list[str]:
        """The attached adapters that a name means."""
        return list(self.held[name].members) if name in self.held else [name]

    def shown(self, attached: Iterable[str]) -> list[str]:
        """Names as the user gave them: a recipe's instead of its parts'."""
        whose = {member: name for name, group in self.held.items() for member in group.members}
        return list(dict.fromkeys(whose.get(name, name) for name in attached))

    def meant(self, weights: Any, given: Mapping[str, float]) -> Any:
        """The same weights, or block, over attached adapters. given: the weights, parsed."""
        named = [name for name in given if name in self.held]
        if not named:
            return weights
        if isinstance(weights, Block):
            raise InvalidError(f"{clean(named[0])} is a recipe, which does not stand in a block")
        composed = [name for name in named if self.held[name].block is not None]
        if composed and {n: w for n, w in given.items() if w} != {composed[0]: 1.0}:
            raise InvalidError(
                f"{clean(composed[0])} composes its parts in blocks: it takes weight 1, alone"
            )
        if composed:
            return self.held[composed[0]].block
        found: dict[str, float] = {}
        for name, weight in given.items():
            group = self.held.get(name, Group({name: 1.0}))
            found |= {member: weight * own for member, own in group.members.items()}
        return found


def group_of(name: str, unfolded: Unfolded) -> Group:
    """Raises DamagedError if the composition is none."""
    members = {f"{name}[{i}]": leaf.weight for i, leaf in enumerate(unfolded.leaves)}
    if unfolded.composition is None:
        return Group(members)
    if set(members.values()) != {1.0}:
        raise DamagedError(f"{clean(name)} composes its parts in blocks, and gives them weights")
    return Group(members, _block(unfolded.composition, list(members), 0))


def _block(value: Mapping[str, Any], names: list[str], depth: int) -> Block:
    shown = clean(repr(value), 120)
    kind, children = value.get("block"), value.get("children")
    if not isinstance(kind, str) or kind not in BLOCKS or not isinstance(children, list):
        raise DamagedError(f"a recipe composes {shown}, expected a block of {', '.join(BLOCKS)}")
    settings = {key: item for key, item in value.items() if key not in ("block", "children")}
    if settings.keys() - set(BLOCKS[kind]) or depth > MAX_DEPTH:
        raise DamagedError(f"a recipe composes {shown}, with what {kind} does not take")
    inside = [_child(child, names, depth + 1) for child in children]
    try:
        made: Block = getattr(blocks, kind)(*inside, **settings)
    except TypeError as error:
        raise DamagedError(f"a recipe composes {shown}: {error}") from error
    return made


def _child(value: Any, names: list[str], depth: int) -> str | Block:
    if isinstance(value, dict):
        return _block(value, names, depth)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(names):
        raise DamagedError(
            f"a recipe composes part {clean(repr(value), 80)}, expected 0 to {len(names) - 1}"
        )
    return names[value]


def record(block: Block, numbers: Mapping[str, int]) -> dict[str, Any]:
    """The inverse: a block as a recipe holds it. numbers: name -> number of the part."""
    kind = type(block).__name__
    if kind not in BLOCKS:
        raise InvalidError(f"a recipe cannot hold {kind}, whose matrices name what they join")
    children = [
        record(child, numbers) if isinstance(child, Block) else numbers[child]
        for child in block.children
    ]
    found: dict[str, Any] = {"block": kind, "children": children}
    for setting in BLOCKS[kind]:
        value = False if setting == "normalize_weights" else getattr(block, setting)
        if value is not None:
            found[setting] = list(value) if isinstance(value, tuple) else value
    return found

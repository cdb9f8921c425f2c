"""Adapters composed as AdapterHub's library composes them: values that name adapters.

Which may stand inside which is the library's rule (adapters 1.3 `composition.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from adapterkit.hub.findings import clean
from adapterkit.registry.errors import InvalidError

DEEPEST = 2


class Block:
    """children: names of attached adapters, or blocks."""

    inside: ClassVar[tuple[str, ...]] = ()  # blocks that may stand in it

    def __init__(self, *children: str | Block) -> None:
        name = type(self).__name__
        if not children:
            raise InvalidError(f"{name}() composes nothing, expected names of adapters")
        odd = [repr(child) for child in children if not isinstance(child, str | Block)]
        if odd:
            raise InvalidError(f"{name} composes names and blocks, found {clean(', '.join(odd))}")
        self.children = children

    def __iter__(self) -> Iterator[str]:
        """The names of all adapters in it, in order."""
        for child in self.children:
            yield from (child,) if isinstance(child, str) else child

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join([*map(repr, self.children), *self._settings()])})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Block) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def _settings(self) -> list[str]:
        return []

    def blocks(self) -> Iterator[Block]:
        """It and all blocks in it."""
        yield self
        for child in self.children:
            if isinstance(child, Block):
                yield from child.blocks()


class Stack(Block):
    """One after the other."""

    inside = ("Fuse", "Split", "Parallel", "BatchSplit", "Average")


class Fuse(Block):
    """Attention over what they give, with the matrices of an attached fusion.

    name: of that fusion; None is the only one attached that joins these."""

    inside = ("Stack",)

    def __init__(self, *children: str | Block, name: str | None = None) -> None:
        super().__init__(*children)
        if name is not None and not isinstance(name, str):
            raise InvalidError(f"the name of a fusion is {name!r}, expected a string")
        self.name = name

    @property
    def joined(self) -> tuple[str, ...]:
        """The last adapter of each child: what a fusion is named by."""
        return tuple(list(c)[-1] if isinstance(c, Block) else c for c in self.children)

    def _settings(self) -> list[str]:
        return [] if self.name is None else [f"name={self.name!r}"]


class Parallel(Block):
    """Each on a copy of the whole batch: the output has the rows of all copies, in order."""

    inside = ("Stack", "BatchSplit", "Average")


class Split(Block):
    """Each on a part of the sequence. splits: tokens of each, or one number for all."""

    inside = ("Split", "Stack", "BatchSplit", "Average")

    def __init__(self, *children: str | Block, splits: Sequence[int] | int) -> None:
        super().__init__(*children)
        self.splits = _sizes(self, "splits", splits)

    def _settings(self) -> list[str]:
        return [f"splits={list(self.splits)}"]


class BatchSplit(Block):
    """Each on some rows of the batch. batch_sizes: rows of each, or one number for all."""

    inside = ("Stack", "Split", "BatchSplit", "Average")

    def __init__(self, *children: str | Block, batch_sizes: Sequence[int] | int) -> None:
        super().__init__(*children)
        self.batch_sizes = _sizes(self, "batch_sizes", batch_sizes)

    def _settings(self) -> list[str]:
        return [f"batch_sizes={list(self.batch_sizes)}"]


class Average(Block):
    """The weighted sum of what they give. weights: divided by their sum unless
    normalize_weights=False; all the same if None."""

    inside = ("Stack", "Split", "BatchSplit")

    def __init__(
        self,
        *children: str | Block,
        weights: Sequence[float] | None = None,
        normalize_weights: bool = True,
    ) -> None:
        from adapterkit.hub.compose.weighing import is_weight  # which brings torch

        super().__init__(*children)
        given = [1.0] * len(children) if weights is None else list(weights)
        if len(given) != len(children) or not all(map(is_weight, given)):
            raise InvalidError(f"weights are {weights!r}, expected {len(children)} finite numbers")
        total = sum(given) if normalize_weights or weights is None else 1.0
        if total == 0:
            about = f"weights are {weights!r}, whose sum is 0"
            raise InvalidError(about, hint="normalize_weights=False")
        self.weights = tuple(float(weight / total) for weight in given)

    def _settings(self) -> list[str]:
        return [f"weights={list(self.weights)}, normalize_weights=False"]


class Setup(dict[str, float]):
    """What is active: names in order -> weights. block: how they are composed; a plain mapping is
    all of them in order."""

    def __init__(self, weights: Mapping[str, float], block: Block | None = None) -> None:
        super().__init__(weights)
        self._block = block

    @property
    def block(self) -> Block | None:
        """None when nothing is active."""
        return self._block or (Stack(*self) if self else None)

    @property
    def is_composed(self) -> bool:
        return self._block is not None


def require_valid(block: Block, level: int = 0) -> None:
    """Raises InvalidError naming a block that stands where the library lets it not stand."""
    if level >= DEEPEST and not isinstance(block, Stack):
        raise InvalidError(f"{block!r} is nested too deep: only a Stack may stand at level {level}")
    name = type(block).__name__
    for child in block.children:
        if not isinstance(child, Block):
            continue
        if type(child).__name__ not in block.inside:
            raise InvalidError(
                f"{child!r} stands in a {name}, which takes names and {', '.join(block.inside)}"
            )
        if isinstance(block, BatchSplit) and isinstance(child, BatchSplit):
            rows = block.batch_sizes[block.children.index(child)]
            if sum(child.batch_sizes) != rows:
                raise InvalidError(f"{child!r} has {rows} rows of its {name}, not their sum")
        require_valid(child, level + 1)


def channels(block: Block) -> int:
    """Copies of the batch that a setup works on: children of its Parallel, 1 without.

    Raises InvalidError if two of them differ."""
    sizes = {len(each.children) for each in block.blocks() if isinstance(each, Parallel)}
    if len(sizes) > 1:
        raise InvalidError(f"{block!r} has Parallel blocks of {sorted(sizes)} children, not of one")
    return sizes.pop() if sizes else 1


def _sizes(block: Block, name: str, given: Sequence[int] | int) -> tuple[int, ...]:
    n = len(block.children)
    sizes = [given] * n if isinstance(given, int) else list(given)
    right = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
    if not right or len(sizes) != n:
        raise InvalidError(f"{name} is {given!r}, expected {n} positive integers")
    return tuple(sizes)

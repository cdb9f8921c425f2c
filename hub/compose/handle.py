"""Adapters on a live model: add, activate, route, detach. Its structure is never touched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload

from torch import nn

from adapterkit.hub.bases.base import Base
from adapterkit.hub.compose import weighing
from adapterkit.hub.compose.admit import Options
from adapterkit.hub.compose.blocks import Block, Setup
from adapterkit.hub.compose.demand import Counters
from adapterkit.hub.compose.engine import Engine, Ready, key_of
from adapterkit.hub.compose.fusions import joined_by, require_composed, require_unused
from adapterkit.hub.compose.here import Turn
from adapterkit.hub.compose.lowering import Bound, Lowered
from adapterkit.hub.compose.saving import recipe_of, write
from adapterkit.hub.compose.stock import Stock
from adapterkit.hub.findings import clean
from adapterkit.hub.locate import Source, locate
from adapterkit.hub.recipes import Recipe, is_recipe
from adapterkit.registry.errors import ConflictError, InvalidError

if TYPE_CHECKING:
    from adapterkit.hub.merge.fidelity import MergeReport
    from adapterkit.hub.merge.live import Merged

# The handle lies on the model itself: whoever drops the model drops its adapters.
HANDLE = "adapterkit_adapters"
Row = str | Mapping[str, float] | None


@dataclass(frozen=True)
class Report(Sequence[Bound]):
    """One adapter on the model. bound: a row for each tensor of its file; size: bytes it holds."""

    bound: tuple[Bound, ...]
    size: int

    @overload
    def __getitem__(self, index: int) -> Bound: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Bound, ...]: ...

    def __getitem__(self, index: int | slice) -> Bound | tuple[Bound, ...]:
        return self.bound[index]

    def __len__(self) -> int:
        return len(self.bound)


class Adapters:
    """The adapters attached to one model."""

    def __init__(self, model: nn.Module, base: Base, options: Options) -> None:
        self._model, self._base, self._options = model, base, options
        self._given = Setup({})  # as it was asked for, with the names of recipes
        self._engine = Engine(model, base, options)
        self._stock = Stock(model, base, options, self._engine)
        self._active = Setup({})
        self._turn = Turn()
        self._detached = False
        self._merged: Merged | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return self._stock.names

    @property
    def active(self) -> Mapping[str, float]:
        """Weights as last activated; names left out are 0."""
        return MappingProxyType(self._given)

    @property
    def report(self) -> Mapping[str, Report]:
        """For each adapter, every tensor of its file and what it was bound to, and its bytes; for a
        recipe, those of its parts."""
        return {name: self._report(self._stock.groups.of(name)) for name in self.names}

    def _report(self, names: Sequence[str]) -> Report:
        found = [self._stock.lowered[name] for name in names]
        bound = tuple(row for lowered in found for row in lowered.bound)
        return Report(bound, sum(lowered.size for lowered in found))

    @property
    def recipe(self) -> Recipe:
        """What is active, by the digests of versions. Raises InvalidError naming what came from a
        folder."""
        block = self._active.block if self._active.is_composed else None
        return recipe_of(self._active, self._stock.folders, block, self._options.dialect)

    def save(self, path: str | Path) -> Path:
        """Write the recipe into a new file, for `adapter add FILE NAME`."""
        return write(self.recipe, Path(path))

    @property
    def counters(self) -> Counters:
        """Of what was loaded on demand; all 0 without a budget."""
        demand = self._stock.demand
        if demand is None:
            return Counters()
        return replace(demand.counters, held=sum(demand.sizes.values()))

    def joined(self, name: str) -> tuple[str, ...]:
        """The adapters that the fusion of that name joins; () for any other adapter."""
        self._stock.require([name])
        return () if name in self._stock.groups.held else joined_by(self._stock.lowered[name])

    def add(self, name: str, source: Source) -> None:
        """Attaches one more, inactive; a recipe is all its parts under one name. Raises
        ConflictError if the name is taken, MismatchError with all findings if it does not fit; then
        nothing has changed."""
        self._require_attached()
        with self._turn:
            if self._stock.add(name, source):
                self._reactivate()

    def _reactivate(self) -> None:
        """What is active, made anew from where its factors lie now."""
        self._engine.switch(self._engine.ready(self._active, self._given, self._stock.lowered))

    def remove(self, name: str) -> None:
        """Forgets one; the others stay as active as they were. Raises ConflictError if the active
        composition names it, as what would be left of that is not said, or rows of a thread do."""
        with self._turn:
            self._stock.require([name])
            members = self._stock.groups.of(name)
            if any(map(self._stock.pinned, members)):
                raise ConflictError(f"{clean(name)} is what rows of a batch are routed to")
            if self._active.is_composed:
                for member in members:
                    require_unused(member, self._active, self._stock.lowered)
            else:
                self.activate({other: w for other, w in self._given.items() if other != name})
            self._stock.drop(name)

    def swap(self, name: str, source: Source) -> None:
        """Another adapter under the same name, at the same weight, and in the same memory if it is
        of the same shape. Raises as `add` and `remove` do; then nothing has changed."""
        self._require_attached()
        folder = locate(source, self._options.registry)
        with self._turn:
            self._stock.require([name])
            if name in self._stock.groups.held or is_recipe(folder):
                raise InvalidError(
                    f"{clean(name)} is swapped with one adapter for another, found a recipe",
                    hint="remove it, and add the other",
                )
            if self._stock.pinned(name):
                raise ConflictError(f"{clean(name)} is what rows of a batch are routed to")
            made = self._stock.lower(folder)
            self._require_ready(self._active, {**self._stock.lowered, name: made})
            self._stock.drop(name)
            self._stock.folders[name] = folder
            self._stock.keep({name: made})
            self._reactivate()

    def activate(self, weights: Mapping[str, float] | Sequence[str] | Block) -> None:
        """Makes the model the base plus sum of weight * adapter; names left out are 0.

        weights: finite numbers, negative ones subtract; a plain list of names means 1 each; a
        block (Stack, Fuse, ...) composes what acts in layers. That of a recipe multiplies those of
        its parts.
        """
        self._require_attached()
        self._prefetch([weights])
        with self._turn:
            ready = self._made(("weights", key_of(weights)), partial(self._ready, weights))
            self._engine.switch(ready)
            self._active, self._given = ready.setups[0], ready.given

    def _made(self, key: tuple[str, Any], make: Callable[[], Ready]) -> Ready:
        """What was made ready for the same before, or is now."""
        try:
            ready = self._engine.found(key)
        except TypeError:  # a value that nothing can be looked up by
            return make()
        if ready is not None:
            if self._stock.demand is not None:
                self._stock.demand.named(ready.names)
            return ready
        ready = make()
        if key[1] is not None:
            self._engine.hold(key, ready)
        return ready

    def _ready(self, weights: Mapping[str, float] | Sequence[str] | Block) -> Ready:
        asked = weighing.parse(weights)
        self._summon(asked)
        self._stock.require(asked)
        active = self._setup(weights, asked)
        given = Setup({name: weight for name, weight in asked.items() if weight})
        return self._engine.ready(active, given, self._stock.lowered)

    def _prefetch(self, rows: Iterable[Any]) -> None:
        """Reads what is not here, while other threads go on."""
        if self._stock.demand is not None:
            named = ((row,) if isinstance(row, str) else row or () for row in rows)
            self._stock.prefetch({name for row in named for name in row if isinstance(name, str)})

    def _summon(self, names: Collection[str]) -> None:
        if self._stock.summon(names, self._active):
            self._reactivate()

    def _setup(
        self, weights: Mapping[str, float] | Sequence[str] | Block, asked: Mapping[str, float]
    ) -> Setup:
        """Weights over attached adapters, once nothing speaks against them."""
        meant = self._stock.groups.meant(weights, asked)
        active = weighing.setup(meant, weighing.parse(meant))
        self._require_ready(active, self._stock.lowered)
        return active

    def _require_ready(self, active: Setup, lowered: Mapping[str, Lowered]) -> None:
        weighing.require_usable(active, lowered, self._options.dialect)
        weighing.require_whole(active, lowered, self._stock.own_heads)
        require_composed(active, lowered)

    @contextmanager
    def routed(self, rows: Sequence[Row]) -> Iterator[None]:
        """Within it, and in this thread, each row of the batch has its own adapters: a name, names
        with weights, or None for the base. What is active otherwise does not count meanwhile.

        Under beam search rows are those given to generate(). Raises InvalidError for a batch of
        other rows, and naming a module where it cannot be told which row is which.
        """
        self._require_attached()
        self._prefetch(rows)
        with self._turn:
            ready = self._made(("rows", key_of(rows)), partial(self._routes, rows))
            self._stock.pin(ready.names)
        try:
            with self._engine.bound(ready):
                yield
        finally:
            with self._turn:
                self._stock.unpin(ready.names)

    def _routes(self, rows: Sequence[Row]) -> Ready:
        if isinstance(rows, str | Mapping) or not rows:
            raise InvalidError(f"rows are {rows!r}, expected one entry for each row of the batch")
        asked = [
            weighing.parse({} if row is None else [row] if isinstance(row, str) else row)
            for row in rows
        ]
        every = dict.fromkeys(name for row in asked for name in row)
        self._summon(every)
        self._stock.require(every)
        setups: dict[tuple[tuple[str, float], ...], Setup] = {}
        of: list[int] = []
        for row in asked:
            key = tuple(row.items())
            if key not in setups:
                setups[key] = self._setup(row, row)
                if setups[key].is_composed:
                    raise InvalidError(f"rows are routed to sums of adapters, found {row!r}")
            of.append(list(setups).index(key))
        return self._engine.by_rows(list(setups.values()), of, self._stock.lowered)

    def merge_(self, undo: str | None = "auto", *, min_gain: float = 0.5) -> MergeReport:
        """Puts what is active into the weights of the model; nothing is active afterwards.

        undo: how `unmerge_` gets the base back: "source" from the files of the base, "memory" or
        "disk" from a copy, None not at all; "auto": source where the files have these very
        weights, else memory. Raises AdapterError if less than `min_gain` would survive in a
        quantized weight, InvalidError for what no weight equals; then nothing has changed.
        """
        from adapterkit.hub.merge.live import merged

        self._require_attached()
        if self._active.is_composed or not self._active:
            raise InvalidError("what is merged is a sum of adapters, and none is active")
        active = dict(self._active)
        given = dict(self._given)
        folders = {name: (self._stock.folders[name], weight) for name, weight in active.items()}
        self.activate([])
        try:
            self._merged = merged(
                self._model, self._base, folders, undo,
                min_gain=min_gain, peft=self._options.dialect == "peft",
            )  # fmt: skip
        except BaseException:
            self.activate(given)
            raise
        return self._merged.report

    def unmerge_(self) -> None:
        """The base's weights again, bit for bit; nothing is active. Raises ConflictError if
        nothing is merged, or nothing was kept of them."""
        if self._merged is None:
            raise ConflictError("nothing is merged")
        self._merged.unmerge()
        self._merged = None

    def detach(self) -> None:
        """The base again, bit for bit; this object is empty afterwards. A merge without undo
        stays."""
        if self._merged is not None and not self._merged.is_final:
            self.unmerge_()
        self._engine.remove()
        self._stock.clear()
        self._active = self._given = Setup({})
        if vars(self._model).get(HANDLE) is self:
            del vars(self._model)[HANDLE]
        self._detached = True

    def __enter__(self) -> Adapters:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"<Adapters {', '.join(f'{n}={self._given.get(n, 0.0):g}' for n in self.names)}>"

    def _require_attached(self) -> None:
        if self._merged is not None:
            hint = "attach anew" if self._merged.is_final else "unmerge_() first"
            raise ConflictError("adapters are merged into the weights", hint=hint)
        if self._detached:
            raise ConflictError("these adapters were detached", hint="attach to the model again")

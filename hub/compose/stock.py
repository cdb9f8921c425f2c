"""The adapters that are on a model, lowered; those that are named on demand come and go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from adapterkit.hub.bases.base import Base
from adapterkit.hub.compose import weighing
from adapterkit.hub.compose.admit import Options, admit
from adapterkit.hub.compose.alike import Alike
from adapterkit.hub.compose.demand import Demand, bytes_of
from adapterkit.hub.compose.engine import Engine
from adapterkit.hub.compose.groups import Groups, group_of
from adapterkit.hub.compose.here import lasting
from adapterkit.hub.compose.lowering import Lowered, lower
from adapterkit.hub.compose.origin import Origin
from adapterkit.hub.findings import clean
from adapterkit.hub.locate import Source, locate
from adapterkit.hub.recipes import is_recipe
from adapterkit.hub.sources import Folder
from adapterkit.hub.unfold import unfold
from adapterkit.registry.errors import ConflictError, InvalidError, NotFoundError


class Stock:
    """lowered, folders: name -> adapter; groups: recipes. own_heads: modules that only adapters
    have, random until one is active."""

    def __init__(self, model: nn.Module, base: Base, options: Options, engine: Engine) -> None:
        self._base, self._options, self._engine = base, options, engine
        self._modules = dict(model.named_modules())
        self._origin = Origin(base.name)
        self._alike = Alike()
        self._pins: Counter[str] = Counter()
        self.lowered: dict[str, Lowered] = {}
        self.folders: dict[str, Folder] = {}
        self.groups = Groups()
        self.own_heads: set[str] = set()
        self.demand = None if options.budget is None else Demand(bytes_of(options.budget))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.groups.shown(self.lowered))

    def require(self, names: Collection[str]) -> None:
        known = self.names
        unknown = [clean(str(name)) for name in names if name not in known]
        if unknown:
            held = ", ".join(known) or "nothing"
            raise NotFoundError(f"no adapter is attached as {', '.join(unknown)}; attached: {held}")

    def add(self, name: str, source: Source) -> bool:
        """Lowers all of it before any is kept. Whether others were moved."""
        folder = locate(source, self._options.registry)
        if not is_recipe(folder):
            return self._add([name], [folder])
        unfolded = unfold(folder, self._options.registry)
        if unfolded.dialect != self._options.dialect:
            raise InvalidError(
                f"{clean(name)} is a recipe in the dialect {unfolded.dialect}",
                hint=f"attach(..., dialect={unfolded.dialect!r})",
            )
        group = group_of(name, unfolded)
        leaves = [leaf.folder for leaf in unfolded.leaves]
        moved = self._add([name, *group.members], [None, *leaves])
        self.groups.held[name] = group
        return moved

    def _add(self, names: Sequence[str], folders: Sequence[Folder | None]) -> bool:
        """folders: None for a name of several."""
        taken = [clean(n) for n in names if n in self.lowered or n in self.groups.held]
        if taken:
            raise ConflictError(f"an adapter is attached as {', '.join(taken)} already")
        pairs = [(n, f) for n, f in zip(names, folders, strict=True) if f is not None]
        made = {name: self.lower(folder) for name, folder in pairs}
        self.folders |= dict(pairs)
        return self.keep(made)

    @lasting()
    def lower(self, folder: Folder) -> Lowered:
        adapter = admit(folder, self._base, self._modules, self._options, self._alike)
        lowered = lower(adapter, self._base, self._modules, self._options.dtype)
        heads = weighing.whole_modules(lowered)
        self.own_heads |= {head for head in heads if not self._origin.brings(head)}
        return lowered

    @lasting()
    def keep(self, made: Mapping[str, Lowered]) -> bool:
        """Into the banks, beside those that are there. Whether one had to grow, so that all were
        moved and whatever looks at them has to be made anew."""
        moved = False
        banks = self._engine.updates.banks
        for name, lowered in made.items():
            self.lowered[name], grew = banks.keep(lowered)
            moved |= grew
        if moved:
            for name, lowered in self.lowered.items():
                self._engine.updates.forget(lowered)
                self.lowered[name] = banks.moved(lowered)
            self._engine.forget()
        return moved

    def drop(self, name: str) -> None:
        """With the parts of a recipe."""
        self._engine.forget()
        for member in self.groups.of(name):
            self._engine.free(self.lowered.pop(member))
            del self.folders[member]
        self.groups.held.pop(name, None)
        if self.demand is not None:
            self.demand.sizes.pop(name, None)

    def clear(self) -> None:
        self.lowered.clear()
        if self.demand is not None:
            self.demand.stop()

    def pinned(self, name: str) -> bool:
        """Whether rows of some thread have it."""
        return self._pins[name] > 0

    def pin(self, names: Iterable[str]) -> None:
        """Nothing of these makes room for others, until they are unpinned as often."""
        self._pins.update(names)

    def unpin(self, names: Iterable[str]) -> None:
        self._pins.subtract(names)

    def prefetch(self, names: set[str]) -> None:
        """Reads those that are not here, whatever else goes on; `summon` then has them at once."""
        missing = names - {*self.names}
        if self.demand is not None and missing:
            self.demand.made(missing, self._fetched, self.lowered)

    def summon(self, names: Collection[str], active: Collection[str]) -> bool:
        """Loads those that are not here, if there is a budget for it; active: not to be evicted.
        Whether others were moved."""
        if self.demand is None:
            return False
        known = {*self.names}
        self.demand.named(name for name in names if name in known)
        missing = [str(name) for name in names if name not in known]
        if not missing:
            return False
        try:
            made = self.demand.made(missing, self._fetched, self.lowered)
            return self._take(self.demand, made, {*names, *active})
        finally:  # once they are held, so that no thread finds them neither made nor held
            self.demand.forget(missing)

    def _take(
        self, demand: Demand, new: Mapping[str, tuple[Folder, Lowered]], used: Collection[str]
    ) -> bool:
        """Makes room and keeps them. Whether others were moved."""
        sizes = {name: lowered.size for name, (_, lowered) in new.items()}
        fixed = sum(o.size for n, o in self.lowered.items() if n not in demand.sizes)
        kept = {*used, *(name for name, count in self._pins.items() if count > 0)}
        for gone in [*demand.room_for(sizes, kept, fixed)]:
            self.drop(gone)
            demand.evicted()
        self.folders |= {name: folder for name, (folder, _) in new.items()}
        # room for as many of them as the budget has, so that no bank grows beyond it
        self._engine.updates.banks.reserve(demand.budget // max(1, *sizes.values()))
        moved = self.keep({name: lowered for name, (_, lowered) in new.items()})
        for name in new:
            demand.loaded(name, sizes[name])
        return moved

    def _fetched(self, name: str) -> tuple[Folder, Lowered]:
        folder = locate(name, self._options.registry)
        if is_recipe(folder):
            raise InvalidError(f"{clean(name)} is a recipe, which is not loaded on demand: add it")
        return folder, self.lower(folder)

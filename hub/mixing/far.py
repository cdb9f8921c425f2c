"""The modules of a blend, each a task of an executor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from adapterkit.hub.formats.peft_write import is_replacing
from adapterkit.hub.mixing.inputs import Input, Place
from adapterkit.hub.mixing.options import Options
from adapterkit.hub.mixing.run import Found, Mix
from adapterkit.hub.sources import Folder
from adapterkit.hub.tensors import Unread
from adapterkit.hub.workers import Crew, Task, unbroken

if TYPE_CHECKING:
    from torch import Tensor


class FarInput(Input):
    """An adapter whose tensors are read one by one, and only those of the module at hand."""

    @classmethod
    def of(cls, one: Input) -> FarInput:
        ground = replace(one.ground)  # what it has read stays here
        folder = Folder(one.folder.name, {})
        return cls(one.name, one.weight, folder, ground, one.root, one.given, one.index)

    @cached_property
    def _own(self) -> Mapping[Place, Tensor]:
        return Widened(self)


class Widened(Unread):
    """Those that are of the kind itself, in the precision of `Input.tensors`."""

    def __init__(self, one: Input) -> None:
        super().__init__({p: t for p, t in one.adapter.tensors.items() if _is_own(p[1])})
        self._is_plain = one.is_plain

    def __getitem__(self, place: Place) -> Tensor:
        found = super().__getitem__(place)
        return found if self._is_plain else found.double()


def _is_own(role: str) -> bool:
    return not is_replacing(role) and not role.startswith("wrapper.")


@dataclass(frozen=True, eq=False)
class Mixing:
    """Blends one module at a time."""

    mix: Mix

    def __call__(self, module: str) -> Found:
        return self.mix.run([module])


def run(
    inputs: Sequence[Input], chosen: Options, modules: Sequence[str], executor: Executor
) -> Found:
    """As `Mix.run` does."""
    roles = {role for one in inputs for _, role in one.tensors}  # reads, and so checks, all
    worker = Mixing(Mix([FarInput.of(one) for one in inputs], chosen))
    held = [one.adapter.modules for one in inputs]
    tasks = []
    for module in modules:
        reads = [
            stored
            for each in held
            for role, stored in each.get(module, {}).items()
            if role in roles and _is_own(role)
        ]
        # what is made is about as large, in a wider dtype
        tasks.append(Task(module, reads, 3 * sum(stored.size for stored in reads)))
    found = Found()
    with unbroken("blend again"):
        for part in Crew(executor, worker).results(tasks):
            found.add(part)
    return found

"""Jobs that are done by an executor, and written here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from torch import Tensor

from adapterkit.hub.bases.packed import constants_of
from adapterkit.hub.blend.factors import Factors
from adapterkit.hub.headers import Stored
from adapterkit.hub.merge.fidelity import Fidelity
from adapterkit.hub.merge.jobs import COPY, PACK, Job, Output, is_stored_packed
from adapterkit.hub.merge.lowering import Input, Lowering
from adapterkit.hub.merge.making import Maker
from adapterkit.hub.merge.planning import Plan
from adapterkit.hub.merge.shard import Sink, Spec, as_bytes
from adapterkit.hub.tensors import Unread
from adapterkit.hub.workers import Crew, Task


@dataclass(frozen=True)
class Made:
    """tensors: of the file, in order. row: what became of the adapters in them. factors: of the
    correction, by module."""

    tensors: Sequence[tuple[Spec, bytes]]
    row: Fidelity | None
    factors: Mapping[str, Factors]


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.tensors: list[tuple[Spec, bytes]] = []
        self.factors: dict[str, Factors] = {}

    def add(self, spec: Spec, blocks: Iterable[memoryview]) -> None:
        self.tensors.append((spec, b"".join(blocks)))

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        self.add(Spec.of(name, tensor), [as_bytes(tensor)])

    def add_factors(self, row: str, factors: Factors) -> None:
        self.factors[row] = factors


@dataclass(frozen=True, eq=False)
class Making:
    """Does one job at a time. written: whether its tensors are wanted too."""

    maker: Maker
    written: bool

    def __call__(self, job: Job) -> Made:
        sink = Kept()
        row = self.maker.run(job, sink if self.written else None)
        return Made(sink.tensors, row, sink.factors)


class FarMaker:
    """A maker that has an executor do what takes long. there: what does it; jobs: all that this one
    will be told to run, in that order."""

    def __init__(
        self, near: Maker, there: Maker, jobs: Sequence[Job], executor: Executor, *, written: bool
    ) -> None:
        self._near, self._output = near, near.output
        held = [_by_module(one) for one in self._output.lowering.inputs]
        far = [job for job in jobs if is_far(job, self._output)]
        tasks = [_task(job, self._output, held) for job in far]
        self._results: Iterator[Made] = Crew(executor, Making(there, written)).results(tasks)

    def run(self, job: Job, writer: Sink | None) -> Fidelity | None:
        """As `Maker.run`."""
        if not is_far(job, self._output):
            return self._near.run(job, writer)
        made = next(self._results)
        if writer is not None:
            for spec, data in made.tensors:
                writer.add(spec, [memoryview(data)])
            for row, factors in made.factors.items():
                writer.add_factors(row, factors)
        return made.row


AnyMaker = Maker | FarMaker


def maker_of(
    plan: Plan, executor: Executor | None = None, jobs: Sequence[Job] = (), *, written: bool = True
) -> AnyMaker:
    """jobs: all that it will run, where an executor does. written: whether into files."""
    peft = plan.options.dialect == "peft"
    near = Maker(plan.output, peft=peft)
    if executor is None:
        return near
    there = Maker(_unread(plan.output), peft=peft)
    return FarMaker(near, there, jobs, executor, written=written)


def is_far(job: Job, output: Output) -> bool:
    """Whether anything is computed that is worth sending."""
    if job.form == COPY or job.place is None or job.source is None:
        return False
    if job.place.parameter == "bias":
        return False
    changes = output.is_touched(job.place) or output.is_requantized(job.place)
    return job.form == PACK or changes or is_stored_packed(output.base.tensors, job.source)


def _unread(output: Output) -> Output:
    """The same without any values: those are read where they are needed."""
    inputs = [_unread_input(one) for one in output.lowering.inputs]
    return replace(output, lowering=Lowering(output.base, inputs))


def _unread_input(one: Input) -> Input:
    ground = replace(one.ground)  # what it has read stays here
    stored = {place: ground.adapter.tensors[place] for place in one.tensors}
    return replace(one, ground=ground, tensors=Unread(stored))


def _by_module(one: Input) -> dict[str, list[Stored]]:
    found: dict[str, list[Stored]] = {}
    for (module, _), stored in one.ground.adapter.tensors.items():
        found.setdefault(module, []).append(stored)
    return found


def _task(job: Job, output: Output, held: Sequence[Mapping[str, Sequence[Stored]]]) -> Task:
    base, source = output.base.tensors, job.source or ""
    row = "" if job.place is None else job.place.row
    reads = [base[key] for key in (source, *constants_of(base, source))]
    for one, by_module in zip(output.lowering.inputs, held, strict=True):
        reads += [t for module in one.sources.get(row, ()) for t in by_module[module]]
    size = sum(stored.size for stored in reads) + sum(spec.size for spec in output.specs(job))
    return Task(job, reads, size)

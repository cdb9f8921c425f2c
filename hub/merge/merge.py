"""Adapters into the weights of a base on disk: file by file, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterkit.hub.bases.folder import CONFIG
from adapterkit.hub.bases.weights import INDEX
from adapterkit.hub.merge import beside, carried
from adapterkit.hub.merge.beside import FOLDER
from adapterkit.hub.merge.far import AnyMaker, maker_of
from adapterkit.hub.merge.fidelity import Fidelity, MergeReport, guarded
from adapterkit.hub.merge.given import Adapters
from adapterkit.hub.merge.jobs import PACK, Job
from adapterkit.hub.merge.options import Options
from adapterkit.hub.merge.planning import Plan, plan
from adapterkit.hub.merge.rival import compared
from adapterkit.hub.merge.shard import shard_writer
from adapterkit.hub.merge.stage import Done, Stage, staged
from adapterkit.hub.reduce import single_thread
from adapterkit.hub.settings import refined
from adapterkit.hub.workers import unbroken
from adapterkit.registry.errors import InvalidError
from adapterkit.registry.files import Files

# Told of bytes of the base that were gone through.
Progress = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Task:
    """One file of the merged model: it depends on no other, and can be done anywhere, in any
    order, more than once."""

    plan: Plan
    file: str
    jobs: Sequence[Job]

    def run(
        self, folder: Path, progress: Progress | None = None, maker: AnyMaker | None = None
    ) -> Done:
        """Writes the file into the folder."""
        files, path = Files(), folder / self.file
        output = self.plan.output
        packs = output.base.quantization.method != "none"
        packs = packs or any(job.form == PACK for job in self.jobs)
        specs = (spec for job in self.jobs for spec in output.specs(job))
        rows = []
        maker = maker or maker_of(self.plan)
        with shard_writer(files, path, specs, packs=packs) as writer:
            for job in self.jobs:
                rows.append(maker.run(job, writer))
                self._tell(job, progress)
            written = writer.finish()
        digest, rank = "", output.correction_rank
        if writer.factors and rank is not None:
            digest = beside.keep(files, folder.parent / FOLDER / self.file, writer.factors, rank)
        return Done(self.file, written, tuple(row for row in rows if row is not None), digest)

    def measured(self, progress: Progress | None, maker: AnyMaker) -> list[Fidelity]:
        """What writing it would do to the adapters."""
        found = []
        for job in self.jobs:
            if self.plan.output.is_touched(job.place):
                found.append(maker.run(job, None))
            self._tell(job, progress)
        return [row for row in found if row is not None]

    def _tell(self, job: Job, progress: Progress | None) -> None:
        if progress is not None and job.source is not None:
            progress(self.plan.output.base.tensors[job.source].size)


def merge(  # noqa: PLR0913
    adapters: Adapters,
    *,
    base: str | Path,
    out: str | Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    executor: Executor | None = None,
    options: Options | None = None,
    **settings: Any,
) -> MergeReport:
    """The base with adapters in its weights, as a folder that transformers loads.

    adapters: references or folders -> weights, negative ones subtract; a list means 1 each.
    base: a model folder, or a Hub id in the local cache. out: a new or empty folder; it appears at
    once, when everything is in it. resume: go on where a merge into `out` was interrupted.
    dry_run: nothing is written, and the report is the same. executor: what computes, on this
    machine or on many; None: this thread. settings: the fields of Options.
    Raises MismatchError with all findings if an adapter does not belong to the base, InvalidError
    for what no weight carries, AdapterError below `min_gain`, ConflictError if `out` is taken.
    """
    chosen = refined(options or Options(), settings)
    if out is None and not dry_run:
        raise InvalidError("there is no folder to merge into", hint="give out=, or dry_run=True")
    hint = "merge again" if dry_run else "merge again, and go on with what is finished: --resume"
    with single_thread(), unbroken(hint):
        made = plan(adapters, base, chosen)
        if dry_run or out is None:
            return _measured(made, progress, executor)
        return _written(made, Path(out), resume, progress, executor)


def _measured(made: Plan, progress: Progress | None, executor: Executor | None) -> MergeReport:
    tasks = [Task(made, file, jobs) for file, jobs in made.shards.items()]
    touched = [j for task in tasks for j in task.jobs if made.output.is_touched(j.place)]
    maker = maker_of(made, executor, touched, written=False)
    rows = [row for task in tasks for row in task.measured(progress, maker)]
    return guarded(_report(made, None, rows, 0), made.options.min_gain, stop=False)


def _written(
    made: Plan, out: Path, resume: bool, progress: Progress | None, executor: Executor | None
) -> MergeReport:
    tasks = [Task(made, file, jobs) for file, jobs in made.shards.items()]
    with staged(Files(), out, made.identity, resume=resume) as stage:
        left = [task for task in tasks if task.file not in stage.done]
        maker = maker_of(made, executor, [job for task in left for job in task.jobs])
        for task in left:
            stage.finished(task.run(stage.folder, progress, maker))
        every = [stage.done[task.file] for task in tasks]
        rows = [row for done in every for row in done.parameters]
        size = sum(done.written.size for done in every)
        report = guarded(_report(made, out, rows, size), made.options.min_gain, stop=True)
        _finish(made, stage, report)
    return report


def _report(made: Plan, folder: Path | None, rows: Sequence[Fidelity], size: int) -> MergeReport:
    return MergeReport(
        folder,
        tuple(rows),
        made.onto.word,
        made.onto.why,
        made.quantization,
        made.recipe,
        tuple(one.key for one in made.output.added),
        made.untied,
        size,
        compared(rows, made.options.correction_rank),
    )


def _finish(made: Plan, stage: Stage, report: MergeReport) -> None:
    """The files beside the weights."""
    files, folder = stage.files, stage.folder
    carried.copy(files, carried.carried(made.place), folder)
    carried.write(files, folder / CONFIG, carried.text(made.config))
    names = sorted(made.shards)
    if carried.needs_index(names):
        where = {key: one.file for one in stage.done.values() for key in one.written.names}
        total = sum(one.written.size - one.written.header for one in stage.done.values())
        carried.write(files, folder / INDEX, carried.index(where, total))
    record = {"recipe": dict(report.recipe), "fidelity": report.total.record()}
    if report.correction is not None:
        parts = [stage.correction(name) for name, one in stage.done.items() if one.correction]
        digests = beside.write(files, made, parts, folder, stage.target)
        record["correction"] = {**report.correction.record(), "files": digests}
    carried.write(files, folder / carried.RECORD, carried.text(record))

"""Blends and merges done elsewhere: whatever computes, the bytes are those of one thread here."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import pytest
from click.testing import CliRunner
from distributed import Client, LocalCluster

from adapterkit.cli.main import main
from adapterkit.hub import blend, merge, parcels, workers
from adapterkit.hub.cluster import cluster
from adapterkit.registry.errors import (
    AdapterError,
    DamagedError,
    InvalidError,
    RemoteError,
    UnreachableError,
)

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
# A file of tests is on no worker's path.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
Digests = dict[str, str]
Work = Callable[[Executor | None], Digests]


def digests(files: dict[str, bytes]) -> Digests:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


@pytest.fixture(scope="module")
def works(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Work]:
    """What an executor is given to do -> the digests of the files that it makes."""
    a, b, d, dora = (fixtures / f"adapters/llama_{name}" for name in ("A", "B", "D", "dora"))
    bases = fixtures / "bases"
    mixtral = bases / "mixtral"

    def blended(weights: dict[Path, float], **settings: Any) -> Work:
        return lambda executor: digests(dict(blend(weights, executor=executor, **settings).files))

    def merged(weights: dict[Path, float], **settings: Any) -> Work:
        def work(executor: Executor | None) -> Digests:
            out = tmp_path_factory.mktemp("merged") / "out"
            made = merge(weights, out=out, executor=executor, **settings)
            measured = merge(weights, dry_run=True, executor=executor, **settings)
            assert measured.parameters == made.parameters
            return digests({path.name: path.read_bytes() for path in out.iterdir()})

        return work

    return {
        "sum": blended({a: 0.7, d: -0.4}),
        "ties and svd": blended({a: 0.7, b: 0.3}, method="ties", rank=4),
        "DoRA": blended({dora: 0.6, a: -0.5}, base=bases / "llama"),
        "DoRA on nf4": blended({dora: 0.6}, base=bases / "llama_nf4_double", rank=8),
        "MoSLoRA": blended({fixtures / "cases/llama.moslora_v10/adapter": 0.5, a: 1.0}),
        "bf16": merged({a: 0.7, b: 0.3}, base=bases / "llama_sharded", dtype="bfloat16"),
        "DoRA into bf16": merged({dora: 0.6}, base=bases / "llama", dtype="bfloat16"),
        "nf4": merged({a: 1.0}, base=bases / "llama", quantize="nf4", min_gain=0),
        "nf4 again": merged({dora: 1.0}, base=bases / "llama_nf4_double", min_gain=0),
        "onto nf4": merged({a: 1.0}, base=bases / "llama", trained_on="nf4", onto="dequantized"),
        "int8": merged({a: 1.0}, base=bases / "llama", quantize="int8", min_gain=0),
        "shared": merged({fixtures / "cases/gpt2.vera/adapter": 0.5}, base=bases / "gpt2"),
        "a pickle": merged({fixtures / "cases/llama.lora_bin/adapter": 0.5}, base=bases / "llama"),
        "experts": merged({fixtures / "cases/mixtral.lora_router/adapter": 1.0}, base=mixtral),
    }


ALL = (
    "sum", "ties and svd", "DoRA", "DoRA on nf4", "MoSLoRA", "bf16", "DoRA into bf16", "nf4",
    "nf4 again", "onto nf4", "int8", "shared", "a pickle", "experts",
)  # fmt: skip


class Relayed(Executor):
    """Hands on what it is given, each parcel changed on the way."""

    def __init__(self, executor: Executor, change: Callable[[Any], Any] = lambda one: one) -> None:
        self._executor, self._change = executor, change
        self.sent: list[parcels.Parcel] = []

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        (parcel,) = arguments
        self.sent.append(parcel)
        return self._executor.submit(function, self._change(parcel))


def without_paths(parcel: parcels.Parcel) -> parcels.Parcel:
    """As on a machine that does not have the files."""
    nowhere = Path("/nowhere/at/all")
    ranges = [replace(one, path=one.path and nowhere) for one in parcel.ranges]
    return replace(parcel, ranges=ranges)


@pytest.fixture
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(3) as pool:
        yield pool


@pytest.mark.parametrize("name", ALL)
def test_threads_make_the_same_bytes(works: dict[str, Work], name: str, threads: Executor):
    assert works[name](threads) == works[name](None)


@pytest.mark.parametrize("name", ALL)
def test_large_files_are_read_where_they_are_seen_and_sent_where_they_are_not(
    works: dict[str, Work], name: str, threads: Executor, monkeypatch: pytest.MonkeyPatch
):
    expected = works[name](None)
    monkeypatch.setattr(workers, "SMALL", 0)
    seen = Relayed(threads)
    assert works[name](seen) == expected
    assert not any(one.data for parcel in seen.sent for one in parcel.ranges)
    unseen = Relayed(threads, without_paths)
    assert works[name](unseen) == expected
    assert any(one.data for parcel in unseen.sent for one in parcel.ranges)


def test_a_file_of_that_name_with_other_bytes_is_not_taken_for_it(
    works: dict[str, Work], fixtures: Path, threads: Executor, monkeypatch: pytest.MonkeyPatch
):
    other = fixtures / "bases/llama_reseed/model.safetensors"

    def mistaken(parcel: parcels.Parcel) -> parcels.Parcel:
        ranges = [
            replace(one, path=one.path and other, size=other.stat().st_size)
            for one in parcel.ranges
        ]
        return replace(parcel, ranges=ranges)

    expected = works["bf16"](None)
    monkeypatch.setattr(workers, "SMALL", 0)
    assert works["bf16"](Relayed(threads, mistaken)) == expected


@pytest.fixture(scope="module")
def forked() -> Any:
    """New processes are forked from one that has imported everything, once, and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["distributed", "bitsandbytes", "adapterkit.hub.merge.far", "adapterkit.hub.mixing.far"]
    )
    forkserver.ensure_running()
    return context


def test_processes_make_the_same_bytes(works: dict[str, Work], forked: Any):
    with ProcessPoolExecutor(1, mp_context=forked) as pool:
        for name in ("ties and svd", "bf16"):
            assert works[name](pool) == works[name](None)


@contextmanager
def started(folder: Path, count: int) -> Iterator[str]:
    """The address of a cluster of as many processes, each in a folder of its own."""
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        LocalCluster(
            n_workers=count, threads_per_worker=1, local_directory=str(folder),
            dashboard_address=":0", silence_logs=50,
        ) as found,
    ):  # fmt: skip
        yield found.scheduler_address


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, forked: Any) -> Iterator[str]:
    with started(tmp_path_factory.mktemp("cluster"), 2) as address:
        yield address


def test_machines_make_the_same_bytes(machines: str, works: dict[str, Work]):
    with cluster(machines) as executor:
        for name in ("sum", "ties and svd", "bf16", "nf4"):
            assert works[name](Relayed(executor, without_paths)) == works[name](None)


def dying(flag: str, function: Any, parcel: Any) -> Any:
    """The first time, it takes its machine with it."""
    try:
        Path(flag).touch(exist_ok=False)
    except FileExistsError:
        return function(parcel)
    return os.kill(os.getpid(), signal.SIGKILL)


class ByValue:
    """A function of this file, for machines that have no such file."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._data = cloudpickle.dumps(function)

    def __reduce__(self) -> tuple[Any, ...]:
        return cloudpickle.loads, (self._data,)

    def __call__(self, *arguments: Any) -> Any:
        return cloudpickle.loads(self._data)(*arguments)


class Dying(Relayed):
    """The third parcel kills who works on it, once."""

    def __init__(self, executor: Executor, flag: Path) -> None:
        super().__init__(executor)
        self._flag = flag

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        if len(self.sent) != 2:
            return super().submit(function, *arguments)
        self.sent.append(arguments[0])
        return self._executor.submit(ByValue(dying), str(self._flag), function, *arguments)


def test_a_machine_that_dies_midway_changes_nothing(
    forked: Any, works: dict[str, Work], tmp_path: Path
):
    """Two die of three, whether or not others take their place."""
    with started(tmp_path / "cluster", 3) as address, cluster(address) as executor:
        for name in ("ties and svd", "bf16"):
            flag = tmp_path / name
            assert works[name](Dying(executor, flag)) == works[name](None)
            assert flag.exists()


def test_the_command_line_takes_the_address_of_a_cluster(
    machines: str, fixtures: Path, tmp_path: Path
):
    adapter = str(fixtures / "adapters/llama_A")
    places = [tmp_path / "here", tmp_path / "there"]
    for place, options in zip(places, ([], ["--cluster", machines]), strict=True):
        done = CliRunner().invoke(main, ["blend", f"{adapter}=0.5", "-o", str(place), *options])
        assert done.exit_code == 0, done.output
    here, there = ({p.name: p.read_bytes() for p in place.iterdir()} for place in places)
    assert here == there


def test_a_cluster_without_workers_is_said_so(
    forked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its tasks would wait without end."""
    monkeypatch.setattr("adapterkit.hub.cluster.WAIT", 1)
    with (
        started(tmp_path, 0) as address,
        pytest.raises(UnreachableError, match="has no workers after 1 seconds"),
        cluster(address),
    ):
        pass


def hidden() -> None:
    sys.modules["adapterkit.hub.parcels"] = None  # type: ignore[assignment]


def test_a_machine_without_the_program_is_said_so(forked: Any, tmp_path: Path):
    """It would drop out with each task that it cannot read."""
    with started(tmp_path, 1) as address, Client(address) as client:
        client.run(ByValue(hidden))
        with pytest.raises(RemoteError, match="has no adapterkit"), cluster(address):
            pass


def test_no_cluster_is_said_so():
    with pytest.raises(InvalidError, match="no address"), cluster("localhost:1"):
        pass
    with (
        dask.config.set({"distributed.comm.timeouts.connect": 0.2}),
        pytest.raises(UnreachableError, match="no cluster answers at tcp://127.0.0.1:9"),
        cluster("tcp://127.0.0.1:9"),
    ):
        pass


class Broken(Relayed):
    """Its third parcel finds the process dead."""

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        if len(self.sent) == 2:
            self._executor.submit(os._exit, 1)
        return super().submit(function, *arguments)


def test_a_pool_whose_process_dies_says_so_and_the_merge_goes_on_later(
    fixtures: Path, tmp_path: Path, forked: Any
):
    arguments: dict[str, Any] = {
        "adapters": [fixtures / "adapters/llama_A"], "base": fixtures / "bases/llama_sharded",
    }  # fmt: skip
    with (
        ProcessPoolExecutor(1, mp_context=forked) as pool,
        pytest.raises(AdapterError, match="a process of the pool died") as caught,
    ):
        merge(**arguments, out=tmp_path / "out", executor=Broken(pool))
    assert "--resume" in str(caught.value.hint)
    merge(**arguments, out=tmp_path / "out", resume=True)
    merge(**arguments, out=tmp_path / "whole")
    both = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("out", "whole"))
    assert next(both) == next(both)


def test_what_is_wrong_there_is_raised_here(fixtures: Path, threads: Executor):
    """As it is without an executor."""
    mixed = {fixtures / "adapters/llama_ia3_1": 1.0, fixtures / "adapters/llama_A": 1.0}
    raised = []
    for executor in (None, threads):
        with pytest.raises(InvalidError, match="is no low-rank one") as caught:
            blend(mixed, base=fixtures / "bases/llama", executor=executor)
        raised.append((str(caught.value), caught.value.hint))
    assert raised[0] == raised[1]


def test_a_worker_of_other_versions_is_refused(works: dict[str, Work], threads: Executor):
    def older(parcel: parcels.Parcel) -> parcels.Parcel:
        return replace(parcel, tools={**parcel.tools, "torch": "2.0"})

    with pytest.raises(AdapterError, match=r"a worker has torch \S+ for 2.0"):
        works["sum"](Relayed(threads, older))


def test_bytes_that_change_on_the_way_are_noticed(works: dict[str, Work], threads: Executor):
    def flipped(parcel: parcels.Parcel) -> parcels.Parcel:
        ranges = [replace(one, data=bytes(len(one.data or b""))) for one in parcel.ranges]
        return replace(parcel, ranges=ranges)

    with pytest.raises(DamagedError, match="arrived with other content"):
        works["sum"](Relayed(threads, flipped))


def test_few_tasks_are_under_way_at_a_time(
    works: dict[str, Work], threads: Executor, monkeypatch: pytest.MonkeyPatch
):
    """Whatever their number, so that memory stays bounded."""
    expected = works["bf16"](None)
    open_: list[Future[Any]] = []
    most = 0

    class Counting(Relayed):
        def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
            nonlocal most
            open_.append(super().submit(function, *arguments))
            most = max(most, sum(not future.done() for future in open_))
            return open_[-1]

    monkeypatch.setattr(workers, "BUDGET", 1)
    assert works["bf16"](Counting(threads)) == expected
    assert most == 1
    assert len(open_) > 4

"""A merge that is killed, interrupted or out of room, and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterkit.hub import merge
from adapterkit.hub.merge import merge as merging
from adapterkit.registry.errors import AdapterError, ConflictError
from adapterkit.registry.files import Files

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
# One merge after the other, each in a process of its own that dies at a later call of Files than
# the one before, until one comes through; what a dead one had done stays. Prints how many died.
KILLED = """
import os, signal, sys, warnings
from pathlib import Path
from adapterkit.hub import merge
from adapterkit.registry.files import Files
warnings.simplefilter("ignore")
adapter, base, out, step = sys.argv[1:]
left = 0
def dying(name):
    whole = getattr(Files, name)
    def call(self, *arguments):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, *arguments)
    setattr(Files, name, call)
for name in ("create", "write", "fsync", "rename", "fsync_folder", "remove_tree", "mkdir"):
    dying(name)
merge([adapter], base=base, dry_run=True)  # imports everything before the first fork
died, beside = 0, Path(out).parent / ".merged.merge"
while not Path(out).exists() and died < 500:
    child = os.fork()
    if not child:
        left = died * int(step)
        merge([adapter], base=base, out=out, resume=beside.exists())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    died += os.WIFSIGNALED(status)
print(died)
"""


@pytest.fixture
def arguments(fixtures: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "adapters": [fixtures / "cases/llama.lora_qv/adapter"],
        "base": fixtures / "bases/llama_sharded",
        "out": tmp_path / "merged",
    }


@pytest.fixture
def whole(arguments: dict[str, Any], tmp_path: Path) -> dict[str, bytes]:
    """The files of the same merge, undisturbed."""
    merge(**arguments | {"out": tmp_path / "whole"})
    return contents(tmp_path / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_kill_anywhere_leaves_nothing_or_what_a_resumed_merge_goes_on_with(
    arguments: dict[str, Any], whole: dict[str, bytes], proof: Callable[[int, int], int]
):
    """Killed and resumed until it comes through; the bytes are those of one go."""
    (adapter,) = arguments["adapters"]
    values = [adapter, arguments["base"], arguments["out"], proof(4, 1)]
    command = [sys.executable, "-c", KILLED, *map(str, values)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 4
    assert contents(arguments["out"]) == whole


@pytest.fixture
def interrupted(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder beside `out` after the second file of three was interrupted."""
    run = merging.Task.run

    def stop(self: merging.Task, *rest: Any) -> Any:
        if self.file == SHARDS[1]:
            raise KeyboardInterrupt
        return run(self, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(merging.Task, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            merge(**arguments)
    assert not arguments["out"].exists()
    return arguments["out"].parent / ".merged.merge"


def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are made from now on."""
    found: list[str] = []
    run = merging.Task.run

    def note(self: merging.Task, *rest: Any) -> Any:
        found.append(self.file)
        return run(self, *rest)

    monkeypatch.setattr(merging.Task, "run", note)
    return found


def test_finished_files_are_not_made_again(
    arguments: dict[str, Any], interrupted: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
):
    names = made(monkeypatch)
    report = merge(**arguments, resume=True)
    assert names == SHARDS[1:]
    assert contents(arguments["out"]) == whole
    assert len(report.parameters) == 4
    assert not interrupted.exists()


def test_a_finished_file_that_changed_since_is_made_again(
    arguments: dict[str, Any], interrupted: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
):
    path = interrupted / "files" / SHARDS[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    names = made(monkeypatch)
    merge(**arguments, resume=True)
    assert names == SHARDS
    assert contents(arguments["out"]) == whole


def test_a_torn_journal_costs_one_file(
    arguments: dict[str, Any], interrupted: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
):
    journal = interrupted / "journal"
    journal.write_bytes(journal.read_bytes()[:-20])
    names = made(monkeypatch)
    merge(**arguments, resume=True)
    assert names == SHARDS
    assert contents(arguments["out"]) == whole


def test_an_interrupted_merge_is_not_gone_over_unasked(
    arguments: dict[str, Any], interrupted: Path
):
    with pytest.raises(ConflictError, match="was interrupted") as caught:
        merge(**arguments)
    assert "--resume" in (caught.value.hint or "")
    assert interrupted.exists()


def test_another_merge_does_not_go_on_with_it(arguments: dict[str, Any], interrupted: Path):
    with pytest.raises(ConflictError, match="holds another merge"):
        merge(**arguments, resume=True, dtype="bfloat16")
    assert interrupted.exists()


def test_two_merges_into_one_place_do_not_mix(arguments: dict[str, Any], interrupted: Path):
    files = Files()
    with files.open_partial(interrupted / "lock") as held:
        assert held is not None
        with pytest.raises(ConflictError, match="another merge is writing"):
            merge(**arguments, resume=True)


def test_a_full_disk_leaves_what_is_finished(
    arguments: dict[str, Any], whole: Any, monkeypatch: pytest.MonkeyPatch
):
    write, left = Files.write, [15]

    def full(self: Files, file: Any, data: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        write(self, file, data)

    with monkeypatch.context() as patched:
        patched.setattr(Files, "write", full)
        with pytest.raises(AdapterError, match="cannot be written.*No space") as caught:
            merge(**arguments)
    assert caught.value.hint == "free some space and try again"
    assert not arguments["out"].exists()
    merge(**arguments, resume=True)
    assert contents(arguments["out"]) == whole


def test_what_is_made_of_a_changed_base_is_not_mixed_with_the_rest(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import shutil

    base = shutil.copytree(arguments["base"], tmp_path / "base")
    changed = arguments | {"base": base}
    with monkeypatch.context() as patched:
        patched.setattr(merging.Task, "run", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge(**changed)
    os.utime(base / SHARDS[2], ns=(1, 1))
    with pytest.raises(ConflictError, match="holds another merge"):
        merge(**changed, resume=True)


def _interrupt(self: merging.Task, *rest: Any) -> Any:
    raise KeyboardInterrupt


def test_a_task_can_be_sent_elsewhere(arguments: dict[str, Any], whole: Any, tmp_path: Path):
    """Each file is a task of its own: picklable, in any order, more than once."""
    import pickle

    from adapterkit.hub.merge.options import Options
    from adapterkit.hub.merge.planning import plan

    plan_ = plan(arguments["adapters"], arguments["base"], Options())
    tasks = [merging.Task(plan_, file, jobs) for file, jobs in plan_.shards.items()]
    (tmp_path / "there").mkdir()
    for task in reversed(tasks):
        pickle.loads(pickle.dumps(task)).run(tmp_path / "there")
    assert contents(tmp_path / "there") == {name: whole[name] for name in SHARDS}
    assert json.loads(whole["adapterkit.json"])["recipe"] == json.loads(json.dumps(plan_.recipe))

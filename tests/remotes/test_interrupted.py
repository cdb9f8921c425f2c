"""Pushes and pulls that are killed go on where they were; several at once do not disturb."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from adapterkit.hub import sync
from adapterkit.hub.remotes import connect
from adapterkit.hub.remotes.folder import FolderRemote
from adapterkit.registry import Meaning, Registry
from adapterkit.registry.urls import parse_url

SIZE = 5 << 20


@pytest.fixture
def big(tmp_path):
    """A registry with `big` 1.0, of one file of 5 MiB and a small one."""
    data = os.urandom(SIZE)
    with Registry(tmp_path / "big") as registry:
        meaning = Meaning({"kind": "LORA"})
        registry.add("big", {"w.bin": data, "c.json": b"{}"}, meaning, tags=["best"])
        yield registry


def push(home: Path, place: Path, files: object = None) -> None:
    remote = FolderRemote(parse_url(f"file://{place}"), files)
    with Registry(home) as registry:
        sync.push(registry, sync.plan_push(registry, "big", remote), remote)


def pull(home: Path, place: Path, files: object = None) -> None:
    remote = FolderRemote(parse_url(f"file://{place}"))
    with Registry(home, files=files) as registry:
        sync.pull(registry, sync.plan_pull(registry, remote, "big"), remote)


def complete(home: Path, place: Path, big: Registry) -> None:
    """What a finished push and pull promise."""
    pull(home, place)
    with Registry(home) as registry:
        assert registry.resolve("big:best").id == big.resolve("big").id
        registry.files("big")
    assert list((place / "tmp").iterdir()) == []


def visible(place: Path) -> list[str]:
    return [str(v.ref) for v in connect(f"file://{place}").versions("local/big")]


def test_a_push_killed_at_any_point_shows_nothing_or_all_and_goes_on(big, tmp_path, faults, proof):
    counted = faults.Counting()
    push(big.home.path, tmp_path / "counted", counted)
    total = len(counted.names)
    for last in range(1, total + 1, proof(2, 1)):
        place = tmp_path / f"remote{last}"
        assert not faults.in_child(partial(push, big.home.path, place, faults.Dying(last)))
        if (place / "FORMAT").exists() and visible(place):
            pull(tmp_path / f"early{last}", place)  # whatever can be seen can be had
        push(big.home.path, place)
        with Registry(tmp_path / f"home{last}") as registry:
            remote = connect(f"file://{place}")
            sync.pull(registry, sync.plan_pull(registry, remote, "big:best"), remote)
            registry.files("big:best")


def test_a_pull_killed_at_any_point_records_nothing_or_all_and_goes_on(
    big, tmp_path, faults, proof
):
    place = tmp_path / "remote"
    push(big.home.path, place)
    counted = faults.Counting()
    pull(tmp_path / "counted", place, counted)
    for last in range(1, len(counted.names) + 1, proof(2, 1)):
        home = tmp_path / f"home{last}"
        assert not faults.in_child(partial(pull, home, place, faults.Dying(last)))
        with Registry(home) as registry:
            for version in registry.list():
                registry.files(version.ref)
        complete(home, place, big)


class Counter:
    """A progress that remembers how much was only looked at again: the first call of a blob."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, size: int) -> None:
        self.sizes.append(size)


def test_an_interrupted_blob_is_not_moved_again(big, tmp_path):
    """What arrived is counted in one step, the rest in steps of a mebibyte."""
    place, half = tmp_path / "remote", 3 << 20
    digest = next(f.digest for f in big.manifest("big").files if f.path == "w.bin")
    data = big.blob(digest).read_bytes()
    remote = connect(f"file://{place}")
    remote.send(digest, SIZE, big.blob(digest), lambda size: None)
    remote.blobs.path(digest).unlink()
    (place / "tmp" / f"{digest}.part").write_bytes(data[:half])
    seen = Counter()
    remote.send(digest, SIZE, big.blob(digest), seen)
    assert seen.sizes == [half, 1 << 20, 1 << 20]
    assert remote.has(digest, SIZE) and remote.blobs.intact(digest)

    with Registry(tmp_path / "there") as there:
        there.home.create()
        (there.home.path / "tmp" / f"{digest}.part").write_bytes(data[:half])
        starts = []

        def fetch(start):
            starts.append(start)
            return remote.fetch(digest, start)

        there.receive(digest, SIZE, fetch)
        assert starts == [half]
        assert there.blob(digest).read_bytes() == data


@pytest.mark.parametrize("left", [b"garbage", b"x" * (SIZE + 1)], ids=["garbage", "too long"])
def test_what_was_left_behind_is_checked(big, tmp_path, left):
    digest = next(f.digest for f in big.manifest("big").files if f.path == "w.bin")
    remote = connect(f"file://{tmp_path}/remote")
    push(big.home.path, tmp_path / "remote")
    seen = Counter()
    with Registry(tmp_path / "there") as there:
        there.home.create()
        (there.home.path / "tmp" / f"{digest}.part").write_bytes(left)
        there.receive(digest, SIZE, lambda start: remote.fetch(digest, start), seen)
        assert there.blob(digest).read_bytes() == big.blob(digest).read_bytes()
    assert sum(seen.sizes) == SIZE


def test_two_that_receive_one_blob_do_not_disturb_each_other(big, tmp_path):
    push(big.home.path, tmp_path / "remote")
    remote = connect(f"file://{tmp_path}/remote")
    digest = next(f.digest for f in big.manifest("big").files if f.path == "w.bin")
    with Registry(tmp_path / "there") as there:

        def fetch(start):
            with Registry(tmp_path / "there") as other:  # in the middle of the first
                other.receive(digest, SIZE, lambda s: remote.fetch(digest, s))
            return remote.fetch(digest, start)

        there.receive(digest, SIZE, fetch)
        assert there.intact(digest)
        assert list((there.home.path / "tmp").iterdir()) == []


PUSHER = """
import sys
from functools import partial
from pathlib import Path
from adapterkit.hub import sync
from adapterkit.hub.remotes import connect
from adapterkit.registry import ConflictError, Registry
with Registry(Path(sys.argv[1])) as registry:
    remote = connect(sys.argv[2])
    print("ready", flush=True)
    sys.stdin.readline()
    for version in registry.versions("sql"):
        try:
            sync.push(registry, sync.plan_push(registry, version.ref, remote), remote)
        except ConflictError:
            print("conflict", version.version)
        else:
            print("pushed", version.version)
"""


def run_pushers(homes: list[Path], place: Path) -> list[set[str]]:
    command = [sys.executable, "-c", PUSHER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([*command, str(h), f"file://{place}"], **pipes) for h in homes]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    results = [set(child.communicate()[0].splitlines()) for child in children]
    assert [child.returncode for child in children] == [0] * len(homes)
    return results


def test_two_pushers_at_once(tmp_path):
    """One number, one content: whoever comes second is told so, and nothing is mixed."""
    homes, n = [tmp_path / "a", tmp_path / "b"], 8
    for home in homes:
        with Registry(home) as registry:
            for number in range(n):
                same = number % 2 == 0
                content = f"{number}" if same else f"{home.name}{number}"
                registry.add("sql", {"w": content.encode()}, Meaning({}))
    one, two = run_pushers(homes, tmp_path / "remote")
    for number in range(n):
        both = [r & {f"pushed 1.{number}", f"conflict 1.{number}"} for r in (one, two)]
        outcomes = sorted(text.split()[0] for found in both for text in found)
        assert outcomes == (["pushed"] * 2 if number % 2 == 0 else ["conflict", "pushed"])
    with Registry(tmp_path / "there") as there:
        remote = connect(f"file://{tmp_path}/remote")
        for number in range(n):
            sync.pull(there, sync.plan_pull(there, remote, f"sql@1.{number}"), remote)
            there.files(f"sql@1.{number}")

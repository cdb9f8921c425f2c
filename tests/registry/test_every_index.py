"""Each command is killed, and fails, at every single touch of the disk and every SQL statement."""

from __future__ import annotations

import errno
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from adapterkit.hub import sync
from adapterkit.hub.remotes.folder import FolderRemote
from adapterkit.registry import AdapterError, AdapterWarning, Meaning, Registry
from adapterkit.registry.files import Files
from adapterkit.registry.retention import Retention
from adapterkit.registry.urls import parse_url
from adapterkit.registry.verify import verify

pytestmark = [
    pytest.mark.timeout(3000),  # the full figures take their time
    pytest.mark.filterwarnings("ignore:.*was yanked"),
]
NOW = timedelta(0)
LORA = Meaning({"kind": "LORA"})
Act = Callable[[Path, Files], None]


@contextmanager
def opened(folder: Path, files: Files) -> Iterator[Registry]:
    with files.installed(), Registry(folder / "home", files=files) as registry:
        yield registry


def remote(folder: Path, files: Files | None = None) -> FolderRemote:
    return FolderRemote(parse_url(f"file://{folder}/remote"), files)


def fill(folder: Path) -> None:
    """Here sql 1.0 (best) and 1.1, gone (in the trash), late (removed); far on a remote."""
    with Registry(folder / "home") as registry:
        registry.add("gone", {"w": b"gone"}, LORA)
        registry.rm("gone")
        registry.gc(NOW)
        registry.add("sql", {"w": b"first", "c": b"both"}, LORA, tags=["best"])
        registry.add("sql", {"w": b"second", "c": b"both"}, LORA)
        registry.add("late", {"w": b"late", "c": b"both"}, LORA)
        registry.rm("late")
    with Registry(folder / "other") as registry:
        registry.add("far", {"w": b"far" * 100, "c": b"both"}, LORA, attachments={"note": b"hi"})
        sync.push(registry, sync.plan_push(registry, "far", remote(folder)), remote(folder))


def add(folder: Path, files: Files) -> None:
    with opened(folder, files) as registry:
        content = {"w": b"new", "c": b"both", "g": b"gone"}
        registry.add("sql", content, LORA, tags=["best"], attachments={"note": b"n"})


def create(folder: Path, files: Files) -> None:
    with files.installed(), Registry(folder / "new", files=files) as registry:
        registry.add("sql", {"w": b"new"}, LORA)


def tag(folder: Path, files: Files) -> None:
    with opened(folder, files) as registry:
        registry.tag("sql@1.1", "best")


def rm(folder: Path, files: Files) -> None:
    with opened(folder, files) as registry:
        registry.rm("sql@1.0")


def attach(folder: Path, files: Files) -> None:
    with opened(folder, files) as registry:
        registry.attach("sql@1.0", "metrics", b'{"loss":1}')


def yank(folder: Path, files: Files) -> None:
    with opened(folder, files) as registry:
        registry.yank("sql@1.0", "bad")


def protect(folder: Path, files: Files) -> None:
    with opened(folder, files) as registry:
        registry.protect("sql:best")


def mv(folder: Path, files: Files) -> None:
    with opened(folder, files) as registry:
        registry.mv("sql", "team/sql")


def retain(folder: Path, files: Files) -> None:
    with opened(folder, files) as registry:
        registry.retain(Retention(keep_last=1))


def gc(folder: Path, files: Files) -> None:
    with opened(folder, files) as registry:
        registry.gc(NOW)


def rebuild(folder: Path, files: Files) -> None:
    with opened(folder, files) as registry:
        registry.rebuild()


def push(folder: Path, files: Files) -> None:
    with opened(folder, files) as registry:
        there = remote(folder, files)
        sync.push(registry, sync.plan_push(registry, "sql:best", there), there)


def pull(folder: Path, files: Files) -> None:
    with opened(folder, files) as registry:
        there = remote(folder)
        sync.pull(registry, sync.plan_pull(registry, there, "far"), there)


ACTS = {
    act.__name__: act
    for act in (add, create, tag, rm, attach, yank, protect, mv, retain, gc, rebuild, push, pull)
}


def state(folder: Path) -> object:
    """What can be seen: versions, tags, attachments, here and at the remote; all bytes checked."""
    found = []
    for name in ("home", "new"):
        assert verify(folder / name).damage == ()
        with Registry(folder / name) as registry:
            for version in registry.list():
                registry.files(version.ref)
                attached = [(a.kind, registry.read_attachment(a))
                            for a in registry.attachments(version.ref)]  # fmt: skip
                protected = registry.home.read(lambda c: c.rows("SELECT * FROM protected"))
                marks = (version.tags, version.yanked, tuple(map(str, protected)))
                found.append((str(version.ref), version.id, marks, attached))
    there = remote(folder)
    for name in there.names():
        found += [(str(v.ref), v.id) for v in there.versions(name)]
        found += [(f"{name}:{tag}", v.id) for tag, v in there.tags(name).items()]
    return found


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    fill(folder)
    return folder


@pytest.fixture(params=ACTS)
def act(request) -> Act:
    return ACTS[request.param]


@pytest.fixture
def case(template, shm, act, faults) -> tuple[int, object, object, Callable[[int], Path]]:
    """How many touches, what is seen before and after, and a fresh copy per number."""

    def copy(number: int) -> Path:
        return Path(shutil.copytree(template, shm / str(number)))

    whole, counted = copy(0), faults.Everything()
    before = state(whole)
    act(whole, counted)
    return len(counted.names), before, state(whole), copy


def points(total: int, wanted: int) -> list[int]:
    """About `wanted` of 1..total, spread over all; the last is among them."""
    step = max(1, total // wanted)
    return sorted({*range(1, total + 1, step), total})


def test_killed_anywhere_a_command_has_happened_or_not_and_can_be_repeated(
    act, case, faults, proof
):
    total, before, after, copy = case
    for last in points(total, proof(9, 10_000)):
        folder = copy(last)
        assert not faults.in_child(partial(act, folder, faults.DyingEverywhere(last)))
        seen = state(folder)
        assert seen in between(act, before, after), last
        if seen != after or act is not rm:
            act(folder, faults.Everything())
        assert state(folder) == after, last
        shutil.rmtree(folder)


def between(act: Act, before: object, after: object) -> list[object]:
    """A push sends tags after the version: each is a change of its own."""
    untagged = [row for row in after if row in before or ":" not in row[0]]
    return [before, after, untagged] if act is push else [before, after]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EPERM])
def test_failing_anywhere_a_command_says_so_or_has_happened(act, case, code, faults, proof):
    total, before, after, copy = case
    for last in points(total, proof(6, 10_000)):
        folder = copy(last)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdapterWarning)  # stored, but not yet in the catalog
            try:
                act(folder, faults.failing(last, code))
            except AdapterError:
                failed = True
            else:
                failed = False
        seen = state(folder)
        if failed and act is not push:
            assert seen in (before, after), last
        elif failed:
            assert seen in between(act, before, after), last
        else:
            assert seen == after, last
        if seen != after or act is not rm:
            act(folder, faults.Everything())
        assert state(folder) == after, last
        shutil.rmtree(folder)


def work(folder: Path, rounds: int, seconds: float) -> None:
    """All there is to do, again and again, until so long after some rounds of it; what was
    confirmed is written down beside."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, wherever it is
    there = remote(folder)
    if not rounds:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    with Registry(folder / "home") as registry:
        for number in count():
            if number == rounds:
                signal.setitimer(signal.ITIMER_REAL, seconds)
            registry.add("sql", {"w": b"%d" % number}, LORA, tags=["best"])
            confirm(folder / "added", number)
            registry.rm(f"sql@1.{number}") if number % 5 == 4 else registry.tag("sql", "last")
            if number % 4 == 3:
                plan = sync.plan_push(registry, "sql", there)
                sync.push(registry, plan, there)
                confirm(folder / "pushed", plan.ref)
            if number % 6 == 5:
                sync.pull(registry, sync.plan_pull(registry, there, "far"), there)
                registry.rm("far")
            if number % 7 == 6:
                registry.gc(NOW)
            if number % 9 == 8:
                registry.rebuild()


def confirm(path: Path, what: object) -> None:
    with path.open("a") as file:
        file.write(f"{what}\n")


def confirmed(path: Path) -> list[str]:
    """Without a last line that the kill cut short."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def test_killed_at_random_moments_nothing_confirmed_is_lost(template, shm, faults, proof):
    chosen, n_pushed = random.Random(3), 0
    for number in range(proof(20, 500)):
        folder = shm / str(number)
        shutil.copytree(template / "remote", folder / "remote")
        rounds, seconds = chosen.randrange(13), chosen.uniform(0.001, 0.06)
        assert not faults.in_child(partial(work, folder, rounds, seconds))
        assert verify(folder / "home").damage == ()
        with Registry(folder / "home") as registry:
            have = {v.version for v in registry.list("sql")}
            numbers = map(int, confirmed(folder / "added"))
            assert [n for n in numbers if n % 5 != 4 and f"1.{n}" not in have] == []
            for version in registry.list():
                registry.files(version.ref)
        pushed = confirmed(folder / "pushed")
        assert set(pushed) <= visible(folder)
        n_pushed += len(pushed)
        shutil.rmtree(folder)
    assert n_pushed > proof(10, 500)


def visible(folder: Path) -> set[str]:
    """The versions that the remote shows, each of which can be had."""
    there, found = remote(folder), set()
    with Registry(folder / "puller") as registry:
        for name in there.names():
            for version in there.versions(name):
                sync.pull(registry, sync.plan_pull(registry, there, version.ref), there)
                found.add(str(version.ref))
        for ref in found:
            registry.files(ref)
    return found

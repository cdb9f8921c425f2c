"""The registry when processes die, disks fill up and several write at once."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest

from adapterkit.registry import (
    AdapterError,
    AdapterWarning,
    ConflictError,
    Meaning,
    Registry,
    locking,
)
from adapterkit.registry.files import Files
from adapterkit.registry.log import Log, Place

pytestmark = pytest.mark.filterwarnings("ignore:.*was yanked")
FILES = {"w.bin": b"weights", "config.json": b"{}"}
LORA = Meaning({"kind": "LORA"})
ADDER = """
import sys
from pathlib import Path
from adapterkit.registry import Meaning, Registry
with Registry(Path(sys.argv[1])) as registry:
    for n in range(int(sys.argv[3])):
        registry.add("sql", {"w": f"{sys.argv[2]}-{n}".encode()}, Meaning({}))
"""


def change(registry: Registry) -> None:
    """One of each change, so that every kind of record is cut short somewhere."""
    registry.add("sql", FILES, LORA, tags=["best"], attachments={"metrics": b'{"a":1}'})
    registry.attach("sql", "note", b"hello")
    registry.tag("sql", "prod")
    registry.rm("sql:best")
    registry.undo("sql:best")
    registry.protect("sql:prod")
    registry.protect("sql:prod", False)
    registry.add("sql", {"w.bin": b"second"}, LORA)
    registry.rm("sql@1.0")
    registry.yank("sql@1.1", "bad")
    registry.unyank("sql@1.1")
    registry.mv("sql", "team/sql")


def check(home: Path) -> int:
    """Every invariant of docs/store.md that is seen from outside; how many records there are."""
    log = Log(home / "log", Files())
    records = [record for record, _ in log.read(Place())]
    assert [record.seq for record in records] == list(range(1, len(records) + 1))
    with Registry(home) as registry:
        for version in registry.list():
            assert not version.damaged
            assert all(path.exists() for path in registry.files(version.ref).values())
            for attachment in registry.attachments(version.ref):
                registry.read_attachment(attachment)
    return len(records)


def n_changes(home: Path, files: Files) -> int:
    with Registry(home, files=files) as registry:
        change(registry)
    return len(files.names)


def points(total: int, wanted: int) -> list[int]:
    """About `wanted` of 1..total, both ends among them."""
    step = max(1, total // wanted)
    return sorted({*range(1, total + 1, step), total})


def test_a_process_killed_at_any_point_leaves_no_half_change(tmp_path, proof, faults):
    total = n_changes(tmp_path / "counted", faults.Counting())
    every = check(tmp_path / "counted")
    seen = set()
    for last in points(total, proof(45, 10_000)):
        home = tmp_path / f"home{last}"

        def work(home: Path = home, last: int = last) -> None:
            with Registry(home, files=faults.Dying(last)) as registry:
                change(registry)

        assert not faults.in_child(work)
        if (home / "FORMAT").exists():
            seen.add(check(home))
        with Registry(home) as registry:
            before = registry.list()
            registry.add("after", {"w": b"later"}, LORA)
            assert registry.list("sql") == before
        check(home)
    assert seen >= set(range(every))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_change_that_fails_changes_nothing_and_says_why(tmp_path, code, faults):
    home = tmp_path / "home"
    with Registry(home) as registry:
        registry.add("old", {"w": b"old"}, LORA)
        log = (home / "log").read_bytes()
    for last in count(1):

        def fail(number: int, name: str, last: int = last) -> None:
            if number == last:
                raise OSError(code, os.strerror(code))

        files = faults.Counting(fail)
        with Registry(home, files=files) as registry:
            before = registry.list()
            try:
                registry.add("sql", {"w.bin": b"%d" % last}, LORA, attachments={"note": b"x"})
            except AdapterError as error:
                assert os.strerror(code) in str(error)
                assert registry.list() == before
                assert (home / "log").read_bytes() == log
            else:
                break
        check(home)
    assert last > 15


def test_a_disk_that_stays_full_gives_a_hint(tmp_path, faults):
    home = tmp_path / "home"
    with Registry(home) as registry:
        registry.add("old", {"w": b"old"}, LORA)

    def full(number: int, name: str) -> None:
        if name in ("create", "write"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with Registry(home, files=faults.Counting(full)) as registry:
        for failing in (
            lambda: registry.add("sql", FILES, LORA),
            lambda: registry.tag("old", "best"),
            lambda: registry.rm("old"),
            lambda: registry.attach("old", "note", b"x"),
            lambda: registry.export("old", tmp_path / "out"),
        ):
            with pytest.raises(AdapterError, match="No space left") as caught:
                failing()
            assert "free some space" in caught.value.hint
        assert [str(v.ref) for v in registry.list()] == ["old@1.0"]
    assert not (tmp_path / "out").exists()
    assert list((home / "tmp").iterdir()) == []


def snapshot(home: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in home.rglob("*")}


def test_a_home_that_cannot_be_written_can_still_be_read(tmp_path, faults):
    home = tmp_path / "home"
    with Registry(home) as registry:
        change(registry)
        expected = registry.list()
    before = snapshot(home)
    with Registry(home, files=faults.ReadOnly()) as registry:
        assert registry.list() == expected
        assert registry.files("sql")["w.bin"].read_bytes() == b"second"
        for failing in (
            lambda: registry.add("sql", {"w": b"3"}, LORA),
            lambda: registry.tag("sql", "x"),
            lambda: registry.rm("sql"),
        ):
            with pytest.raises(AdapterError, match="Read-only") as caught:
                failing()
            assert "ADAPTERKIT_HOME" in caught.value.hint
        assert registry.list() == expected
        assert snapshot(home) == before
        with Registry(home) as other:
            other.add("new", {"w": b"x"}, LORA)
        assert len(registry.list()) == len(expected) + 1


def test_a_home_that_cannot_be_made_says_so(tmp_path, faults):
    with Registry(tmp_path / "new", files=faults.ReadOnly()) as registry:
        assert registry.list() == []
        with pytest.raises(AdapterError, match="Read-only"):
            registry.add("sql", FILES, LORA)
    assert not (tmp_path / "new").exists()


def test_a_catalog_that_fails_after_the_commit_is_repaired(tmp_path, monkeypatch):
    home = tmp_path / "home"
    with Registry(home) as registry:
        registry.add("sql", FILES, LORA)
        with pytest.MonkeyPatch.context() as patch:

            def full(*given):
                raise sqlite3.OperationalError("database or disk is full")

            patch.setattr(registry.home.catalog, "apply", full)
            with pytest.warns(AdapterWarning, match="stored"):
                registry.add("sql", {"w": b"2"}, LORA)
        assert [str(v.ref) for v in registry.list()] == ["sql@1.0", "sql@1.1"]
    check(home)


def test_a_full_disk_under_the_catalog_stops_neither_writers_nor_readers(tmp_path):
    """Only the log must be written; what the catalog misses of it is read into memory."""
    home = tmp_path / "home"
    with Registry(home) as registry, Registry(home) as other:
        registry.add("sql", FILES, LORA)
        for each in (registry, other):
            each.home.catalog.db.execute("PRAGMA max_page_count = 1").fetchall()
        large = Meaning({"kind": "x" * 50_000})
        with pytest.warns(AdapterWarning, match="full"):
            registry.add("sql", {"w": b"2"}, large)
        for each in (registry, other):
            assert [v.version for v in each.list()] == ["1.0", "1.1"]
        registry.add("sql", {"w": b"3"}, large)
        assert [v.version for v in other.list()] == ["1.0", "1.1", "1.2"]
    assert check(home) == 3


def test_three_processes_add_at_once(tmp_path):
    home = tmp_path / "home"
    command = [sys.executable, "-c", ADDER, str(home)]
    children = [subprocess.Popen([*command, str(number), "10"]) for number in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    with Registry(home) as registry:
        versions = registry.list()
        assert [v.version for v in versions] == [f"1.{n}" for n in range(30)]
        contents = {registry.files(v.ref)["w"].read_bytes() for v in versions}
        assert contents == {f"{p}-{n}".encode() for p in range(3) for n in range(10)}
    assert check(home) == 30


def test_a_process_killed_while_others_write_does_not_stop_them(tmp_path):
    home = tmp_path / "home"
    command = [sys.executable, "-c", ADDER, str(home)]
    with Registry(home) as registry:
        registry.add("sql", FILES, LORA)
        victim = subprocess.Popen([*command, "victim", "1000"])
        while len(registry.list()) < 5:
            assert victim.poll() is None
        victim.kill()
        victim.wait()
        n_before = check(home)
        registry.add("sql", {"w": b"after"}, LORA)
        assert check(home) == n_before + 1


def test_a_lock_that_is_never_released_is_a_conflict(tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "LOCK_SECONDS", 0.05)
    with Registry(tmp_path / "home") as registry, Registry(tmp_path / "home") as other:
        registry.add("sql", FILES, LORA)
        with registry.home.lock(), pytest.raises(ConflictError, match="locked"):
            other.tag("sql", "x")
        assert other.tag("sql", "x") is None

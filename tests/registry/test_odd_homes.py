"""Homes in odd places, with odd rights, under odd clocks, and several at work on one at once."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from adapterkit.registry import AdapterError, Meaning, Registry, clock
from adapterkit.registry.retention import Retention
from adapterkit.registry.verify import to_read, verify

NOW = timedelta(0)
LORA = Meaning({"kind": "LORA"})
PLACES = {
    "blanks": "a b  c",
    "a line break": "a\nb",
    "letters": "Ünï-код-日本",
    "marks of URLs": "a?b#c%20d&e",
    "quotes": "it's \"so\"",
    "dashes": "-rf",
    "no UTF-8": os.fsdecode(b"\xff\xfe"),
}


def everything(home: Path, outside: Path) -> None:
    """What reads and what writes, once each."""
    with Registry(home) as registry:
        registry.add("sql", {"w": b"one"}, LORA, tags=["best"], attachments={"note": b"good"})
        registry.add("sql", {"w": b"two"}, LORA)
        registry.rm("sql@1.1")
        assert [v.version for v in registry.search("good")] == ["1.0"]
        registry.gc(NOW)
        registry.rebuild()
        registry.export("sql", outside / "out")
        registry.backup(outside / "backup")
        assert registry.verify().damage == ()
    with Registry(home.with_name(f"{home.name} again")) as other:
        other.restore(outside / "backup")
        assert other.verify().damage == () and other.files("sql:best").keys() == {"w"}
    found = verify(home)
    assert found.damage == () and [note.where for note in found.notes] == []


@pytest.mark.parametrize("place", PLACES)
def test_a_home_may_have_any_name(tmp_path, place):
    folder = tmp_path / PLACES[place]
    folder.mkdir()
    everything(folder / "home", folder)


def test_a_home_may_be_reached_by_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    everything(tmp_path / "link", tmp_path)
    with Registry(tmp_path / "real") as registry:
        assert len(registry.list()) == 1


@pytest.fixture
def filled(shm) -> Path:
    home = shm / "home"
    with Registry(home) as registry:
        for number in range(20):
            registry.add("sql", {"w": b"%d" % number}, LORA, attachments={"note": b"good"})
    return home


def as_nobody(faults, home: Path, work: Callable[[], None]) -> None:
    """Run `work` as a user who may read everything and write nothing."""
    home.parent.chmod(0o755)  # one of this test alone

    def become() -> None:
        os.setgid(65534)
        os.setuid(65534)
        work()

    assert faults.in_child(become)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


@needs_root
def test_who_may_only_read_reads_and_verifies_and_changes_nothing(filled, faults):
    def work() -> None:
        assert verify(filled).damage == () and to_read(filled) > 0
        with Registry(filled) as registry:
            assert registry.files("sql")["w"].read_bytes() == b"19"
            for act in (registry.gc, lambda: registry.rm("sql@1.0"), lambda: registry.repair([])):
                try:
                    act()
                except AdapterError as error:
                    assert "Permission denied" in str(error)
            registry.rebuild()
            assert len(registry.list()) == 20

    with Registry(filled) as registry:  # what is imported now need not be readable to all
        registry.gc(dry_run=True), registry.repair([]), "".encode("utf-8-sig")
    as_nobody(faults, filled, work)
    assert verify(filled).damage == ()


@needs_root
@pytest.mark.parametrize("folder", [True, False])
def test_what_may_not_be_looked_into_is_named(filled, faults, folder):
    with Registry(filled) as registry:
        path = registry.files("sql@1.0")["w"]
    path = path.parent if folder else path
    path.chmod(0)

    def work() -> None:
        named = {p.where for p in verify(filled).damage if p.what == "unreadable"}
        assert path.relative_to(filled).as_posix() in named
        to_read(filled)

    as_nobody(faults, filled, work)


def test_what_cannot_be_read_counts_nothing_towards_the_bar(filled):
    everything_there = to_read(filled)
    path = next((filled / "blobs" / "sha256").glob("??/*"))
    size = path.stat().st_size
    path.unlink()
    assert to_read(filled) == everything_there - size


def test_clocks_that_go_back_lose_nothing(filled, monkeypatch):
    with Registry(filled) as registry:
        for path in (filled / "blobs" / "sha256").glob("??/*"):
            os.utime(path, (4e9, 4e9))  # in 2096
        registry.rm("sql@1.0")
        monkeypatch.setattr(clock, "now", lambda: "1999-01-01T00:00:00.000000Z")
        registry.add("sql", {"w": b"in the past"}, LORA, tags=["best"])
        registry.rm("sql@1.1")
        assert registry.gc(timedelta(days=1)).thrown == {}
        assert registry.resolve("sql").version == "1.20"
        assert [m.after for m in registry.moves("sql", "best")] == ["1.20"]
        registry.retain(Retention(keep_last=5))
        registry.rebuild()
        assert len(registry.versions("sql")) == 5
    assert verify(filled).damage == ()


def test_an_age_beyond_all_time_is_none(filled):
    with Registry(filled) as registry:
        assert registry.outdated(Retention(older_than=timedelta(weeks=999_999))) == []
        assert registry.gc(timedelta(weeks=999_999)).thrown == {}


REBUILDER = """
import sys
from pathlib import Path
from adapterkit.registry import Registry
from adapterkit.registry.verify import verify
home = Path(sys.argv[1])
for number in range(int(sys.argv[2])):
    with Registry(home) as registry:
        registry.rebuild()
        assert len(registry.list()) >= 20
    found = verify(home)
    assert found.damage == (), found.damage
"""


@pytest.mark.timeout(3000)  # the full figures take their time
def test_several_that_rebuild_and_verify_at_once_find_no_damage_and_lose_nothing(filled, proof):
    command = [sys.executable, "-c", REBUILDER, str(filled), str(proof(4, 40))]
    children = [subprocess.Popen(command) for _ in range(3)]
    with Registry(filled) as registry:
        n_added = 0
        while any(child.poll() is None for child in children):
            registry.add("tone", {"w": b"%d" % n_added}, LORA)
            n_added += 1
            assert len(registry.list("tone")) == n_added
    assert [child.wait() for child in children] == [0, 0, 0]
    with Registry(filled) as registry:
        assert len(registry.list()) == 20 + n_added
    found = verify(filled)
    assert found.damage == () and [n.where for n in found.notes if "lost" in n.where] == []


def test_a_thread_that_rebuilds_does_not_disturb_one_that_reads(filled):
    failed: list[BaseException] = []
    with Registry(filled) as registry:

        def read() -> None:
            try:
                for _ in range(100):
                    assert len(registry.list()) == 20
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        for _ in range(5):
            registry.rebuild()
        thread.join()
    assert failed == []


def test_where_a_broken_catalog_cannot_be_replaced_one_in_memory_answers(filled, faults):
    def full(number: int, name: str) -> None:
        if name in ("open_update", "rename"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Registry(filled, files=faults.Counting(full)) as registry:
        registry.home.catalog.db.execute("DROP TABLE versions")
        assert len(registry.list()) == 20
        with pytest.raises(AdapterError, match="No space left"):
            registry.rebuild()
        assert len(registry.list()) == 20
    assert [path.name for path in (filled / "tmp").iterdir()] == []
    with Registry(filled) as registry:
        assert len(registry.list()) == 20
    assert verify(filled).damage == ()


def test_whoever_has_it_open_goes_on_with_the_new_catalog(filled):
    """Also with one that somebody deleted."""
    with Registry(filled) as registry, Registry(filled) as other:
        registry.home.catalog.db.execute("UPDATE versions SET removed = 'x' WHERE version != '1.0'")
        assert [len(each.list()) for each in (registry, other)] == [1, 1]
        other.repair([])
        assert [len(each.list()) for each in (registry, other)] == [20, 20]
        registry.tag("sql@1.3", "best")
        assert other.resolve("sql:best").version == "1.3"
        (filled / "catalog.db").unlink()
        assert len(registry.list()) == 20
        other.tag("sql@1.4", "best")
        assert registry.resolve("sql:best").version == "1.4"
    assert verify(filled).damage == ()

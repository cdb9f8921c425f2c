"""On file systems whose locks cannot be trusted a registry is read, and written only if asked."""

from __future__ import annotations

import warnings

import pytest

from adapterkit.registry import AdapterError, AdapterWarning, Meaning, Registry
from adapterkit.registry.files import Files

LORA = Meaning({"kind": "LORA"})


class OnNfs(Files):
    def file_system(self, path):
        return "nfs4"


class LyingLocks(Files):
    """As some user-space file systems do it: whoever asks for a lock is told that he has it."""

    def locks_work(self, folder):
        return False


@pytest.fixture
def filled(home):
    with Registry(home) as registry:
        registry.add("sql", {"w": b"weights"}, LORA)
    return home


def snapshot(home):
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in home.rglob("*")}


def test_on_a_network_a_registry_is_read_only_and_says_so(filled):
    before = snapshot(filled)
    with pytest.warns(AdapterWarning, match="read-only: it lies on nfs4"):
        registry = Registry(filled, files=OnNfs())
    with registry:
        assert [str(v.ref) for v in registry.list()] == ["sql@1.0"]
        assert registry.files("sql")["w"].read_bytes() == b"weights"
        for failing in (
            lambda: registry.add("sql", {"w": b"2"}, LORA),
            lambda: registry.tag("sql", "x"),
            lambda: registry.rm("sql"),
            lambda: registry.gc(),
        ):
            with pytest.raises(AdapterError, match="cannot be trusted") as caught:
                failing()
            assert "--single-writer" in caught.value.hint
    assert snapshot(filled) == before


def test_nothing_is_created_there(home):
    with Registry(home, files=OnNfs()) as registry:
        assert registry.list() == []
        with pytest.raises(AdapterError, match="read-only"):
            registry.add("sql", {"w": b"2"}, LORA)
    assert not home.exists()


def test_a_single_writer_may_write(filled):
    with pytest.warns(AdapterWarning, match="without a lock: it lies on nfs4"):
        registry = Registry(filled, files=OnNfs(), single_writer=True)
    with registry:
        registry.add("sql", {"w": b"2"}, LORA)
        registry.rm("sql@1.0")
        registry.gc()
        assert [v.version for v in registry.list()] == ["1.1"]
        assert not (filled / "catalog.db-wal").exists()  # which needs memory that is shared
    with Registry(filled) as registry:
        assert [v.version for v in registry.list()] == ["1.1"]
        assert registry.verify().damage == ()


def test_locks_that_keep_nobody_out_are_found_before_the_first_write(filled):
    with Registry(filled, files=LyingLocks()) as registry:
        with pytest.warns(AdapterWarning, match="without working locks"), pytest.raises(
            AdapterError, match="read-only"
        ):
            registry.tag("sql", "x")
        assert [v.tags for v in registry.list()] == [()]
    with Registry(filled, files=LyingLocks(), single_writer=True) as registry:
        with pytest.warns(AdapterWarning, match="without a lock"):
            registry.tag("sql", "x")
        assert [v.tags for v in registry.list()] == [("x",)]


def test_on_a_local_disk_locks_are_trusted(tmp_path):
    files = Files()
    assert files.file_system(tmp_path / "not" / "there") != ""
    assert files.locks_work(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdapterWarning)
        with Registry(tmp_path / "home") as registry:
            registry.add("sql", {"w": b"1"}, LORA)

"""What backup and restore promise: one moment, whole, checked, and only into an empty place."""

from __future__ import annotations

import hashlib
import threading
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterkit.registry import AdapterError, ConflictError, DamagedError, Meaning, Registry
from adapterkit.registry.log import Place, make_record

LORA = Meaning({"kind": "LORA", "rank": 8})
BYTES = settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def full(registry, add):
    """Every kind of record; a blob that only a removed version had."""
    one = add(tags=["best"], attachments={"metrics": b'{"loss":0.5}', "note": b"politely"})
    parents = ({"version": f"sha256:{one.id}", "relation": "x"},)
    sketch = b"sketch"
    base = {"sketch": {"digest": f"sha256:{hashlib.sha256(sketch).hexdigest()}", "size": 6}}
    add(b"2", meaning=Meaning({}, base, parents=parents, extra=(sketch,)))
    add(b"gone", name="tone"), registry.rm("tone")
    registry.protect("sql:best"), registry.yank("sql@1.1", "bad"), registry.mv("sql", "team/sql")
    (registry.home.path / "remotes.json").write_bytes(b'{"team":"file:///disk"}')
    return registry


def answers(registry):
    versions = registry.list()
    return (
        versions,
        [registry.manifest(v.ref) for v in versions],
        [registry.attachments(v.ref) for v in versions],
        [registry.lineage(v.ref) for v in versions],
        {v.name: registry.history(v.name) for v in versions},
        registry.search("politely"),
        str(registry.resolve("sql:best").ref),
    )


@pytest.fixture
def saved(full, tmp_path):
    full.backup(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_restored_registry_answers_the_same(full, saved, tmp_path):
    with Registry(tmp_path / "new") as again:
        done = again.restore(saved)
        assert (done.n_versions, done.size) == (2, saved.stat().st_size)
        assert answers(again) == answers(full)
        assert [again.files(v.ref)["w.bin"].read_bytes() for v in again.list()[:1]] == [b"weights"]
        assert (tmp_path / "new/remotes.json").read_bytes() == b'{"team":"file:///disk"}'
        assert again.home.log.path.read_bytes() == full.home.log.path.read_bytes()
        again.add("more", {"w": b"x"}, LORA)
    with Registry(tmp_path / "new") as opened:
        assert str(opened.resolve("more").ref) == "more@1.0"
    assert list((tmp_path / "new/tmp").iterdir()) == []


def test_blobs_that_nothing_needs_are_left_out(full, saved):
    gone = hashlib.sha256(b"gone").hexdigest()
    assert full.home.blobs.path(gone).exists()
    assert b"blob " + gone.encode() not in saved.read_bytes()


def test_an_empty_registry_has_a_backup_too(registry, tmp_path):
    assert registry.backup(tmp_path / "saved").n_versions == 0
    with Registry(tmp_path / "new") as again:
        again.restore(tmp_path / "saved")
        assert again.list() == [] and (tmp_path / "new/FORMAT").exists()


def test_a_backup_replaces_nothing(full, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ConflictError, match="exists"):
        full.backup(tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "x"


def test_a_rotten_blob_is_named_and_there_is_no_file(full, tmp_path):
    path = full.files("team/sql@1.0")["w.bin"]
    path.chmod(0o644), path.write_bytes(b"wEights")
    with pytest.raises(DamagedError, match=r"team/sql@1\.0: w\.bin"):
        full.backup(tmp_path / "saved")
    path.unlink()
    with pytest.raises(DamagedError, match=r"team/sql@1\.0: w\.bin"):
        full.backup(tmp_path / "saved")
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


def test_a_full_disk_leaves_no_file(full, tmp_path, faults):
    def stop(number, name):
        if name == "fsync":
            raise OSError(28, "No space left on device")

    full.home.files = faults.Counting(stop)
    with pytest.raises(AdapterError, match="No space left"):
        full.backup(tmp_path / "saved")
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


def test_a_registry_that_cannot_be_written_can_be_saved(full, tmp_path, faults):
    class ReadOnly(faults.ReadOnly):
        """Save for the folder that the backup goes to."""

        def _refuse(self, number, name):
            if name not in ("create", "write", "fsync", "rename", "unlink", "fsync_folder"):
                super()._refuse(number, name)

    with Registry(full.home.path, files=ReadOnly()) as other:
        assert other.backup(tmp_path / "saved").n_versions == 2


def test_a_backup_while_others_write_is_of_one_moment(registry, add, tmp_path):
    add()
    stop = threading.Event()

    def write():
        with Registry(registry.home.path) as own:
            number = 0
            while not stop.is_set() and number < 500:
                number += 1
                own.add("busy", {"w": b"%d" % number}, LORA, tags=["newest"])
                if number % 3 == 0:
                    own.rm(f"busy@1.{number - 2}")
                    own.gc(timedelta(0))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(4):
            registry.backup(tmp_path / f"saved{number}")
    finally:
        stop.set()
        writer.join()
    for number in range(4):
        with Registry(tmp_path / f"new{number}") as again:
            again.restore(tmp_path / f"saved{number}")
            for version in again.list():
                again.files(version.ref)
            log = again.home.log.path.read_bytes()
            assert registry.home.log.path.read_bytes().startswith(log)


def test_only_an_empty_place_is_restored_into(full, saved, tmp_path):
    before = full.home.log.path.read_bytes()
    with pytest.raises(ConflictError, match="not empty"):
        full.restore(saved)
    assert full.home.log.path.read_bytes() == before
    (tmp_path / "empty").mkdir()
    with Registry(tmp_path / "empty") as again:
        again.restore(saved)
        with pytest.raises(ConflictError):
            again.restore(saved)


def refused(path, tmp_path, match=None, error=DamagedError):
    """Nothing came of it, and a good backup can still be restored there."""
    home = tmp_path / "refused"
    with Registry(home) as registry:
        with pytest.raises(error, match=match) as caught:
            registry.restore(path)
        assert not (home / "FORMAT").exists() and not (home / "log").exists()
        assert not (home / "blobs").exists()
        assert registry.list() == []
    return str(caught.value)


@BYTES
@given(spot=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_a_changed_byte_is_found(saved, tmp_path, spot, flip):
    data = bytearray(saved.read_bytes())
    data[spot % len(data)] ^= flip
    changed = tmp_path / "changed"
    changed.write_bytes(data)
    refused(changed, tmp_path, error=AdapterError)


@BYTES
@given(length=st.integers(0, 10**6))
def test_a_cut_off_file_is_found(saved, tmp_path, length):
    data = saved.read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(data[: length % len(data)])
    refused(cut, tmp_path)


def archive(*entries: tuple[str, bytes], end: bytes | None = None) -> bytes:
    data = b"adapterkit-backup 1\n"
    for head, content in entries:
        data += f"{head} {len(content)}\n".encode() + content
    return data + (end or f"end {hashlib.sha256(data).hexdigest()}\n".encode())


def line(kind, payload):
    return make_record(Place(), kind, payload, "2026-01-01T00:00:00Z", "a@b").line()


HOSTILE = {
    "nothing": b"",
    "something else": b"PK\x03\x04" + bytes(100),
    "no log": archive(),
    "two logs": archive(("file log", b""), ("file log", b"")),
    "a path": archive(("file ../../evil", b"x")),
    "an absolute path": archive(("file /etc/evil", b"x")),
    "FORMAT": archive(("file FORMAT", b"adapterkit-store 1\n"), ("file log", b"")),
    "a blob with another name": archive(("file log", b""), ("blob " + "0" * 64, b"x")),
    "a blob that is a path": archive(("file log", b""), ("blob ../" + "0" * 61, b"x")),
    "more after the end": archive(("file log", b"")) + b"x",
    "another digest": archive(("file log", b""), end=b"end " + b"0" * 64 + b"\n"),
    "a size that is a lie": b"adapterkit-backup 1\nfile log 9999999999999999\nx",
    "a size without an end": b"adapterkit-backup 1\nfile log " + b"9" * 10**6,
    "a log of noise": archive(("file log", b"{}\n")),
    "a torn log": archive(("file log", b'{"author":')),
    "an unknown record": archive(("file log", line("hologram", {"name": "local/x"}))),
    "a record without a name": archive(("file log", line("tag", {}))),
    "a hostile name": archive(
        ("file log", line("rename", {"name": "../../x", "previous": "local/y"}))
    ),
    "a hostile tag": archive(
        ("file log", line("tag", {"name": "local/x", "tag": "a\x1b[2J", "version": "1.0"}))
    ),
    "a name that is no text": archive(
        ("file log", line("rename", {"name": {"a": 1}, "previous": "local/y"}))
    ),
    "a version without blobs": archive(
        ("file log", line("version", {"name": "local/x", "version": "1.0", "id": "0" * 64,
                                      "tags": [], "attachments": []})),
    ),
    "a number that is none": archive(
        ("file log", line("version", {"name": "local/x", "version": "x", "id": "0" * 64,
                                      "tags": [], "attachments": []})),
    ),
    "remotes that are no JSON": archive(("file log", b""), ("file remotes.json", b"x")),
    "large remotes": archive(("file log", b""), ("file remotes.json", b" " * (1 << 21))),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_and_leaves_nothing(name, tmp_path):
    path = tmp_path / "hostile"
    path.write_bytes(HOSTILE[name])
    refused(path, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {"hostile", "refused"}


def test_a_newer_backup_asks_for_a_newer_program(tmp_path):
    path = tmp_path / "newer"
    path.write_bytes(b"adapterkit-backup 2\n")
    refused(path, tmp_path, "newer", AdapterError)


def test_an_interrupted_restore_can_be_repeated(saved, full, tmp_path, faults):
    counting = faults.Counting()
    with Registry(tmp_path / "counted", files=counting) as again:
        again.restore(saved)
    for last in range(1, len(counting.names) + 1, 3):
        home = tmp_path / f"home{last}"

        def work(home=home, last=last):
            with Registry(home, files=faults.Dying(last)) as registry:
                registry.restore(saved)

        assert not faults.in_child(work)
        with Registry(home) if not damaged(home) else Registry(fresh(home)) as registry:
            if not registry.list():
                registry.restore(saved)
            assert answers(registry) == answers(full)


def damaged(home):
    """Between log and FORMAT: the folder says so, and is not taken for an empty one."""
    return (home / "log").exists() and not (home / "FORMAT").exists()


def fresh(home):
    with pytest.raises(DamagedError, match="FORMAT"):
        Registry(home)
    return home.with_name(f"{home.name}-fresh")

"""gc takes away what no version needs, and never what somebody may be about to need."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from adapterkit.registry import ConflictError, DamagedError, InvalidError, Meaning, Registry
from adapterkit.registry import registry as registry_module
from adapterkit.registry.leases import Leases, held
from adapterkit.registry.retention import Retention

NOW = timedelta(0)
LORA = Meaning({"kind": "LORA"})


def stored(registry: Registry) -> set[bytes]:
    paths = (registry.home.path / "blobs" / "sha256").glob("??/*")
    return {path.read_bytes() for path in paths}


def in_trash(registry: Registry) -> set[bytes]:
    return {each.path.read_bytes() for each in registry.home.trash.contents()}


def age(path: Path, seconds: float) -> None:
    before = path.stat().st_mtime
    os.utime(path, (before - seconds, before - seconds))


def test_what_a_version_needs_stays_and_what_a_removed_one_needed_goes_in_two_steps(registry, add):
    meaning = Meaning({"kind": "LORA"}, base={"sketch": sketch(b"map")}, extra=(b"map",))
    registry.add("sql", {"w": b"old", "c": b"both"}, meaning, attachments={"note": b"so so"})
    registry.add("sql", {"w": b"new", "c": b"both"}, LORA)
    registry.rm("sql@1.0")
    plan = registry.gc(NOW, dry_run=True)
    assert sorted(plan.thrown.values()) == [3, 3] and plan.deleted == ()
    assert {b"old", b"map"} <= stored(registry)

    assert registry.gc(NOW) == plan
    assert in_trash(registry) == {b"old", b"map"}
    assert {b"new", b"both", b"so so"} <= stored(registry) and b"old" not in stored(registry)
    assert registry.verify().damage == ()

    assert registry.gc(NOW).freed == 6
    assert in_trash(registry) == set() and list(registry.home.trash.root.iterdir()) == []
    assert registry.files("sql").keys() == {"w", "c"}
    registry.rebuild()
    assert registry.verify().damage == ()
    assert [(e.kind, e.name) for e in registry.attachments("sql@1.1")] == []


def sketch(data: bytes) -> dict[str, object]:
    import hashlib

    return {"digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}


def test_a_removed_version_keeps_its_place_in_the_lineage(registry, add):
    """Invariant 7 of docs/store.md."""
    first = add(b"first")
    parent = {"version": f"sha256:{first.id}", "relation": "finetuned-from"}
    second = add(b"second", meaning=Meaning({"kind": "LORA"}, parents=(parent,)))
    add(b"third", meaning=Meaning({}, parents=({**parent, "version": f"sha256:{second.id}"},)))
    registry.rm("sql@1.1")
    registry.gc(NOW)
    registry.gc(NOW)
    registry.rebuild()
    assert {e.parent for e in registry.lineage("sql@1.2").ancestors} == {first.id, second.id}


def test_young_blobs_and_those_of_versions_just_removed_stay(registry, add):
    add(b"removed")
    registry.put_blob(b"young", registry_digest(b"young"))
    registry.home.leases.close()
    for path in (registry.home.path / "blobs" / "sha256").glob("??/*"):
        if path.read_bytes() == b"removed":
            age(path, 1e6)
    registry.rm("sql")
    plan = registry.gc(timedelta(hours=1))
    assert plan.thrown == {} and plan.spared == 2
    assert registry.gc(NOW).trashed == len(b"removed") + len(b"young")


def registry_digest(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def test_the_trash_is_emptied_after_a_second_grace_only(registry, add):
    add(b"gone")
    registry.rm("sql")
    registry.gc(NOW)
    assert registry.gc(timedelta(hours=1)).deleted == ()
    age(registry.home.trash.root / "1", 7200)
    assert [each.size for each in registry.gc(timedelta(hours=1)).deleted] == [4]


def test_every_collection_that_takes_something_away_is_an_epoch_in_the_log(registry, add):
    for content in (b"one", b"two"):
        add(content)
        registry.rm("sql")
        registry.gc(NOW)
        registry.gc(NOW)
    events = registry.home.read(
        lambda catalog: catalog.rows("SELECT payload FROM events WHERE kind = 'gc'")
    )
    assert [event["payload"] for event in events] == [
        '{"epoch": 1, "n_blobs": 1, "n_bytes": 3}', '{"epoch": 2, "n_blobs": 1, "n_bytes": 3}'
    ]  # fmt: skip


def test_an_add_that_needs_a_trashed_blob_has_it(registry, add):
    add(b"again")
    registry.rm("sql")
    registry.gc(NOW)
    assert in_trash(registry) == {b"again"}
    add(b"again")
    assert in_trash(registry) == set()
    registry.gc(NOW)
    assert registry.files("sql")["w.bin"].read_bytes() == b"again"


def test_a_pull_takes_a_blob_from_the_trash_instead_of_fetching_it(registry, add):
    add(b"again")
    registry.rm("sql")
    registry.gc(NOW)

    def fetch(start: int):
        raise AssertionError("fetched")

    assert not registry.receive(registry_digest(b"again"), 5, fetch).new


def test_what_is_received_stays_until_it_is_published(registry, add):
    done = add(b"published")
    manifest = registry.home.blobs.read(done.id)
    place = registry.home.path.parent / "there"
    with Registry(place) as there, Registry(place) as other:
        there.put_blob(b"published", registry_digest(b"published"))
        assert other.gc(NOW).thrown == {}
        there.publish("sql", "1.0", manifest)
        assert list((there.home.path / "leases").iterdir()) == []
        there.put_blob(b"given up", registry_digest(b"given up"))
        there.close()
        assert other.gc(NOW).trashed == len(b"given up")


def test_leases_of_dead_processes_mean_nothing(registry, add, faults):
    add(b"x")
    digest = registry_digest(b"half")

    def work() -> None:
        with Registry(registry.home.path) as other:
            other.put_blob(b"half", digest)
            faults.die()

    assert not faults.in_child(work)
    assert len(list((registry.home.path / "leases").iterdir())) == 1
    assert list(registry.gc(NOW).thrown) == [digest]
    assert list((registry.home.path / "leases").iterdir()) == []


def test_a_lease_is_counted_and_seen_by_others(tmp_path):
    from adapterkit.registry.files import Files

    one, two = (Leases(tmp_path / "leases", Files()) for _ in range(2))
    a, b = "a" * 64, "b" * 64
    one.take([a, b])
    one.take([a])
    two.take([b])
    one.release([a, b])
    assert held(tmp_path / "leases", Files()) == {a, b}
    two.release([b])
    assert held(tmp_path / "leases", Files()) == {a}
    with one.session():
        one.take([b])
        assert held(tmp_path / "leases", Files()) == {a, b}
    one.release([a])
    assert held(tmp_path / "leases", Files()) == set()
    assert list((tmp_path / "leases").iterdir()) == []


def test_a_blob_taken_away_in_the_middle_of_an_add_is_brought_back(registry, add, monkeypatch):
    """Even where the lease was not seen: the record is written under the same lock."""
    real = registry_module.commit.check_complete

    def meanwhile(manifest, put) -> None:
        real(manifest, put)
        with Registry(registry.home.path) as other, monkeypatch.context() as patch:
            patch.setattr("adapterkit.registry.leases.held", lambda path, files: set())
            assert other.gc(NOW).thrown

    monkeypatch.setattr(registry_module.commit, "check_complete", meanwhile)
    add(b"in the middle")
    assert registry.files("sql")["w.bin"].read_bytes() == b"in the middle"
    assert registry.verify().damage == ()


def test_a_blob_that_is_gone_for_good_stops_the_record(registry, add, monkeypatch):
    add(b"other")

    def meanwhile(manifest, put) -> None:
        for blob in put:
            registry.home.blobs.path(blob.digest).unlink()

    monkeypatch.setattr(registry_module.commit, "check_complete", meanwhile)
    with pytest.raises(ConflictError, match="taken away"):
        add(b"in the middle")
    assert [v.version for v in registry.versions("sql")] == ["1.0"]


def test_nothing_is_taken_away_when_a_manifest_or_the_log_cannot_be_read(registry, add):
    add(b"first")
    add(b"second", name="tone")
    registry.rm("tone")
    path = registry.home.blobs.path(registry.resolve("sql").id)
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(DamagedError, match="nothing is taken away") as caught:
        registry.gc(NOW)
    assert "verify" in caught.value.hint
    path.write_bytes(data)
    log = registry.home.path / "log"
    log.write_bytes(log.read_bytes().replace(b"sql", b"sQl", 1))
    with pytest.raises(DamagedError, match="line 1"):
        registry.gc(NOW)
    assert in_trash(registry) == set()


def test_a_wrong_catalog_makes_gc_take_nothing_that_is_needed(registry, add):
    add(b"precious")
    with registry.home.catalog.transaction():
        registry.home.catalog.db.execute("UPDATE versions SET removed = '2020'")
        registry.home.catalog.db.execute("DELETE FROM files")
    assert registry.gc(NOW).thrown == {}


def test_a_needed_blob_that_lies_in_the_trash_comes_back(registry, add):
    add(b"needed")
    path = registry.files("sql")["w.bin"]
    registry.home.trash.throw(1, [path.name])
    assert registry.verify().damage
    assert registry.gc(NOW).revived == (path.name,)
    assert registry.verify().damage == ()


def test_leftovers_are_removed_when_they_are_a_day_old(registry, add):
    add(b"x")
    old, new = (registry.home.path / "tmp" / f"{name}.part" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    age(old, 90_000)
    assert registry.gc(NOW).leftovers == ("old.part",)
    assert new.exists() and not old.exists()


def test_where_no_registry_is_gc_makes_none(registry):
    assert registry.gc(NOW).thrown == {}
    assert not registry.home.path.exists()


def test_retention_keeps_the_last_the_tagged_and_what_the_name_means(registry, add):
    for n in range(5):
        add(b"%d" % n)
    add(b"pre", version="2.0rc1")
    registry.tag("sql@1.1", "prod")
    registry.tag("sql@1.2", "safe")
    registry.protect("sql:safe")

    def left(retention: Retention) -> list[str]:
        gone = {v.version for v in registry.outdated(retention)}
        return [v.version for v in registry.versions("sql") if v.version not in gone]

    assert left(Retention(keep_last=2)) == ["1.4", "2.0rc1"]
    assert left(Retention(keep_last=1, keep_tagged=True)) == ["1.1", "1.2", "1.4", "2.0rc1"]
    assert left(Retention(keep_last=0)) == ["1.4"]
    assert len(left(Retention(older_than=timedelta(days=1)))) == 6
    assert left(Retention(older_than=NOW, keep_last=3)) == ["1.3", "1.4", "2.0rc1"]
    with pytest.raises(InvalidError):
        Retention(keep_tagged=True)
    assert registry.outdated(Retention(keep_last=0), "other*") == []
    gone = [v.version for v in registry.retain(Retention(keep_last=2))]
    assert gone == ["1.0", "1.1", "1.3"]  # safe is protected
    assert [v.version for v in registry.versions("sql")] == ["1.2", "1.4", "2.0rc1"]


def test_what_is_tagged_while_it_is_decided_stays(registry, add):
    """It is decided again in the step that removes."""
    for n in range(3):
        add(b"%d" % n)

    class Meanwhile(Retention):
        def outdated(self, versions, now):
            found = super().outdated(versions, now)
            if registry.history("sql")[-1].kind != "tag":
                with Registry(registry.home.path) as other:
                    other.tag("sql@1.0", "prod")
            return found

    gone = registry.retain(Meanwhile(keep_last=1, keep_tagged=True))
    assert [v.version for v in gone] == ["1.1"]
    assert registry.resolve("sql:prod").version == "1.0"


ADDER = """
import sys
from pathlib import Path
from adapterkit.registry import Meaning, Registry
with Registry(Path(sys.argv[1])) as registry:
    for n in range(int(sys.argv[2])):
        same = {"w": b"same", "v": f"{n % 3}".encode()}
        ref = registry.add("sql", same, Meaning({"n": n})).ref
        assert registry.files(ref)["w"].read_bytes() == b"same"
        if n % 2:
            registry.rm(ref)
"""


def test_adds_of_one_content_while_others_collect(registry, add):
    add(b"x")
    child = subprocess.Popen([sys.executable, "-c", ADDER, str(registry.home.path), "40"])
    failed: list[BaseException] = []

    def collect() -> None:
        with Registry(registry.home.path) as other:
            while child.poll() is None:
                try:
                    other.gc(NOW)
                except BaseException as error:
                    failed.append(error)
                    return

    threads = [threading.Thread(target=collect) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert child.wait() == 0
    for thread in threads:
        thread.join()
    assert failed == []
    assert registry.verify().damage == ()
    assert len(registry.versions("sql")) == 21

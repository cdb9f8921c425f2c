"""verify names what is damaged, what that affects and how to repair it; and only that."""

from __future__ import annotations

import os
import random
import sqlite3
from datetime import timedelta
from pathlib import Path

import pytest

from adapterkit.registry import DamagedError, Meaning, Registry
from adapterkit.registry.verify import verify, verify_version

pytestmark = pytest.mark.timeout(3000)  # the full figures take their time
SKETCH = b"sketch of the base"


def fill(home: Path) -> None:
    import hashlib

    sketch = {"digest": f"sha256:{hashlib.sha256(SKETCH).hexdigest()}", "size": len(SKETCH)}
    meaning = Meaning({"kind": "LORA"}, base={"id": "org/base", "sketch": sketch}, extra=(SKETCH,))
    with Registry(home) as registry:
        made = registry.add(
            "team/sql", {"w.bin": b"weights" * 100, "README.md": b"A card"}, meaning,
            tags=["best"], attachments={"note": b"a good one", "metrics": b'{"loss": 1.5}'},
            roles={"README.md": "card"},
        )  # fmt: skip
        parent = {"version": f"sha256:{made.id}", "relation": "finetuned-from"}
        registry.add("tone", {"w.bin": b"tone"}, Meaning({"kind": "LORA"}, parents=(parent,)))
        registry.tag("tone", "prod")
        registry.rm("tone:prod")
        registry.add("gone", {"w.bin": b"gone"}, Meaning({"kind": "LORA"}))
        registry.rm("gone")


@pytest.fixture
def filled(tmp_path):
    fill(tmp_path / "home")
    return tmp_path / "home"


def blob(home: Path, ref: str, path: str) -> Path:
    with Registry(home) as registry:
        return registry.files(ref)[path]


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def only(found):
    (problem,) = found.damage
    return problem


def test_a_sound_registry_has_no_problems(filled):
    found = verify(filled)
    assert found.damage == ()
    assert [(n.what, n.where[:6]) for n in found.notes] == [("orphan", "blobs/")]  # of gone@1.0
    assert found.n_blobs == 10 and found.n_records == 6


def test_where_no_registry_is_there_is_nothing_to_find(tmp_path):
    assert verify(tmp_path / "nothing").problems == ()
    assert not (tmp_path / "nothing").exists()


def test_a_changed_a_truncated_and_a_missing_blob_are_named(filled):
    weights, card = blob(filled, "team/sql", "w.bin"), blob(filled, "team/sql", "README.md")
    tone = blob(filled, "tone", "w.bin")
    overwrite(weights, weights.read_bytes()[:-1])
    overwrite(card, b"A Card")
    tone.unlink()
    found = verify(filled).damage
    told = {problem.where: (problem.what, problem.affects) for problem in found}
    assert told == {
        weights.relative_to(filled).as_posix(): ("truncated", ("team/sql@1.0: w.bin",)),
        card.relative_to(filled).as_posix(): ("changed", ("team/sql@1.0: README.md",)),
        tone.relative_to(filled).as_posix(): ("missing", ("tone@1.0: w.bin",)),
    }
    assert all("--repair-from" in problem.repair for problem in found)


def test_the_repair_that_is_named_repairs(filled):
    weights = blob(filled, "team/sql", "w.bin")
    overwrite(weights, b"rotten")
    assert verify(filled).damage
    with Registry(filled) as registry:
        registry.put_blob(b"weights" * 100, weights.name)
    assert not verify(filled).damage


@pytest.mark.parametrize("again", ["bytes", "a file"])
def test_a_damaged_blob_that_is_added_again_is_whole(filled, tmp_path, again):
    weights = blob(filled, "team/sql", "w.bin")
    good, source = weights.read_bytes(), tmp_path / "w.bin"
    source.write_bytes(good)
    overwrite(weights, good[:-1] + b"!")
    assert only(verify(filled)).what == "changed"
    with Registry(filled) as registry:
        registry.add("other", {"w.bin": good if again == "bytes" else source}, Meaning({}))
    assert verify(filled).damage == ()
    assert weights.read_bytes() == good


def test_what_is_written_to_files_outside_never_reaches_a_blob(filled, tmp_path):
    """Not even what root writes, whom no mode stops: what was added and what was exported are
    files of their own."""
    source, exported = tmp_path / "w.bin", tmp_path / "out" / "w.bin"
    source.write_bytes(b"outside")
    with Registry(filled) as registry:
        registry.add("outside", {"w.bin": source}, Meaning({}))
        registry.export("outside", exported.parent)
    for path in (source, exported):
        path.chmod(0o644)
        os.truncate(path, 3)
        with path.open("r+b") as file:
            file.write(b"other bytes")
    assert verify(filled).damage == ()
    assert blob(filled, "outside", "w.bin").read_bytes() == b"outside"


def test_one_version_can_be_verified_alone(filled):
    overwrite(blob(filled, "team/sql", "w.bin"), b"rotten")
    with Registry(filled) as registry:
        sql, tone = (registry.resolve(name).ref for name in ("team/sql", "tone"))
        assert only(verify_version(registry.home, sql)).affects == ("team/sql@1.0: w.bin",)
        assert verify_version(registry.home, sql).n_blobs == 6
        assert verify_version(registry.home, tone).problems == ()


def test_bytes_are_read_even_when_the_stamp_is_that_of_good_ones(filled):
    """Rot on the disk does not change the time of a file."""
    weights = blob(filled, "team/sql", "w.bin")
    before = weights.stat()
    overwrite(weights, b"Weights" * 100)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert only(verify(filled)).what == "changed"


def test_a_lost_manifest_is_named_and_what_it_lists_is_no_orphan(filled):
    with Registry(filled) as registry:
        id = registry.resolve("team/sql").id
        path = registry.home.blobs.path(id)
    path.unlink()
    problem = only(verify(filled))
    assert (problem.what, problem.affects) == ("missing", ("team/sql@1.0: manifest",))
    (filled / "catalog.db").unlink()  # which kept a copy of it
    found = verify(filled)
    assert only(found).affects == ("team/sql@1.0: manifest",)
    assert found.notes == ()


def test_what_is_no_blob_is_named(filled):
    weights = blob(filled, "team/sql", "w.bin")
    folder = filled / "blobs" / "sha256"
    (folder / "zz").mkdir()
    weights.rename(folder / "zz" / weights.name)
    (folder / "README").write_text("hello")
    (filled / "blobs" / "other").write_text("hello")
    weights.symlink_to("/etc/passwd")
    found = {(p.what, p.where) for p in verify(filled).damage}
    assert found == {
        ("misnamed", f"blobs/sha256/zz/{weights.name}"),
        ("misnamed", "blobs/sha256/README"),
        ("misnamed", "blobs/other"),
        ("unreadable", weights.relative_to(filled).as_posix()),
    }
    weights.unlink()
    moved = next(p for p in verify(filled).damage if p.where.endswith(weights.name))
    assert moved.affects == ("team/sql@1.0: w.bin",)
    assert moved.repair == f"rename it to {weights.relative_to(filled).as_posix()}"


def test_leftovers_and_strangers_are_notes_not_damage(filled):
    (filled / "tmp" / "x.part").write_bytes(b"half")
    (filled / "diary.txt").write_text("dear")
    found = verify(filled)
    assert found.damage == ()
    assert {n.where for n in found.notes} >= {"tmp/x.part", "diary.txt"}


def lines(home: Path) -> list[bytes]:
    return (home / "log").read_bytes().splitlines(keepends=True)


def test_every_damaged_line_of_the_log_is_named_with_what_it_said(filled):
    have = lines(filled)
    have[1], have[3] = have[1].replace(b"tone", b"tune"), b"garbage\n"
    (filled / "log").write_bytes(b"".join(have))
    found = verify(filled).damage
    assert [(p.what, p.where) for p in found] == [("log", "log, line 2"), ("log", "log, line 4")]
    assert [p.affects for p in found] == [("local/tone (version)",), ("local/tone (untag)",)]


@pytest.mark.parametrize("gone", [0, 2, 5], ids=["first", "middle", "last"])
def test_a_line_that_is_gone_is_named(filled, gone):
    have = lines(filled)
    (filled / "log").write_bytes(b"".join(have[:gone] + have[gone + 1 :]))
    found = verify(filled).damage
    assert [p.where for p in found] == [f"log, line {gone + 1}"]


def test_two_lines_that_became_one_and_one_that_became_two_are_named(filled):
    have = lines(filled)
    (filled / "log").write_bytes(b"".join([have[0], have[1][:-1], b"x", *have[2:]]))
    assert [p.where for p in verify(filled).damage] == ["log, line 2", "log, line 3"]
    split = have[1][:40] + b"\n" + have[1][40:]
    (filled / "log").write_bytes(b"".join([have[0], split, *have[2:]]))
    assert [p.where for p in verify(filled).damage] == ["log, line 2"]


def test_a_torn_line_is_a_note_unless_the_catalog_has_seen_it(filled):
    whole = (filled / "log").read_bytes()
    (filled / "log").write_bytes(whole + b'{"author":"a@b","dig')
    found = verify(filled)
    assert found.damage == ()
    assert ("torn", "log, line 7") in {(n.what, n.where) for n in found.notes}
    (filled / "log").write_bytes(whole[:-1])
    assert only(verify(filled)).where == "log, line 6"


def test_a_lost_log_or_format_is_named(filled):
    (filled / "FORMAT").write_text("adapterkit-store 0\n")
    assert only(verify(filled)).what == "format"
    (filled / "FORMAT").write_text("adapterkit-store 9\n")
    assert only(verify(filled)).what == "format"
    (filled / "FORMAT").write_text("adapterkit-store 1\n")
    (filled / "log").unlink()
    assert {p.what for p in verify(filled).damage} == {"format", "log"}


WRONG = {
    "tags": "INSERT INTO tags SELECT name, 'prod', sort FROM versions WHERE name = 'local/tone'",
    "versions": "UPDATE versions SET removed = NULL WHERE name = 'local/gone'",
    "manifests": "UPDATE manifests SET rank = 64",
    "attachments": "DELETE FROM attachments",
    "edges": "DELETE FROM edges",
    "events": "UPDATE events SET author = 'mallory@host' WHERE seq = 3",
    "search": "UPDATE search SET notes = 'bad' WHERE notes LIKE '%good%'",
    "metrics": "UPDATE metrics SET value = 0.1",
}


@pytest.mark.parametrize("table", WRONG)
def test_a_wrong_row_of_the_catalog_is_found_and_rebuilding_repairs_it(filled, table):
    with sqlite3.connect(filled / "catalog.db") as db:
        db.execute(WRONG[table])
    db.close()
    found = verify(filled)
    assert f"catalog.db, table {table}" in {p.where for p in found.damage}
    assert {p.repair for p in found.damage} == {"adapter verify --rebuild"}
    with Registry(filled) as registry:
        registry.home.rebuild()
    assert verify(filled).damage == ()


def test_a_catalog_that_is_behind_or_missing_is_no_damage(filled):
    data = (filled / "catalog.db").read_bytes()
    with Registry(filled) as registry:
        registry.tag("tone", "new")
    (filled / "catalog.db").write_bytes(data)
    assert verify(filled).damage == ()
    (filled / "catalog.db").unlink()
    assert verify(filled).damage == ()
    assert not (filled / "catalog.db").exists()


def test_verify_changes_nothing(filled):
    def snapshot() -> dict[str, bytes]:
        paths = [p for p in filled.rglob("*") if p.is_file() and "catalog.db-" not in p.name]
        return {str(p): p.read_bytes() for p in paths}

    (filled / "log").write_bytes((filled / "log").read_bytes() + b"torn")
    before = snapshot()
    verify(filled)
    assert snapshot() == before


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    overwrite(path, data)


def test_every_flipped_bit_of_blobs_manifests_and_log_is_found_and_named(filled, proof):
    """Invariants 1 and 4 of docs/store.md."""
    paths = [*(filled / "blobs").rglob("*"), filled / "log"]
    paths = [path for path in paths if path.is_file()]
    # By bytes, so that every one has the same chance; half of them in the log.
    sizes = [path.stat().st_size for path in paths]
    chosen = random.Random(1)
    for number in range(proof(150, 1000)):
        path = paths[-1] if number % 2 else chosen.choices(paths, sizes)[0]
        data, bit = path.read_bytes(), chosen.randrange(path.stat().st_size * 8)
        flip(path, bit)
        where = {p.where.partition(",")[0] for p in verify(filled).damage}
        assert path.relative_to(filled).as_posix() in where, (path, bit)
        overwrite(path, data)


def answers(home: Path) -> object:
    with Registry(home) as registry:
        versions = registry.list()
        return (
            versions,
            [registry.search(text) for text in ("good", "lora", "card", "base")],
            [registry.lineage(v.ref) for v in versions],
            [registry.attachments(v.ref) for v in versions],
            [registry.manifest(v.ref) for v in versions],
            [registry.history(name) for name in ("team/sql", "tone", "gone")],
            [registry.metrics(v.ref) for v in versions],
            [str(p) for v in versions for p in registry.files(v.ref).values()],
        )


def same_answers(home: Path, expected: object) -> bool:
    try:
        return answers(home) == expected
    except Exception:  # whatever: it is not a wrong answer, and verify must tell of it
        return False


@pytest.mark.filterwarnings("ignore")
def test_a_flipped_bit_of_the_catalog_gives_no_answer_that_verify_calls_good(filled, proof):
    expected = answers(filled)
    path = filled / "catalog.db"
    good, chosen = path.read_bytes(), random.Random(2)
    for _ in range(proof(100, 1000)):
        bit = chosen.randrange(len(good) * 8)
        path.write_bytes(good)
        flip(path, bit)
        told = verify(filled).damage
        assert path.stat().st_size == len(good)
        if not same_answers(filled, expected):
            assert told, bit
            with Registry(filled) as registry:
                registry.home.rebuild()
            assert same_answers(filled, expected)
            assert verify(filled).damage == ()
        for side in ("-wal", "-shm"):
            path.with_name(path.name + side).unlink(missing_ok=True)


LOSSES = {
    "garbage": lambda home: (home / "catalog.db").write_bytes(b"garbage" * 2000),
    "a lost line": lambda home: (home / "log").write_bytes(b"".join(lines(home)[:-1])),
    "a lost manifest": lambda home: next(manifest_of(home, "tone")).unlink(),
}


def manifest_of(home: Path, name: str):
    with Registry(home) as registry:
        yield registry.home.blobs.path(registry.resolve(name).id)


@pytest.mark.filterwarnings("ignore:the catalog of")
@pytest.mark.parametrize("loss", LOSSES)
def test_a_catalog_that_may_know_more_is_kept_when_it_is_replaced(filled, loss):
    LOSSES[loss](filled)
    before = (filled / "catalog.db").read_bytes()
    with Registry(filled) as registry:
        registry.rebuild()
    assert (filled / "catalog.lost").read_bytes() == before
    notes = [note for note in verify(filled).notes if note.where == "catalog.lost"]
    assert [note.what for note in notes] == ["stray"]
    assert verify(filled).damage == () or loss == "a lost manifest"


def test_a_catalog_that_knows_nothing_more_is_not_kept(filled):
    with sqlite3.connect(filled / "catalog.db") as db:
        db.execute("UPDATE tags SET sort = 'x'")
    db.close()
    for _ in range(2):
        with Registry(filled) as registry:
            registry.rebuild()
    assert not (filled / "catalog.lost").exists() and verify(filled).damage == ()


def test_no_kept_catalog_replaces_another(filled):
    for number in range(3):
        (filled / "catalog.db").write_bytes(b"garbage %d" % number * 1000)
        with Registry(filled) as registry:
            assert len(registry.list()) == 2
    kept = [filled / name for name in ("catalog.lost", "catalog.lost-2", "catalog.lost-3")]
    assert [path.read_bytes()[:9] for path in kept] == [b"garbage %d" % n for n in range(3)]


def test_a_log_that_cannot_be_read_leaves_the_catalog_as_it_is(filled):
    have = lines(filled)
    (filled / "log").write_bytes(b"".join(have).replace(b"tone", b"tune", 1))
    before = (filled / "catalog.db").read_bytes()
    with Registry(filled) as registry, pytest.raises(DamagedError, match="line 2"):
        registry.rebuild()
    assert (filled / "catalog.db").read_bytes() == before
    assert [path.name for path in (filled / "tmp").iterdir()] == []


def test_words_are_found_again_after_a_lost_manifest_is_back(filled):
    """Also those of notes, which were there all the time."""
    (path,) = manifest_of(filled, "team/sql")
    data = path.read_bytes()
    path.unlink()
    with Registry(filled) as registry:
        registry.rebuild()
    path.write_bytes(data)
    with Registry(filled) as registry:
        registry.publish("team/sql", "1.0", data)
        assert [v.name for v in registry.search("good card")] == ["team/sql"]
    assert verify(filled).damage == ()


def test_what_is_removed_and_collected_meanwhile_is_no_damage(filled):
    """After it was listed: neither what a version needed, nor what nothing needed."""
    with Registry(filled) as other:
        done = []

        def meanwhile(size: int) -> None:
            if not done:
                done.append(size)
                other.rm("tone")
                other.gc(timedelta(0))

        found = verify(filled, progress=meanwhile)
    assert done and found.damage == ()
    assert verify(filled).damage == ()

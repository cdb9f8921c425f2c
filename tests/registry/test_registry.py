"""What a user of the registry is promised."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import threading

import pytest

from adapterkit.registry import (
    AdapterError,
    AdapterWarning,
    ConflictError,
    DamagedError,
    InvalidError,
    Manifest,
    Meaning,
    NotFoundError,
    Ref,
    Registry,
)
from adapterkit.registry.log import make_record
from adapterkit.registry.reading import default_home

LORA = Meaning(
    {"kind": "LORA", "rank": 8, "target_modules": ["q_proj", "v_proj"], "variant": "DoRA"},
    base={"id": "org/base"},
)


def refs(versions):
    return [str(version.ref) for version in versions]


def test_reading_creates_nothing(home, registry):
    assert registry.list() == [] and registry.versions("sql") == []
    with pytest.raises(NotFoundError):
        registry.resolve("sql")
    assert not home.exists()


def test_worked_example(registry):
    files = {"w.safetensors": b"abc", "sub/card.md": b"# x"}
    added = registry.add(
        "team/sql", files, LORA, tags=["best"], roles={"w.safetensors": "weights"},
        attachments={"metrics": b'{"loss":0.5}', "note/why": b"first try"},
    )  # fmt: skip
    assert (added.ref, added.created, added.size) == (Ref.parse("team/sql@1.0"), True, 6)
    version = registry.resolve("team/sql")
    assert (version.name, version.version, version.id) == ("team/sql", "1.0", added.id)
    assert (version.tags, version.size, version.n_files) == (("best",), 6, 2)
    assert (version.facts.kind, version.facts.rank, version.facts.base) == ("LORA", 8, "org/base")
    assert version.facts.targets == ("q_proj", "v_proj")
    manifest = registry.manifest("team/sql:best")
    assert manifest.id == added.id
    assert {f.path: f.role for f in manifest.files} == {
        "sub/card.md": "file",
        "w.safetensors": "weights",
    }
    found = registry.files(f"team/sql@sha256:{added.id[:12]}")
    assert {path: blob.read_bytes() for path, blob in found.items()} == files
    assert registry.metrics("team/sql") == {"loss": 0.5}
    assert [a.kind for a in registry.attachments("team/sql")] == ["metrics", "note"]


def test_versions_are_numbered_1_0_1_1_and_so_on(add):
    assert [str(add(bytes([n])).ref) for n in range(3)] == ["sql@1.0", "sql@1.1", "sql@1.2"]


def test_the_same_again_stores_nothing_and_says_so(registry, add, home):
    one = add()
    before = sorted(home.rglob("*")), (home / "log").read_bytes()
    two = add()
    assert (two.ref, two.id, two.created, two.new_bytes) == (one.ref, one.id, False, 0)
    assert (sorted(home.rglob("*")), (home / "log").read_bytes()) == before


def test_the_same_bytes_under_another_name_are_stored_once(add):
    one, two = add(name="a"), add(name="b")
    assert two.created and two.id == one.id and two.new_bytes == 0


def test_the_same_content_may_have_two_numbers(registry, add):
    one, two = add(), add(version="2.0")
    assert two.created and one.id == two.id
    assert str(registry.resolve(f"sql@sha256:{one.id}").ref) == "sql@2.0"


def test_a_published_version_never_changes(registry, add):
    """Invariant 3 of docs/store.md."""
    one = add(version="1.0")
    with pytest.raises(ConflictError, match=one.id[:12]):
        add(b"other", version="1.0")
    with pytest.raises(ConflictError):
        add(b"other", version="1.0.0")  # the same number, by PEP 440
    assert registry.resolve("sql").id == one.id


def test_a_removed_number_is_never_used_for_something_else(registry, add):
    """Invariant 3 of docs/store.md."""
    add(), add(b"2")
    registry.rm("sql@1.1")
    assert refs(registry.list()) == ["sql@1.0"]
    with pytest.raises(NotFoundError, match="removed"):
        registry.resolve("sql@1.1")
    with pytest.raises(ConflictError, match="removed"):
        add(b"3", version="1.1")
    assert str(add(b"3").ref) == "sql@1.2"
    assert str(add(b"2", version="1.1").ref) == "sql@1.1"  # the same content may come back


def test_latest_is_the_highest_release(registry, add):
    for content, version in ((b"1", "1.10"), (b"2", "1.9"), (b"3", "2.0rc1")):
        add(content, version=version)
    assert str(registry.resolve("sql").ref) == "sql@1.10"
    assert registry.resolve("sql:latest") == registry.resolve("sql")
    registry.rm("sql@1.10"), registry.rm("sql@1.9")
    assert str(registry.resolve("sql").ref) == "sql@2.0rc1"
    assert refs(registry.versions("sql")) == ["sql@2.0rc1"]


def test_tags_move_and_keep_their_history(registry, add):
    add(b"1"), add(b"2")
    assert registry.tag("sql@1.0", "best") is None
    assert registry.tag("sql@1.1", "best").version == "1.0"
    assert registry.tag("sql@1.1", "best").version == "1.1"
    assert registry.resolve("sql:best").version == "1.1"
    moves = [e.payload for e in registry.history("sql") if e.kind == "tag"]
    assert [(m["previous"], m["version"]) for m in moves] == [(None, "1.0"), ("1.0", "1.1")]
    assert registry.rm("sql:best").version == "1.1"
    with pytest.raises(NotFoundError):
        registry.resolve("sql:best")
    assert refs(registry.list()) == ["sql@1.0", "sql@1.1"]


def test_a_removed_version_takes_its_tags_with_it(registry, add):
    add(tags=["best"])
    registry.rm("sql@1.0")
    with pytest.raises(NotFoundError):
        registry.resolve("sql:best")


@pytest.mark.parametrize("tag", ["latest", "1.0", "v2", "a b", "", "../x"])
def test_words_that_cannot_be_tags(registry, add, tag):
    add()
    with pytest.raises(InvalidError):
        registry.tag("sql", tag)
    with pytest.raises(InvalidError):
        add(b"2", tags=[tag])
    assert refs(registry.list()) == ["sql@1.0"]


def test_rm_of_a_bare_name_is_refused_when_it_could_mean_several(registry, add):
    add(b"1"), add(b"2")
    with pytest.raises(InvalidError, match=r"1\.0, 1\.1") as caught:
        registry.rm("sql")
    assert "sql@1.1" in caught.value.hint
    registry.rm("sql@1.0")
    assert registry.rm("sql").version == "1.1"
    assert registry.list() == []


def test_patterns_match_names_with_and_without_local(registry, add):
    add(name="sql"), add(name="team/sql"), add(name="team/tone")
    assert refs(registry.list("team/*")) == ["team/sql@1.0", "team/tone@1.0"]
    assert refs(registry.list("s*")) == ["sql@1.0"]
    assert refs(registry.list("local/*")) == ["sql@1.0"]
    assert registry.list("x*") == []


def test_search_finds_targets_notes_and_names(registry, add):
    add(meaning=LORA), add(b"2", name="tone")
    registry.attach("tone", "note", b"answers politely", "why")
    for text in ("q_proj", "dora", "org/base q_proj"):
        assert refs(registry.search(text)) == ["sql@1.0"]
    assert refs(registry.search("politely")) == ["tone@1.0"]
    assert refs(registry.search("tone")) == ["tone@1.0"]
    assert registry.search('"') == [] and registry.search("no AND OR (") == []


def test_not_found_says_what_there_is(registry, add, tmp_path, monkeypatch):
    add(tags=["best"])
    with pytest.raises(NotFoundError) as caught:
        registry.resolve("sql@3.0")
    assert caught.value.hint == "sql has 1.0, best"
    with pytest.raises(NotFoundError) as caught:
        registry.resolve("sqll")
    assert "sql" in caught.value.hint
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError) as caught:
        registry.resolve("here")
    assert "./here" in caught.value.hint


def test_a_short_digest_must_be_unique(registry, add):
    """All ids start alike only when very many exist, so the catalog is told so."""
    add(b"1"), add(b"2")
    with registry.home.write() as change:
        for number, end in (("1.0", "a"), ("1.1", "b")):
            id = "c" * 63 + end
            change.catalog.db.execute(
                "UPDATE manifests SET id = ? WHERE id ="
                " (SELECT id FROM versions WHERE version = ?)", [id, number],
            )  # fmt: skip
            change.catalog.db.execute("UPDATE versions SET id = ? WHERE version = ?", [id, number])
    with pytest.raises(InvalidError, match="several"):
        registry.resolve("sql@sha256:cccccccccccc")
    assert registry.resolve(f"sql@sha256:{'c' * 63}b").version == "1.1"


def test_attachments_do_not_change_the_version(registry, add):
    one = add()
    registry.attach("sql", "metrics", b'{"loss":0.5,"acc":1}')
    registry.attach("sql", "metrics", b'{"loss":0.25}', "later")
    registry.attach("sql", "metrics", b'{"loss":0.25}', "later")
    assert registry.metrics("sql") == {"loss": 0.25, "acc": 1}
    assert len(registry.attachments("sql")) == 2
    assert registry.resolve("sql").id == one.id
    note = registry.attach("sql", "note", "naïve".encode(), "why")
    assert registry.read_attachment(note).decode() == "naïve"
    assert note.subject == one.id and note.author and note.created


@pytest.mark.parametrize(
    ("key", "data"),
    [
        ("metrics", b"[1]"),
        ("metrics", b'{"a":"x"}'),
        ("metrics", b'{"a":NaN}'),
        ("metrics", b'{"a":true}'),
        ("note", b"\xff"),
        ("Bad Kind", b""),
        ("note/../x", b""),
        ("note/", b""),
    ],
)
def test_bad_attachments_are_refused_before_anything_is_stored(registry, home, key, data):
    with pytest.raises(InvalidError):
        registry.add("sql", {"w": b"x"}, LORA, attachments={key: data})
    assert not home.exists()


def test_lineage_reaches_in_both_directions(registry, add):
    def child_of(content, *parents):
        given = tuple({"version": f"sha256:{p.id}", "relation": "finetuned-from"} for p in parents)
        return add(content, meaning=Meaning({}, parents=given))

    first = add()
    second = child_of(b"2", first)
    third = child_of(b"3", second)
    up = registry.lineage(third.ref)
    assert {(str(e.child_ref), str(e.parent_ref)) for e in up.ancestors} == {
        ("sql@1.2", "sql@1.1"),
        ("sql@1.1", "sql@1.0"),
    }
    assert up.descendants == ()
    registry.rm("sql@1.1")
    down = registry.lineage(first.ref)
    assert [(str(e.child_ref), e.child) for e in down.descendants if e.parent == first.id] == [
        ("None", second.id)
    ]
    assert len(down.descendants) == 2


def test_a_parent_may_be_unknown_here(registry, add):
    add(meaning=Meaning({}, parents=({"version": f"sha256:{'0' * 64}", "relation": "x"},)))
    (edge,) = registry.lineage("sql").ancestors
    assert edge.parent == "0" * 64 and edge.parent_ref is None


def test_the_manifest_may_refer_to_further_blobs(registry):
    sketch = b"sketch"
    entry = {"digest": f"sha256:{hashlib.sha256(sketch).hexdigest()}", "size": len(sketch)}
    meaning = Meaning({}, base={"sketch": entry}, extra=(sketch,))
    registry.add("sql", {"w": b"x"}, meaning)
    assert registry.blob(entry["digest"]).read_bytes() == sketch
    with pytest.raises(InvalidError, match="not given"):
        registry.add("sql", {"w": b"y"}, Meaning({}, base={"sketch": entry}))


def test_rotten_blobs_are_found_and_named(registry, add):
    add()
    path = registry.files("sql")["w.bin"]
    path.chmod(0o644)
    path.write_bytes(b"wEights")
    with pytest.raises(DamagedError, match=r"w\.bin"):
        registry.files("sql")
    with pytest.raises(DamagedError, match=r"w\.bin"):
        registry.export("sql", path.parent / "out")
    assert add().new_bytes > 0  # the same files again repair it
    assert registry.files("sql")["w.bin"].read_bytes() == b"weights"
    path.unlink()
    with pytest.raises(DamagedError, match=r"w\.bin"):
        registry.files("sql")


def test_blobs_are_read_again_only_when_they_look_different(registry, add, monkeypatch):
    add()
    calls = []
    real = registry.home.blobs.intact
    monkeypatch.setattr(registry.home.blobs, "intact", lambda d: calls.append(d) or real(d))
    path = registry.files("sql")["w.bin"]
    assert calls == []
    os.utime(path, ns=(1, 1))
    registry.files("sql")
    assert len(calls) == 1
    registry.files("sql")
    assert len(calls) == 1


def test_export_writes_the_files_and_only_into_an_empty_folder(registry, tmp_path):
    files = {"a": b"1", "sub/dir/b": b"2"}
    registry.add("sql", files, LORA)
    out = tmp_path / "deep" / "out"
    registry.export("sql", out)
    assert {
        p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()
    } == files
    assert (out / "a").stat().st_mode & 0o200  # not read-only like the blob
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    (tmp_path / "empty").mkdir()
    registry.export("sql", tmp_path / "empty")
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for taken in (out, tmp_path / "file", tmp_path / "dangling"):
        with pytest.raises(ConflictError):
            registry.export("sql", taken)
    assert not (tmp_path / "nowhere").exists()


def test_export_keeps_an_empty_folder_that_is_there(registry, tmp_path, monkeypatch, faults):
    """It may be the current one of a shell."""
    registry.add("sql", {"a": b"1", "b": b"2", "c/d": b"3"}, LORA)
    here = tmp_path / "here"
    here.mkdir()
    inode = here.stat().st_ino
    monkeypatch.chdir(here)

    def second(number, name):
        if name == "rename" and faulty.names.count(name) == 2:
            raise OSError(28, "No space left on device")

    registry.home.files = faulty = faults.Counting(second)
    with pytest.raises(AdapterError, match="No space"):
        registry.export("sql", here)
    assert list(here.iterdir()) == []
    registry.home.files = faults.Counting()
    registry.export("sql", here)
    assert (here / "c" / "d").read_bytes() == b"3" and here.stat().st_ino == inode
    assert sorted(p.name for p in here.iterdir()) == ["a", "b", "c"]


def test_export_of_a_damaged_version_leaves_nothing(registry, tmp_path):
    registry.add("sql", {"a": b"1", "b": b"2"}, LORA)
    registry.files("sql")["b"].unlink()
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(DamagedError, match="b"):
        registry.export("sql", place / "out")
    assert list(place.iterdir()) == []


def test_publish_takes_a_manifest_as_it_is(registry, add, tmp_path):
    one = add(attachments={"note": b"hi"})
    data = registry.manifest("sql").dump()
    with Registry(tmp_path / "other") as other:
        with pytest.raises(DamagedError, match="lacks"):
            other.publish("team/sql", "3.1", data)
        assert other.list() == []
        for digest, size in registry.manifest("sql").blobs().items():
            assert list(other.missing([digest])) == [digest]
            other.put_blob(registry.blob(digest), digest, size)
        (note,) = registry.attachments("sql")
        other.put_blob(registry.blob(note.digest), note.digest)
        done = other.publish("team/sql", "3.1", data, ["prod"], [note])
        assert (done.id, done.created) == (one.id, True)
        assert other.publish("team/sql", "3.1", data).created is False
        assert other.resolve("team/sql:prod").version == "3.1"
        assert other.read_attachment(other.attachments("team/sql")[0]) == b"hi"
        wrong = Manifest.parse(data).dump().replace(b"LORA", b"DORA")
        with pytest.raises(ConflictError):
            other.publish("team/sql", "3.1", wrong)
        assert other.resolve("team/sql").id == one.id


@pytest.mark.parametrize("name", ["sql@1.0", "sql:best", "../x", "a/b/c", ""])
def test_add_takes_a_name_only(registry, name):
    with pytest.raises(InvalidError):
        registry.add(name, {"w": b"x"}, LORA)


def test_hostile_facts_are_ignored_not_trusted(registry):
    odd = {"kind": {"a": 1}, "rank": "x", "target_modules": [1, "q", None], "format": 3}
    trained_on = {"trained_on": {"method": []}}
    registry.add("sql", {"w": b"x"}, Meaning(odd, base={"id": 5}, quantization=trained_on))
    facts = registry.resolve("sql").facts
    assert (facts.kind, facts.rank, facts.targets, facts.base) == ("", None, ("q",), "")


def test_author_and_time_stand_in_the_log(registry, add, monkeypatch):
    monkeypatch.setenv("ADAPTERKIT_AUTHOR", "ann@lab\n")
    add()
    version = registry.resolve("sql")
    assert version.author == "ann@lab" and version.created.endswith("Z")


def test_the_home_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTERKIT_HOME", str(tmp_path / "x"))
    assert default_home() == tmp_path / "x"
    monkeypatch.delenv("ADAPTERKIT_HOME")
    assert default_home().name == "adapterkit"


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        ("adapterkit-store 2\n", AdapterError, "newer"),
        ("something\n", DamagedError, "FORMAT"),
        ("", DamagedError, "FORMAT"),
    ],
)
def test_another_format_is_refused(home, registry, add, content, error, said):
    add()
    (home / "FORMAT").write_text(content)
    with pytest.raises(error, match=said):
        Registry(home)


def test_a_folder_that_is_something_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InvalidError, match=r"thesis\.tex"):
        Registry(tmp_path)
    with pytest.raises(InvalidError, match="is a file"):
        Registry(tmp_path / "thesis.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_lost_log_or_format_is_not_an_empty_registry(home, registry, add):
    add()
    (home / "log").rename(home / "saved")
    with pytest.raises(DamagedError, match="log"):
        Registry(home)
    (home / "saved").rename(home / "log")
    (home / "FORMAT").unlink()
    with pytest.raises(DamagedError, match="FORMAT"):
        Registry(home)


def dump(registry):
    """Everything the registry answers, to compare two of them."""
    versions = registry.list()
    return (
        versions,
        [registry.manifest(v.ref) for v in versions],
        [registry.attachments(v.ref) for v in versions],
        [registry.lineage(v.ref) for v in versions],
        {name: registry.history(name) for name in sorted({v.name for v in versions})},
        registry.search("q_proj"),
        registry.search("politely"),
    )


@pytest.fixture
def full(registry, add):
    one = add(tags=["best"], meaning=LORA)
    add(b"2", attachments={"metrics": b'{"a":1}', "note": b"politely"})
    add(
        b"3",
        name="tone",
        meaning=Meaning({}, parents=({"version": f"sha256:{one.id}", "relation": "x"},)),
    )
    add(b"4")
    registry.rm("sql@1.2")
    registry.tag("sql@1.1", "best")
    return registry


def test_a_deleted_catalog_is_made_anew_and_equal(home, full):
    """Invariant 5 of docs/store.md."""
    before = dump(full)
    full.close()
    for path in home.glob("catalog.db*"):
        path.unlink()
    with Registry(home) as again:
        assert dump(again) == before


@pytest.mark.parametrize(
    "damage", ["garbage", "truncated", "other schema", "empty", "dropped table"]
)
def test_a_broken_catalog_is_made_anew(home, full, damage):
    before = dump(full)
    full.close()
    path = home / "catalog.db"
    if damage == "garbage":
        path.write_bytes(b"not a database at all" * 100)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        connection = sqlite3.connect(path)
        order = "PRAGMA user_version = 999" if damage == "other schema" else "DROP TABLE versions"
        connection.execute(order)
        connection.commit()
        connection.close()
    with Registry(home) as again:
        assert dump(again) == before


def test_a_catalog_that_breaks_while_open_is_made_anew(home, full):
    before = dump(full)
    full.home.catalog.db.execute("DROP TABLE versions")
    assert dump(full) == before


def test_a_catalog_of_another_log_is_not_believed(home, full, tmp_path):
    with Registry(tmp_path / "other") as other:
        other.add("stranger", {"w": b"x"}, LORA)
    full.close()
    for path in home.glob("catalog.db*"):
        path.unlink()
    shutil.copy(tmp_path / "other" / "catalog.db", home / "catalog.db")
    with pytest.warns(AdapterWarning, match="another"), Registry(home) as again:
        assert {v.name for v in again.list()} == {"local/sql", "local/tone"}


def test_a_lost_manifest_damages_its_version_only(home, full):
    lost = full.resolve("sql@1.0")
    full.close()
    (home / "blobs" / "sha256" / lost.id[:2] / lost.id).unlink()
    for path in home.glob("catalog.db*"):
        path.unlink()
    with Registry(home) as again:
        assert "missing" in again.resolve("sql@1.0").damaged
        with pytest.raises(DamagedError, match=r"sql@1\.0"):
            again.files("sql@1.0")
        again.files("sql@1.1")
        assert again.add("sql", {"w.bin": b"weights"}, LORA).created is False
        assert again.files("sql@1.0")["w.bin"].read_bytes() == b"weights"


def test_a_damaged_log_is_named_not_ignored(home, full):
    full.close()
    data = (home / "log").read_bytes()
    (home / "log").write_bytes(data.replace(b'"version":"1.1"', b'"version":"9.1"', 1))
    for path in home.glob("catalog.db*"):
        path.unlink()
    with Registry(home) as again, pytest.raises(DamagedError, match=r"line \d of the log"):
        again.list()


def test_records_of_an_unknown_kind_are_refused_with_a_hint(home, full):
    with full.home.write() as change:
        record = make_record(change.place, "hologram", {"name": "x"}, "2026", "a@b")
        full.home.log.append(record, change.place)
    with pytest.raises(DamagedError, match="hologram") as caught:
        full.list()
    assert "upgrade" in caught.value.hint


def test_a_torn_log_loses_only_what_was_never_confirmed(home, full):
    before = dump(full)
    full.close()
    with (home / "log").open("ab") as file:
        file.write(b'{"author":"a@b","digest":"0')
    with Registry(home) as again:
        assert dump(again) == before
        again.add("new", {"w": b"x"}, LORA)
    lines = (home / "log").read_bytes().splitlines()
    assert all(json.loads(line) for line in lines)


def test_two_open_registries_see_each_other(home, registry, add):
    with Registry(home) as other:
        add()
        assert refs(other.list()) == ["sql@1.0"]
        other.add("sql", {"w": b"2"}, LORA)
        assert refs(registry.list()) == ["sql@1.0", "sql@1.1"]


def test_threads_may_share_one_registry(registry):
    errors = []

    def work(number):
        try:
            for n in range(5):
                registry.add("sql", {"w": f"{number}-{n}".encode()}, LORA)
                registry.list()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(registry.versions("sql")) == 20
    assert [e.seq for e in registry.history("sql")] == list(range(1, 21))

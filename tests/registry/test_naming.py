"""Tags, yanked versions and new names: what they promise, and that the log alone restores it."""

from __future__ import annotations

import sqlite3
import threading

import pytest

from adapterkit.registry import (
    AdapterWarning,
    ConflictError,
    InvalidError,
    Meaning,
    NotFoundError,
    Ref,
    Registry,
)
from adapterkit.registry.migrations import STEPS


@pytest.fixture
def three(add):
    return [add(bytes([n])) for n in range(3)]


def at(registry, ref):
    return registry.resolve(ref).version


def steps(registry, tag="best"):
    return [(move.before, move.after) for move in registry.moves("sql", tag)]


def everything(registry):
    """What the registry answers about names, to compare two of them."""
    names = sorted({version.name for version in registry.list()})
    return (
        registry.list(),
        {name: registry.history(name) for name in names},
        {name: registry.moves(name) for name in names},
        [registry.search(text) for text in ("sql", "tone", "politely")],
    )


def test_every_move_of_a_tag_says_who_when_from_and_to(registry, three, monkeypatch):
    monkeypatch.setenv("ADAPTERKIT_AUTHOR", "ann@lab")
    registry.tag("sql@1.0", "best"), registry.tag("sql@1.2", "best"), registry.tag("sql", "best")
    registry.rm("sql:best")
    registry.add("sql", {"w.bin": b"4"}, Meaning({}), tags=["best"])
    registry.rm("sql@1.3")
    assert steps(registry) == [
        (None, "1.0"), ("1.0", "1.2"), ("1.2", None), (None, "1.3"), ("1.3", None),
    ]  # fmt: skip
    move = registry.moves("sql")[0]
    assert (move.author, move.seq, move.undoes) == ("ann@lab", 4, None)
    assert move.time == registry.history("sql")[3].time


def test_a_move_that_expects_something_else_changes_nothing(registry, three):
    with pytest.raises(ConflictError, match=r"not there, expected at 1\.0"):
        registry.tag("sql@1.0", "best", expected="1.0")
    registry.tag("sql@1.0", "best", expected="none")
    with pytest.raises(ConflictError, match=r"at 1\.0, expected at none"):
        registry.tag("sql@1.1", "best", expected="none")
    with pytest.raises(ConflictError, match=r"at 1\.0, expected at 1\.2"):
        registry.tag("sql@1.1", "best", expected="1.2")
    registry.tag("sql@1.1", "best", expected="1.0.0")  # equal numbers are one number
    assert steps(registry) == [(None, "1.0"), ("1.0", "1.1")]
    with pytest.raises(InvalidError):
        registry.tag("sql@1.1", "best", expected="newest")


def test_of_many_that_expect_the_same_one_wins(registry, three, home):
    registry.tag("sql@1.0", "best")
    won = []

    def work(number):
        with Registry(home) as own:
            try:
                own.tag(f"sql@1.{number}", "best", expected="1.0")
            except ConflictError:
                return
            won.append(f"1.{number}")

    threads = [threading.Thread(target=work, args=(1 + n % 2,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and at(registry, "sql:best") == won[0]


def test_undo_goes_back_move_by_move(registry, three):
    for number in ("1.0", "1.1", "1.2"):
        registry.tag(f"sql@{number}", "best")
    registry.rm("sql:best")
    moves = [registry.undo("sql:best") for _ in range(4)]
    assert [move.after for move in moves] == ["1.2", "1.1", "1.0", None]
    assert [move.undoes for move in moves] == [7, 6, 5, 4]
    with pytest.raises(NotFoundError, match="no move"):
        registry.undo("sql:best")
    with pytest.raises(NotFoundError):
        registry.resolve("sql:best")


def test_a_move_after_an_undo_is_undone_first(registry, three):
    registry.tag("sql@1.0", "best"), registry.tag("sql@1.1", "best")
    registry.undo("sql:best")
    registry.tag("sql@1.2", "best")
    assert registry.undo("sql:best").after == "1.0"
    assert registry.undo("sql:best").after is None


def test_undo_never_brings_back_a_removed_version(registry, three):
    registry.tag("sql@1.0", "best"), registry.tag("sql@1.1", "best")
    registry.rm("sql@1.0")
    with pytest.raises(ConflictError, match="was removed"):
        registry.undo("sql:best")
    assert at(registry, "sql:best") == "1.1"


def test_a_protected_tag_stays_where_it_is(registry, three, tmp_path):
    registry.tag("sql@1.0", "best"), registry.tag("sql@1.1", "best")
    registry.protect("sql:best")
    log = (registry.home.path / "log").read_bytes()
    for change in (
        lambda: registry.tag("sql@1.2", "best"),
        lambda: registry.rm("sql:best"),
        lambda: registry.rm("sql@1.1"),
        lambda: registry.undo("sql:best"),
        lambda: registry.add("sql", {"w.bin": b"new"}, Meaning({}), tags=["other", "best"]),
        lambda: registry.add("sql", {"w.bin": b"\x00"}, Meaning({"kind": "LORA", "rank": 8}),
                             version="1.0", tags=["other", "best"]),
    ):  # fmt: skip
        with pytest.raises(ConflictError, match="protected") as caught:
            change()
        assert caught.value.hint == "adapter tag sql:best --unprotect"
    registry.tag("sql@1.1", "best")  # where it is anyway
    registry.protect("sql:best")
    assert (registry.home.path / "log").read_bytes() == log
    registry.protect("sql:best", False)
    assert registry.tag("sql@1.2", "best").version == "1.1"
    with pytest.raises(NotFoundError):
        registry.protect("sql:never")


@pytest.mark.parametrize("ref", ["sql", "sql@1.0", "sql:latest"])
def test_only_a_tag_can_be_undone_or_protected(registry, three, ref):
    for change in (registry.undo, registry.protect, registry.untag):
        with pytest.raises(InvalidError):
            change(ref)


def test_a_yanked_version_is_not_meant_by_the_name_alone(registry, three):
    assert registry.yank("sql@1.2", "bad data").yanked == "bad data"
    assert at(registry, "sql") == at(registry, "sql:latest") == "1.1"
    registry.tag("sql@1.2", "old")
    assert at(registry, "sql@1.2") == at(registry, "sql:old") == "1.2"
    with pytest.warns(AdapterWarning, match=r"sql@1\.2 was yanked: bad data"):
        assert registry.files("sql:old")
    with pytest.warns(AdapterWarning, match="yanked"):
        registry.export("sql@1.2", registry.home.path.parent / "out")
    assert registry.unyank("sql@1.2").yanked is None
    assert at(registry, "sql") == "1.2"
    registry.files("sql")


def test_a_release_candidate_is_latest_before_a_yanked_release(registry, add):
    add(b"1", version="1.0"), add(b"2", version="2.0rc1")
    registry.yank("sql@1.0")
    assert at(registry, "sql") == "2.0rc1"


def test_a_name_of_which_all_is_yanked_says_so(registry, add):
    add()
    registry.yank("sql")
    for ref in ("sql", "sql:latest"):
        with pytest.raises(NotFoundError, match="all versions of sql were yanked") as caught:
            registry.resolve(ref)
        assert "sql@1.0" in caught.value.hint
    registry.unyank("sql")
    assert at(registry, "sql") == "1.0"


def test_yank_is_said_once_and_its_reason_can_change(registry, three):
    registry.yank("sql@1.0", "a"), registry.yank("sql@1.0", "a"), registry.yank("sql@1.0", "b")
    registry.unyank("sql@1.1")
    said = [e.payload["reason"] for e in registry.history("sql") if e.kind == "yank"]
    assert said == ["a", "b"]
    with pytest.raises(InvalidError, match="one line"):
        registry.yank("sql@1.0", "a\nb")
    with pytest.raises(InvalidError, match="3 versions"):
        registry.yank("sql")


def test_a_renamed_adapter_keeps_everything_and_the_old_name_leads_to_it(registry, three):
    registry.tag("sql@1.0", "best"), registry.protect("sql:best")
    registry.attach("sql@1.1", "note", b"answers politely")
    events = registry.history("sql")
    assert registry.mv("sql", "team/text2sql") == Ref.parse("team/text2sql")
    assert {v.name for v in registry.list()} == {"team/text2sql"}
    for ref in ("sql@1.0", "sql:best", f"sql@sha256:{three[0].id}", "team/text2sql:best"):
        assert str(registry.resolve(ref).ref) == "team/text2sql@1.0"
    assert at(registry, "sql") == "1.2"
    assert [v.version for v in registry.versions("sql")] == ["1.0", "1.1", "1.2"]
    assert registry.history("sql")[:-1] == events == registry.history("team/text2sql")[:-1]
    assert registry.history("sql")[-1].kind == "rename"
    with pytest.raises(ConflictError, match="protected"):
        registry.tag("sql@1.2", "best")
    assert [v.version for v in registry.search("text2sql politely")] == ["1.1"]
    assert registry.search("local politely") == []


def test_what_is_added_under_an_old_name_gets_the_new_one(registry, three, add):
    registry.mv("sql", "tone")
    added = add(b"4", name="sql", tags=["best"])
    assert str(added.ref) == "tone@1.3" and at(registry, "sql:best") == "1.3"
    with pytest.raises(ConflictError, match=r"tone@1\.0"):
        add(b"5", name="sql", version="1.0")
    assert str(registry.rm("sql@1.3").ref) == "tone@1.3"


def test_names_lead_on_through_several_changes_and_back(registry, three):
    registry.mv("sql", "b")
    registry.mv("b", "c")
    assert str(registry.resolve("sql").ref) == str(registry.resolve("b").ref) == "c@1.2"
    registry.mv("b", "sql")  # by an old name, back to the first one
    assert str(registry.resolve("c").ref) == str(registry.resolve("b").ref) == "sql@1.2"
    assert registry.mv("b", "sql") == Ref.parse("sql")
    assert [e.kind for e in registry.history("sql")].count("rename") == 3


def test_a_name_that_was_ever_used_is_not_taken(registry, three, add):
    add(name="tone"), add(name="gone"), add(name="moved")
    registry.rm("gone"), registry.mv("moved", "elsewhere")
    for taken in ("tone", "gone", "moved", "elsewhere"):
        with pytest.raises(ConflictError, match="in use"):
            registry.mv("sql", taken)
    with pytest.raises(NotFoundError):
        registry.mv("never", "new")
    with pytest.raises(InvalidError):
        registry.mv("sql@1.0", "new")
    assert at(registry, "sql") == "1.2"


@pytest.fixture
def changed(registry, three, add):
    """One of every change to names."""
    registry.tag("sql@1.0", "best"), registry.tag("sql@1.1", "best"), registry.undo("sql:best")
    registry.protect("sql:best"), registry.tag("sql@1.1", "x"), registry.protect("sql:x")
    registry.protect("sql:x", False), registry.rm("sql:x"), registry.undo("sql:x")
    registry.yank("sql@1.2", "bad"), registry.yank("sql@1.1"), registry.unyank("sql@1.1")
    add(b"other", name="polite", attachments={"note": b"politely", "metrics": b'{"a":1}'})
    registry.mv("sql", "b"), registry.mv("b", "tone")
    return registry


def test_the_log_alone_restores_names_tags_and_yanks(changed):
    before = everything(changed)
    changed.home.rebuild()
    assert everything(changed) == before
    with pytest.raises(ConflictError, match="protected"):
        changed.tag("tone@1.2", "best")
    assert changed.tag("tone@1.2", "x").version == "1.1"


def test_a_catalog_of_the_first_schema_is_brought_up_to_date(changed, home):
    """As an older program left it: what it did not know yet is read from the log."""
    before, place = everything(changed), changed.home.catalog.place()
    changed.close()
    for path in home.glob("catalog.db*"):
        path.unlink()
    with sqlite3.connect(home / "catalog.db") as old:
        for statement in STEPS[0]:
            old.execute(statement)
        values = (place.offset, place.start, place.seq, place.digest)
        old.execute("UPDATE place SET log_offset = ?, start = ?, seq = ?, digest = ?", values)
        old.execute("PRAGMA user_version = 1")
    old.close()
    with Registry(home) as again:
        assert everything(again) == before
        assert str(again.resolve("sql").ref) == "tone@1.1"

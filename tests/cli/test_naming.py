"""adapter tag --from, --undo, --protect; adapter yank; adapter mv; adapter log"""

from __future__ import annotations

import pytest


@pytest.fixture
def two(run, stored, sql):
    run("add", sql, "sql", "--trained-on", "int8")


def what(run, *arguments):
    """The last column of `adapter log`."""
    lines = run("log", *arguments).stdout.splitlines()
    start = lines[0].index("WHAT")
    return [line[start:] for line in lines[1:]]


def test_a_tag_is_moved_only_from_where_it_is_expected(run, two):
    refused = run("tag", "sql@1.1", "prod", "--from", "none", code=4).stderr
    assert "sql:prod is at 1.0, expected at none" in refused
    assert run("tag", "sql@1.1", "prod", "--from", "1.0").stdout == "sql:prod is 1.1, before 1.0\n"


def test_a_move_is_taken_back(run, two):
    run("tag", "sql@1.1", "prod")
    assert run("tag", "sql:prod", "--undo").stdout == "sql:prod is 1.0, before 1.1\n"
    assert run("tag", "sql:prod", "--undo").stdout == "sql:prod is removed, before 1.0\n"
    assert "no move" in run("tag", "sql:prod", "--undo", code=3).stderr


def test_a_protected_tag_is_not_moved(run, two):
    assert run("tag", "sql:prod", "--protect").stdout == "sql:prod is 1.0, and protected\n"
    assert "sql:prod --unprotect" in run("tag", "sql@1.1", "prod", code=4).stderr
    run("rm", "sql:prod", code=4)
    run("tag", "sql:prod", "--unprotect")
    run("tag", "sql@1.1", "prod")


@pytest.mark.parametrize("option", ["--undo", "--protect", "--unprotect"])
def test_these_options_take_a_tag_and_nothing_else(run, two, option):
    run("tag", "sql", option, code=2)
    run("tag", "sql@1.0", "prod", option, code=2)
    run("tag", "sql:prod", option, "--from", "1.0", code=2)


def test_a_tag_needs_a_word(run, two):
    assert "sql@1.0 TAG" in run("tag", "sql@1.0", code=2).stderr


def test_a_yanked_version_says_so_wherever_it_appears(run, run_json, two, tmp_path):
    said = run("yank", "sql@1.1", "--reason", "trained on the test set").stdout
    assert said == "yanked sql@1.1: trained on the test set\n"
    assert run_json("show", "sql")["version"] == "1.0"
    assert run_json("show", "sql@1.1")["yanked"] == "trained on the test set"
    assert "trained on the test set" in run("show", "sql@1.1").stdout
    assert "1.1 yanked" in run("list").stdout
    assert [v["yanked"] for v in run_json("list")] == [None, "trained on the test set"]
    warned = run("export", "sql@1.1", tmp_path / "out").stderr
    assert "Warning: sql@1.1 was yanked: trained on the test set" in warned
    assert run("yank", "sql@1.1", "--undo").stdout == "sql@1.1 is not yanked\n"
    assert run_json("show", "sql")["version"] == "1.1"
    run("yank", "sql@1.1", "--undo", "--reason", "x", code=2)


def test_an_old_name_leads_to_the_new_one(run, run_json, two):
    assert run("mv", "sql", "team/sql").stdout == "sql is now team/sql\n"
    assert run_json("show", "sql")["ref"] == "team/sql@1.1"
    run("mv", "sql@1.0", "x", code=2)


def test_the_log_tells_the_story_newest_first(run, run_json, two, monkeypatch):
    monkeypatch.setenv("ADAPTERKIT_AUTHOR", "ann@lab")
    run("tag", "sql@1.1", "prod"), run("tag", "sql:prod", "--undo")
    run("tag", "sql:prod", "--protect")
    run("yank", "sql@1.1", "--reason", "bad"), run("yank", "sql@1.1", "--undo")
    run("mv", "sql", "tone")
    assert what(run, "tone") == [
        "renamed, before sql", "1.1 no longer yanked", "1.1 yanked: bad", "prod protected",
        "prod: 1.1 -> 1.0 (undo)", "prod: 1.0 -> 1.1", "1.1 added", "prod: nothing -> 1.0",
        "1.0 added",
    ]  # fmt: skip
    assert what(run, "sql:prod") == [
        "prod: 1.1 -> 1.0 (undo)", "prod: 1.0 -> 1.1", "prod: nothing -> 1.0",
    ]  # fmt: skip
    found = run_json("log", "tone:prod")[0]
    assert (found["author"], found["before"], found["after"]) == ("ann@lab", "1.1", "1.0")
    kinds = {entry["kind"] for entry in run_json("log", "tone")}
    assert kinds == {"version", "tag", "protect", "yank", "rename"}
    assert "never" in run("log", "tone:x", code=3).stderr
    run("log", "never", code=3), run("log", "tone@1.0", code=2)


def test_the_log_shows_what_a_version_was_made_from(run, run_json, stored, tmp_path):
    from adapterkit.registry import Meaning, Registry
    from adapterkit.registry.reading import default_home

    with Registry(default_home()) as registry:
        parents = tuple(
            {"version": f"sha256:{id}", "relation": "finetuned-from"}
            for id in (registry.resolve("sql").id, "0" * 64)
        )
        registry.add("child", {"w": b"x"}, Meaning({}, parents=parents))
        registry.attach("child", "note", b"x", "why")
    (made,) = what(run, "child")[1:]
    assert made == "1.0 added, finetuned-from sha256:000000000000, finetuned-from sql@1.0"
    assert what(run, "child")[0] == "1.0 got note why"
    assert run_json("log", "child")[1]["parents"][1]["ref"] == "sql@1.0"

"""adapter push, adapter pull, adapter remote"""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def team(run, tmp_path):
    """The URL of a remote that is not made yet, with the name `team`."""
    url = f"file://{tmp_path}/disk"
    run("remote", "add", "team", url)
    return url


@pytest.fixture
def other(tmp_path):
    """Options for a second registry."""
    return ("--home", tmp_path / "other")


def test_an_adapter_travels_whole(run, run_json, stored, team, other):
    assert run("push", "sql", "team").stdout == "sql@1.0: sent 6 blobs, 20.2 KiB\n"
    run(*other, "pull", f"{team}#sql:prod")
    there = json.loads(run(*other, "show", "sql:prod", "--json").stdout)
    here = run_json("show", "sql")
    assert {k: v for k, v in there.items() if k not in ("created", "author", "attachments")} == {
        k: v for k, v in here.items() if k not in ("created", "author", "attachments")
    }


def test_what_is_there_is_not_moved_again(run, stored, team, other):
    run("push", "sql", "team")
    assert run("push", "sql", "team").stdout == "sql@1.0: already there, nothing new\n"
    run(*other, "pull", f"{team}#sql")
    shown = run(*other, "pull", f"{team}#sql").stdout
    assert shown == "sql@1.0: already there, nothing new\n"


def test_a_dry_run_moves_nothing(run, run_json, stored, team, other, tmp_path):
    plan = run_json("push", "sql", "team", "--dry-run")
    assert (plan["dry_run"], plan["new"], plan["n_blobs"]) == (True, True, 6)
    assert not (tmp_path / "disk").exists()
    run("push", "sql", "team")
    assert "would fetch 5 blobs" in run(*other, "pull", f"{team}#sql", "--dry-run").stdout
    assert "sql" not in run(*other, "list").stdout


def test_details_name_every_blob(run, stored, team):
    assert "  adapter_model.safetensors  sha256:" in run("-v", "push", "sql", "team").stdout


def test_a_pull_can_have_another_name(run, stored, team):
    run("push", "sql", "team")
    assert run("pull", "team#sql", "mine/sql").stdout.startswith("mine/sql@1.0: fetched 0 blobs")


def test_a_tag_that_is_elsewhere_there_stays_unless_named(run, stored, sql, team):
    run("push", "sql", "team")
    run("add", sql, "sql@2.0", "--trained-on", "int8", "--tag", "prod")
    assert "the tag prod stays on another version" in run("push", "sql", "team").stdout
    assert "stays" not in run("push", "sql", "team", "--tag", "prod").stdout


def test_a_manifest_that_contradicts_its_files_is_refused(run, run_json, stored, team, other, sql):
    """The remote is a stranger: it may offer a manifest that claims another rank."""
    from adapterkit.hub import remotes, sync
    from adapterkit.registry import Meaning, Registry

    with Registry() as registry:
        liar = Meaning(run_json("show", "sql")["manifest"]["adapter"] | {"rank": 64})
        files = {path.name: path for path in sql.iterdir()}
        registry.add("liar", files, liar)
        remote = remotes.connect(team)
        sync.push(registry, sync.plan_push(registry, "liar", remote), remote)
    shown = run(*other, "pull", f"{team}#liar", code=5).stderr
    assert "rank is 64, its files say 8" in shown
    assert "liar" not in run(*other, "list").stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("pull", "team"), 2), (("pull", "team#sql", "name@1.0"), 2),
        (("push", "sql", "team#x"), 2), (("pull", "nobody#sql"), 3), (("push", "no", "team"), 3),
        (("push", "sql", "gopher://x"), 3), (("pull", "team#sql"), 7),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(run, stored, team, arguments, code):
    assert run(*arguments, code=code).stderr.startswith("Error: ")


def test_remotes_have_names(run, run_json, team):
    assert run("remote", "list").stdout == f"NAME  URL\nteam  {team}\n"
    assert run_json("remote", "list") == [{"name": "team", "url": team}]
    run("remote", "add", "team", "file:///elsewhere", code=4)
    assert run("remote", "rm", "team").stdout == f"removed team, which was {team}\n"
    run("remote", "rm", "team", code=3)

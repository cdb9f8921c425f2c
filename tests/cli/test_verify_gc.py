"""adapter verify; adapter gc"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def home() -> Path:
    return Path(os.environ["ADAPTERKIT_HOME"])


@pytest.fixture
def weights(run_json, stored, home) -> Path:
    files = {f["path"]: f["digest"] for f in run_json("show", "sql")["manifest"]["files"]}
    digest = files["adapter_model.safetensors"].removeprefix("sha256:")
    return home / "blobs" / "sha256" / digest[:2] / digest


def rot(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def test_a_sound_registry_is_all_good(run, stored):
    assert run("verify").stdout.startswith("all good: read 6 blobs, ")
    assert run("verify", "sql:prod").stdout.startswith("all good: read 6 blobs, ")
    assert run("verify", "--rebuild").stdout.startswith("all good")


def test_damage_is_named_with_what_it_affects_and_ends_with_5(run, weights, home):
    rot(weights)
    for arguments in ([], ["sql"]):
        shown = run("verify", *arguments, code=5).stdout
        assert f"changed: {weights.relative_to(home)}: " in shown
        assert "  affects sql@1.0: adapter_model.safetensors\n" in shown
        assert "  repair: adapter verify --repair-from REMOTE, or pull or add" in shown
        assert "1 problem: read" in shown


def test_json_says_the_same(run_json, weights, home):
    assert run_json("verify")["damaged"] is False
    rot(weights)
    found = run_json("verify", code=5)
    (problem,) = found["problems"]
    assert problem["what"] == "changed"
    assert problem["where"] == str(weights.relative_to(home))
    assert problem["affects"] == ["sql@1.0: adapter_model.safetensors"]
    assert found["n_blobs"] == 6 and found["n_records"] == 1 and found["notes"] == []


def test_notes_are_no_damage(run, stored, home):
    (home / "tmp" / "x.part").write_bytes(b"half")
    assert "1 note, no damage" in run("verify").stdout
    assert "stray: tmp/x.part" in run("-v", "verify").stdout


def test_rebuilding_is_about_everything(run, stored):
    run("verify", "sql", "--rebuild", code=2)
    run("verify", "tone", code=3)


def test_an_empty_registry_is_good_and_is_not_made(run, home):
    assert "all good: read 0 blobs" in run("verify").stdout
    assert "0 blobs" in run("gc").stdout
    assert not home.exists()


def test_a_dry_run_changes_nothing(run, run_json, stored, home):
    run("rm", "sql")
    before = sorted(p.name for p in home.rglob("*") if p.parent.name != "home")
    shown = run("gc", "--grace", "0", "--dry-run").stdout
    assert "would be moved to the trash: 3 blobs" in shown
    assert sorted(p.name for p in home.rglob("*") if p.parent.name != "home") == before
    found = run_json("gc", "--dry-run")
    assert found["trashed"]["n_blobs"] == 0 and found["n_spared"] == 3


def test_what_was_removed_goes_in_two_steps(run, run_json, weights):
    run("rm", "sql")
    run("gc", "--grace", "0")
    assert not weights.exists()
    assert run_json("gc", "--grace", "0")["deleted"]["n_blobs"] == 3
    assert "all good" in run("verify").stdout


def test_rules_say_which_versions_go(run, run_json, stored, sql):
    run("add", sql, "sql", "--trained-on", "int8")
    run("add", sql, "sql", "--trained-on", "none")
    rules = ["--keep-last", "1", "--keep-tagged"]
    assert "would be removed: sql@1.1\n" in run("gc", *rules, "--dry-run").stdout
    assert run_json("gc", "other", *rules)["removed"] == []
    assert run_json("gc", *rules, "--older-than", "1d")["removed"] == []
    assert run_json("gc", "s*", *rules)["removed"] == ["sql@1.1"]
    assert [v["version"] for v in run_json("list")] == ["1.0", "1.2"]


@pytest.mark.parametrize(
    "arguments", [["--keep-tagged"], ["--older-than", "soon"], ["--grace", "3"], ["sql"]]
)
def test_half_a_rule_is_refused(run, stored, arguments):
    run("gc", *arguments, code=2)
    run("show", "sql")


@pytest.fixture
def team(run, stored, tmp_path) -> str:
    """A remote that has sql, with the name `team`."""
    url = f"file://{tmp_path}/disk"
    run("remote", "add", "team", url)
    run("push", "sql", "team")
    return url


def test_what_a_remote_has_is_repaired_and_told(run, run_json, weights, team, home):
    rot(weights)
    shown = run("verify", "--repair-from", "team").stdout
    assert f"{weights.name[:12]}: repaired, from {team}\n" in shown
    assert "  affects sql@1.0: adapter_model.safetensors\n" in shown and "all good" in shown
    assert run("verify", "--repair-from", team).stdout.startswith("all good")
    weights.unlink()
    (home / "catalog.db").write_bytes(b"garbage")
    found = run_json("verify", "--repair-from", "team", "--rebuild")
    assert [row["source"] for row in found["repaired"]] == [team] and not found["not_repaired"]
    assert run("list").stdout.count("sql") == 1


def test_what_no_remote_has_stays_damaged_with_the_reason(run, run_json, weights, team, tmp_path):
    rot(weights)
    empty = f"file://{tmp_path}/empty"
    shown = run("verify", "--repair-from", empty, code=5).stdout
    assert f"{weights.name[:12]}: still damaged\n" in shown and "there is no such folder" in shown
    for path in (tmp_path / "disk" / "blobs").rglob(weights.name):
        rot(path)
    found = run_json("verify", "--repair-from", empty, "--repair-from", "team", code=5)
    (row,) = found["not_repaired"]
    assert row["digest"] == f"sha256:{weights.name}" and len(row["why"]) == 2
    assert "arrived with other bytes" in row["why"][1] and found["damaged"]


def test_a_remote_to_repair_from_must_be_known(run, stored, team):
    run("verify", "--repair-from", "unknown", code=3)
    run("verify", "--repair-from", f"{team}#sql", code=2)
    run("verify", "sql", "--repair-from", team, code=2)

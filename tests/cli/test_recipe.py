"""Recipes from the command line."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def mix(run, run_json, fixtures, tmp_path):
    """team/mix@1.0, made of sql and tone."""
    parts = []
    for name, case in (("sql", "llama.lora_qv"), ("tone", "llama.dora")):
        run("add", fixtures / f"cases/{case}/adapter", name)
        id = run_json("show", name)["id"]
        parts.append({"version": id, "name": f"{name}@1.0", "weight": 0.5})
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"schema": "adapterkit.recipe/1", "parts": parts}))
    return path


def test_a_recipe_is_added_listed_shown_checked_and_kept(run, run_json, mix, llama, tmp_path):
    done = run("add", mix, "team/mix", "--base", llama, "--metric", "loss=0.5")
    assert "recipe of sql@1.0, tone@1.0" in done.stdout and "Hint" not in done.output
    assert run_json("list", "--kind", "recipe")[0]["ref"] == "team/mix@1.0"
    shown = run_json("show", "team/mix")
    assert sorted(edge["ref"] for edge in shown["ancestors"]) == ["sql@1.0", "tone@1.0"]
    assert [part["weight"] for part in shown["manifest"]["adapter"]["parts"]] == [0.5, 0.5]
    assert "part" in run("show", "team/mix").stdout
    assert "tone@1.0: " in run("check", "team/mix", "--base", llama, "--strict", code=6).stdout
    assert "part of team/mix@1.0" in run("rm", "sql", code=4).output
    assert run("verify").exit_code == 0
    run("export", "team/mix", tmp_path / "out")
    assert json.loads((tmp_path / "out/recipe.json").read_text())["dialect"] == "exact"


def test_a_push_says_which_parts_go_along(run, run_json, mix, tmp_path):
    run("add", mix, "team/mix")
    remote = f"file://{tmp_path}/remote"
    assert "with its parts sql@1.0, tone@1.0" in run("push", "team/mix", remote).stdout
    assert run_json("push", "team/mix", remote)["n_blobs"] == 0
    home = tmp_path / "elsewhere"
    pulled = run("--home", home, "pull", f"{remote}#team/mix", "copy")
    assert "with its parts sql@1.0, tone@1.0" in pulled.stdout
    refs = json.loads(run("--home", home, "list", "--json").stdout)
    assert [row["ref"] for row in refs] == ["copy@1.0", "sql@1.0", "tone@1.0"]


def test_a_recipe_without_its_parts_is_not_stored(run, mix, tmp_path):
    done = run("--home", tmp_path / "other", "add", mix, "mix", code=3)
    assert "sql@1.0" in done.output and "not in this registry" in done.output

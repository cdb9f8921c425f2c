"""adapter list, adapter show"""

from __future__ import annotations

import json
import re


def test_a_list_has_one_row_for_each_version(run, stored, sql):
    run("add", sql, "team/other@2.0")
    title, first, second = run("list").stdout.splitlines()
    assert title.split() == ["NAME", "VERSION", "KIND", "RANK", "BASE", "TAGS", "SIZE", "ADDED"]
    assert first.split()[:4] == ["sql", "1.0", "lora", "8"]
    assert "prod" in first
    assert second.split()[:5] == ["team/other", "2.0", "lora", "8", "bases/llama"]


def test_a_pattern_selects_by_name(run, stored, sql):
    run("add", sql, "team/other")
    assert "sql" not in run("list", "team/*").stdout
    assert len(run("list", "nothing*").stdout.splitlines()) == 1


def test_an_empty_registry_says_how_to_start(run):
    assert "adapter add FOLDER NAME" in run("list").stderr


def test_list_as_json(run_json, stored):
    [row] = run_json("list")
    assert (row["ref"], row["name"], row["version"]) == ("sql@1.0", "local/sql", "1.0")
    assert (row["kind"], row["rank"], row["tags"], row["n_files"]) == ("lora", 8, ["prod"], 2)
    assert re.fullmatch("sha256:[0-9a-f]{64}", row["id"])


def test_show_prints_everything_recorded(run, run_json, stored):
    shown, found = run("-v", "show", "sql:prod").stdout, run_json("show", "sql")
    values = [found["id"], "first try", "loss", "0.5", "nf4", "prod", "root"]
    values += [file["digest"] for file in found["manifest"]["files"]]
    values += [v for v in found["manifest"]["adapter"].values() if isinstance(v, str)]
    values += [v for v in found["manifest"]["base"].values() if isinstance(v, str)]
    values.append(found["manifest"]["base"]["layout"]["root"])
    assert [value for value in values if value not in shown] == []


def test_unknown_fields_of_the_config_are_shown(run, sql, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = json.loads((sql / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_flavor": "mint"}))
    weights = (sql / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights)
    assert "lora_flavor" in run("add", folder, "sql", code=5).stderr
    run("add", folder, "sql", "--allow-field", "lora_flavor")
    assert re.search(r"lora_flavor +mint\n", run("show", "sql").stdout)


def test_a_reference_that_is_not_there_is_not_found(run, stored):
    assert "sql has 1.0, prod" in run("show", "sql@9.0", code=3).stderr
    assert "did you mean sql" in run("show", "sqll", code=3).stderr


def test_a_note_cannot_drive_the_terminal(run, sql):
    run("add", sql, "sql", "--note", "\x1b]0;owned\x07")
    assert "\x1b" not in run("show", "sql").stdout

"""What is printed is in the words of users."""

from __future__ import annotations

import pytest


def test_types_are_called_as_in_torch(run, run_json, sql):
    shown = run("add", sql, "sql").stdout + run("show", "sql").stdout + run("inspect", "sql").stdout
    shown += run("convert", "sql", "-o", "plain").stdout
    assert "float32" in shown and "F32" not in shown
    assert run_json("inspect", "sql")["tensors"][0]["dtype"] == "F32"


def test_what_has_no_modules_is_on_none(run, fixtures, llama):
    shown = run("add", fixtures / "adapters/llama_prefix1", "style", "--base", llama).stdout
    assert "\n  prefix tuning\n" in shown


def test_gains_are_told_without_names_of_classes(run, fixtures, sql):
    shown = run("diff", sql, fixtures / "cases/llama.ia3/adapter").stdout
    assert "put gain l" in shown and "Gain" not in shown


def test_a_recipe_has_no_weights_to_export(run, sql, tmp_path):
    run("add", sql, "a")
    run("blend", "a=0.5", "--as", "recipe", "-o", "mix")
    done = run("export", "mix", tmp_path / "x", "--format", "peft", code=2)
    assert "has no weights of its own" in done.stderr and "adapter blend" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("blend", "a=x", "b", "-o", "mix"), "a weight is a finite number"),
        (("show", "./a"), "not a name, but a path"),
        (("tag", "./a", "prod"), "not a name, but a path"),
    ],
)
def test_a_mistaken_reference_is_explained(run, arguments, words):
    assert words in run(*arguments, code=2).stderr


@pytest.mark.parametrize("command", ["inspect", "check"])
def test_a_missing_folder_is_named_once(run, command, tmp_path, llama):
    more = ["--base", llama] if command == "check" else []
    shown = run(command, tmp_path / "nowhere", *more, code=3).output
    assert "nowhere does not exist" in shown and "No such file" not in shown

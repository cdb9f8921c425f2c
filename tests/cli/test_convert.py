"""adapter convert, and export in other formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BASE_CASE = "llama.dora"


@pytest.fixture
def tone(fixtures: Path) -> Path:
    return fixtures / f"cases/{BASE_CASE}/adapter"


def test_what_is_exact_is_stored_with_its_parent(run, run_json, fixtures):
    run("add", fixtures / "cases/llama.moslora_v10/adapter", "team/mixed")
    done = run_json("convert", "team/mixed", "-o", "team/plain@2.0")
    assert (done["ref"], done["error"], done["dtype"]) == ("team/plain@2.0", 0, "F32")
    assert {m["rank"] for m in done["modules"]} == {m["needed"] for m in done["modules"]}
    shown = run_json("show", "team/plain")
    assert [edge["ref"] for edge in shown["ancestors"]] == ["team/mixed@1.0"]
    assert shown["manifest"]["recipe"]["inputs"] == [{"version": shown["ancestors"][0]["id"]}]
    assert "converted-from team/mixed@1.0" in run("log", "team/plain").stdout
    assert "exact" in run("convert", "team/mixed", "-o", "other").stdout


def test_a_truncation_prints_its_error_module_by_module(run, tone, llama, tmp_path):
    done = run("convert", tone, "--base", llama, "--rank", 8, "-o", tmp_path / "lora")
    assert "error 0." in done.stdout and "model.layers.0.self_attn.q_proj" in done.stdout
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "adapterkit.json",
    ]  # fmt: skip
    assert run("check", tmp_path / "lora", "--base", llama).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--base BASE"),
        (("--base", "LLAMA"), "rank 64"),
        (("--rank", "0"), "--rank"),
        (("-o", "name:tag"), "no place for a new adapter"),
    ],
)
def test_what_is_missing_is_asked_for(run, tone, llama, arguments, words):
    given = [llama if word == "LLAMA" else word for word in arguments]
    output = [] if "-o" in given else ["-o", "small"]
    assert words in run("convert", tone, *given, *output, code=2).output


def test_export_speaks_the_words_of_other_tools(run, fixtures, tmp_path):
    run("add", fixtures / "cases/llama.lora_qv/adapter", "sql")
    base = fixtures / "bases/llama"
    done = run("export", "sql", tmp_path / "hub", "--format", "adapters", "--base", base)
    assert "2 files" in done.stdout
    run("add", tmp_path / "hub", "again")
    run("export", "again", tmp_path / "peft", "--format", "peft", "--base", base)
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 8)
    refused = run("export", "sql", tmp_path / "x", "--format", "adapters", code=2)
    assert "give the base" in refused.output
    assert "not empty" in run("export", "sql", tmp_path / "peft", "--format", "peft", code=4).output

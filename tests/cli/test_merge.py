from __future__ import annotations

import json
from pathlib import Path

import pytest

ADAPTERS = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
pytestmark = ADAPTERS


def test_merge_writes_a_model_and_says_what_became_of_the_adapter(run, sql, llama, tmp_path):
    done = run("merge", f"{sql}=0.5", "--base", llama, "-o", tmp_path / "out")
    assert "model.layers.0.self_attn.q_proj.weight  float32" in done.stdout
    assert "onto original weights" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"{tmp_path / 'out'}: 4 parameters changed, ")
    assert (tmp_path / "out/model.safetensors").exists()


def test_a_dry_run_prints_the_report_and_writes_nothing(run, sql, llama, tmp_path):
    done = run("merge", sql, "--base", llama, "--quantize", "nf4", "--dry-run")
    assert done.stdout.splitlines()[-1] == "nothing written: 4 parameters would change"
    assert list(tmp_path.iterdir()) == []


def test_json_has_the_figures_of_every_parameter(run_json, sql, llama, tmp_path):
    found = run_json("merge", sql, "--base", llama, "--quantize", "int8", "-o", tmp_path / "out")
    assert found["folder"] == str(tmp_path / "out")
    assert found["quantization"] == "int8"
    assert {row["format"] for row in found["parameters"]} == {"int8"}
    assert set(found["total"]) >= {"gain", "cosine", "error", "own_error", "size"}
    assert found["recipe"]["inputs"][0]["weight"] == 1.0
    record = json.loads((tmp_path / "out/adapterkit.json").read_text())
    assert record["recipe"] == found["recipe"]


def test_an_adapter_that_4_bits_would_erase_is_not_merged(run, sql, fixtures, tmp_path):
    base = fixtures / "bases/llama_nf4_double"
    arguments = ("merge", f"{sql}=0.01", "--base", base, "-o", tmp_path / "out")
    done = run(*arguments, code=1)
    assert "would survive in nf4" in done.stderr
    assert "--quantize none --dtype bfloat16" in done.stderr
    assert not (tmp_path / "out").exists()
    run(*arguments, "--min-gain", "0")
    assert (tmp_path / "out/config.json").exists()


def test_a_stored_version_is_merged_onto_what_it_was_trained_on(run, stored, llama, tmp_path):
    done = run("merge", "sql:prod", "--base", llama, "-o", tmp_path / "out")
    assert "onto dequantized weights: the adapters were trained on nf4" in done.stdout


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        ((), 2, "no folder to merge into"),
        (("-o", "."), 4, "is not empty"),
        (("-o", "out", "--onto", "dequantized"), 2, "expected one kind of quantized base"),
        (("-o", "out", "--min-gain", "2"), 2, "--min-gain"),
    ],
)
def test_what_cannot_be_done_is_said(more, code, said, run, sql, llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").write_text("")
    done = run("merge", sql, "--base", llama, *more, code=code)
    assert said in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_adapter_is_given_once(run, sql, llama, tmp_path):
    done = run("merge", sql, f"{sql}=2", "--base", llama, "-o", tmp_path / "out", code=2)
    assert "is given twice" in done.stderr


def test_an_adapter_of_another_base_is_refused(run, sql, fixtures, tmp_path):
    done = run("merge", sql, "--base", fixtures / "bases/gpt2", "-o", tmp_path / "out", code=6)
    assert "does not belong" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_correction_is_written_and_set_beside_its_rival(run, run_json, sql, llama, tmp_path):
    arguments = ("merge", sql, "--base", llama, "--quantize", "nf4", "--correction-rank", "2")
    predicted = run(*arguments, "--dry-run").stdout
    done = run(*arguments, "-o", tmp_path / "out").stdout
    assert predicted.splitlines()[:-1] == done.splitlines()[:-1]
    lines = [line.split("  ")[0] for line in done.splitlines()]
    assert "merged, with a correction of rank 2" in lines
    assert "not merged, with a blended adapter of rank 2" in lines
    assert any(line.startswith("better: ") for line in lines)
    assert (tmp_path / "out/correction/adapter_model.safetensors").exists()
    found = run_json(*arguments, "-o", tmp_path / "again")["correction"]
    assert found["better"] in ("correction", "blend")
    assert set(found["rival"]) >= {"gain", "cosine", "left"}


def test_a_correction_of_a_merge_that_loses_nothing_is_refused(run, sql, llama, tmp_path):
    arguments = ("merge", sql, "--base", llama, "--correction-rank", "2", "-o", tmp_path / "out")
    done = run(*arguments, code=2)
    assert "--quantize nf4" in done.stderr

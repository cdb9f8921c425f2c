"""adapter add"""

from __future__ import annotations

import shutil

import pytest


def test_it_says_what_was_stored_and_what_was_skipped(run, sql, llama, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(sql, folder)
    (folder / "training_args.bin").write_bytes(b"x" * 2048)
    shown = run("add", folder, "sql", "--base", llama).stdout
    assert shown.startswith("sql@1.0: stored 16.1 KiB\n")
    assert "  LoRA of rank 8 on q_proj, v_proj\n" in shown
    assert "  skipped training_args.bin (2.0 KiB)\n" in shown


def test_included_files_are_stored(run, run_json, sql, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(sql, folder)
    (folder / "notes.txt").write_text("x")
    assert run_json("add", folder, "sql", "--include", "*.txt")["skipped"] == []
    files = [file["path"] for file in run_json("show", "sql")["manifest"]["files"]]
    assert files == ["adapter_config.json", "adapter_model.safetensors", "notes.txt"]


def test_the_same_adapter_again_stores_nothing(run, run_json, sql, llama):
    run("add", sql, "sql", "--base", llama)
    shown = run("add", sql, "sql", "--base", llama).stdout
    assert shown.startswith("sql@1.0: already stored, nothing new\n")
    again = run_json("add", sql, "sql", "--base", llama)
    assert (again["created"], again["new_bytes"]) == (False, 0)


def test_without_a_base_it_says_that_identity_is_not_recorded(run, sql, llama):
    hint = "the identity of the base is not recorded, only its name bases/llama: give --base BASE"
    assert hint in run("add", sql, "sql").stderr
    assert run("add", sql, "other", "--base", llama).stderr == ""


def test_everything_given_is_recorded(run_json, stored):
    found = run_json("show", "sql")
    assert found["tags"] == ["prod"]
    assert found["metrics"] == {"loss": 0.5}
    assert found["notes"] == ["first try"]
    assert found["manifest"]["quantization"] == {"trained_on": {"method": "nf4"}}
    assert found["manifest"]["base"]["architecture"] == "LlamaForCausalLM"


def test_a_version_can_be_chosen(run, sql):
    assert run("add", sql, "sql@2.0").stdout.startswith("sql@2.0: ")


@pytest.mark.parametrize("name", ["sql:prod", "sql@sha256:0123456789ab", "SQL!", "./sql", "a/b/c"])
def test_a_name_is_a_name(run, sql, name):
    run("add", sql, name, code=2)


@pytest.mark.parametrize("metric", ["loss", "loss=", "loss=low", "=1"])
def test_a_metric_is_a_number(run, sql, metric):
    run("add", sql, "sql", "--metric", metric, code=2)


def test_an_adapter_of_another_base_is_not_stored(run, sql, fixtures):
    shown = run("add", sql, "sql", "--base", fixtures / "bases/llama_wide", code=6).stderr
    assert "q_proj" in shown
    assert "sql" not in run("list").stdout


def test_a_folder_that_is_not_there_is_not_found(run, tmp_path):
    run("add", tmp_path / "nothing", "sql", code=3)


def test_a_kind_without_a_rank_is_told_without_one(run, fixtures):
    folder = fixtures / "cases/llama.trainable_tokens/adapter"
    assert "rank" not in run("add", folder, "tokens").stdout

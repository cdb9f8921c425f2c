"""adapter check, adapter base"""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("base", "verdict", "code"),
    [
        ("llama", "same-weights-cast", 0), ("llama_sharded", "same-weights-cast", 0),
        ("llama_reseed", "other-weights", 6), ("llama_wide", "incompatible", 6),
        ("gpt2", "incompatible", 6), ("llama_nf4_double", "same-weights-cast", 0),
        ("llama_int8", "quantized-differently", 0),
    ],
)  # fmt: skip
def test_the_verdict_names_what_the_base_is(run_json, stored, fixtures, base, verdict, code):
    found = run_json("check", "sql", "--base", fixtures / "bases" / base, code=code)
    [report] = found["reports"]
    assert (report["verdict"], report["exit_code"], found["exit_code"]) == (verdict, code, code)


def test_deep_compares_every_byte(run_json, stored, run, sql, llama):
    run("add", sql, "sure", "--base", llama, "--weights")
    [report] = run_json("check", "sure", "--base", llama, "--deep")["reports"]
    assert (report["verdict"], report["level"]) == ("identical", "touched")


def test_strict_lets_doubts_fail(run, sql, llama):
    assert "fits in shape" in run("check", sql, "--base", llama).stdout
    run("--quiet", "check", sql, "--base", llama, "--strict", code=6)


def test_all_sources_are_reported_and_the_largest_code_wins(run_json, sql, fixtures, llama):
    other = fixtures / "cases/gpt2.lora_c_attn/adapter"
    found = run_json("check", sql, other, "/no/such/folder", "--base", llama, code=6)
    assert [report["exit_code"] for report in found["reports"]] == [0, 6, 3]


def test_every_finding_has_both_sides(run_json, sql, fixtures):
    base = fixtures / "bases/llama_wide"
    [report] = run_json("check", sql, "--base", base, code=6)["reports"]
    errors = [f for f in report["findings"] if f["severity"] == "error"]
    assert len(errors) == 6
    assert all(f["expected"] and f["found"] and "_proj" in f["tensor"] for f in errors)


def test_without_base_the_one_the_adapter_names_is_used(run, sql, fixtures, monkeypatch):
    monkeypatch.chdir(fixtures)
    assert "on bases/llama: fits" in run("check", sql).stdout


def test_a_named_base_that_is_not_here_is_said_clearly(run, sql, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = run("check", sql, code=3).stdout
    assert "the base it names, 'bases/llama', is not here" in shown
    assert "hint: give --base BASE" in shown


def test_a_base_that_is_not_there_is_not_found(run, sql, tmp_path):
    run("check", sql, "--base", tmp_path / "nothing", code=3)
    run("base", tmp_path / "nothing", code=3)
    run("base", "org/nothing", code=3)


def test_base_shows_the_identity_that_add_records(run_json, stored, llama):
    identity = run_json("base", llama, "--weights")["identity"]
    recorded = run_json("show", "sql")["manifest"]["base"]
    assert identity["layout"] == recorded["layout"]
    assert {"files", "tensors", "sketch"} <= set(identity)


def test_one_base_in_shards_and_in_one_file_has_one_tensors_digest(run_json, llama, fixtures):
    whole, shards = (
        run_json("base", path, "--weights")["identity"]
        for path in (llama, fixtures / "bases/llama_sharded")
    )
    assert whole["tensors"] == shards["tensors"]
    assert whole["files"] != shards["files"]

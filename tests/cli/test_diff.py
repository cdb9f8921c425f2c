"""adapter diff"""

from __future__ import annotations


def test_two_versions_and_what_differs_most_first(run, run_json, stored, fixtures):
    run("add", fixtures / "cases/llama.dora/adapter", "sql", "--metric", "loss=0.25")
    shown = run("diff", "sql@1.0", "sql@1.1").stdout
    lines = [line.split() for line in shown.splitlines()]
    assert ["A", "sql@1.0"] in lines and ["B", "sql@1.1"] in lines
    assert ["config.r", "8", "4"] in lines and ["loss", "0.5", "0.25"] in lines
    assert "needs base" in shown
    found = run_json("diff", "sql@1.0", "sql@1.1")
    assert {"field": "loss", "a": 0.5, "b": 0.25} in found["metrics"]
    assert found["total"]["needs_base"] is True and len(found["modules"]) == 12


def test_the_same_weights_are_said_to_be(run, stored, sql):
    assert run("diff", "sql", sql).stdout.endswith("The weights are the same.\n")


def test_long_lists_are_cut_and_say_so(run, stored, fixtures, monkeypatch):
    from adapterkit.cli import diff

    monkeypatch.setattr(diff, "SHOWN_MODULES", 5)
    dora = fixtures / "cases/llama.dora/adapter"
    assert "7 parts more; -v shows all" in run("diff", "sql", dora).stdout
    assert "more" not in run("-v", "diff", "sql", dora).stdout


def test_what_is_not_there_is_not_compared(run, stored):
    run("diff", "sql", "never", code=3)
    run("diff", "sql", code=2)

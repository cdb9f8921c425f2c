"""adapter list with filters, adapter search, adapter du"""

from __future__ import annotations

import pytest


@pytest.fixture
def two(run, stored, fixtures):
    dora = fixtures / "cases/llama.dora/adapter"
    run("add", dora, "tone", "--metric", "loss=1.5", "--note", "polite")


@pytest.mark.parametrize(
    "options",
    [
        ["--kind", "dora"],
        ["--rank", "..4"],
        ["--target", "down_proj"],
        ["--where", "loss>1", "--base", "llama"],
        ["tone", "--kind", "lora"],
    ],
)
def test_filters_select(run_json, two, options):
    assert [v["ref"] for v in run_json("list", *options)] == ["tone@1.0"]


def test_a_metric_that_is_asked_for_is_shown(run, run_json, two):
    lines = run("list", "--where", "loss<9", "--sort", "-loss").stdout.splitlines()
    assert lines[0].split()[4:] == ["BASE", "TAGS", "loss", "SIZE", "ADDED"]
    assert [line.split()[0] for line in lines[1:]] == ["tone", "sql"]
    assert "1.5" in lines[1] and "0.5" in lines[2]
    assert [v["metrics"] for v in run_json("list")] == [{"loss": 0.5}, {"loss": 1.5}]


def test_what_is_no_filter_is_said(run, two):
    assert "'loss<1.2'" in run("list", "--where", "loss", code=2).stderr
    assert "8..64" in run("list", "--rank", "big", code=2).stderr


def test_nothing_that_fits_is_no_empty_registry(run, two):
    assert "empty" not in run("list", "--kind", "ia3").stderr


def test_search_takes_words_and_says_when_there_is_more(run, run_json, two):
    assert [v["ref"] for v in run_json("search", "polite", "dora")] == ["tone@1.0"]
    assert "more than 1" in run("search", "q_proj", "--limit", "1").stderr
    assert run("search", "nothing").stdout.splitlines()[1:] == []
    run("search", code=2)


def test_du_adds_up(run, run_json, two):
    lines = run("du").stdout.splitlines()
    assert lines[0].split() == ["NAME", "VERSIONS", "SIZE", "STORED", "OWN"]
    assert {line.split()[0] for line in lines[1:3]} == {"sql", "tone"}
    assert "on the disk" in lines[-1]
    found = run_json("du", "tone")
    assert [u["name"] for u in found["names"]] == ["local/tone"]
    assert found["names"][0]["own"] == found["names"][0]["size"] < found["disk"]["size"]

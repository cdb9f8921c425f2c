"""Broken and hostile inputs on the command line: an answer and a code, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from adapterkit.cli.main import main
from adapterkit.hub.findings import clean

# Where an index is, to name the cases; the `index` fixture is not there yet when tests are named.
INDEX = json.loads((Path(__file__).parents[1] / "data/index.json").read_text())
BAD = {entry["id"]: entry for entry in INDEX["bad"]}


def invoke(*arguments: object) -> tuple[int, str]:
    """(exit code, everything printed); an exception that is not for users fails the test."""
    done = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    return done.exit_code, done.output


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("name", BAD)
def test_every_broken_input_gets_an_answer(name, bad_inputs, fixtures):
    entry = BAD[name]
    path, base = bad_inputs / entry["path"], fixtures / entry.get("base_path", "bases/llama")
    before = files(bad_inputs)
    checked, shown = invoke("check", path, "--base", base, "--deep")
    added, printed = invoke("add", path, "x", "--base", base)
    assert checked in (0, 2, 3, 5, 6), shown
    assert added in (0, 2, 3, 5, 6), printed
    refused = entry["should"] == "refuse" and not entry.get("acceptable")
    assert not (refused and 0 in (checked, added)), shown + printed
    assert all(clean(line, 10_000) == line for line in (shown + printed).splitlines())
    assert files(bad_inputs) == before

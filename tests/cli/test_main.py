"""The boundary: what a user sees when things go wrong, and the options every command shares."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from adapterkit.cli import main as boundary
from adapterkit.cli.app import App, pass_app
from adapterkit.registry import errors


@pytest.fixture
def raising(monkeypatch):
    """Lets `adapter list` raise or warn what a test wants."""

    def install(action):
        @click.command()
        @pass_app
        def command(app: App) -> None:
            action()

        monkeypatch.setattr("adapterkit.cli.list.command", command)

    return install


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.AdapterError, 1), (errors.InvalidError, 2), (errors.NotFoundError, 3),
        (errors.ConflictError, 4), (errors.DamagedError, 5), (errors.MismatchError, 6),
        (errors.RemoteError, 7), (errors.UnreachableError, 7), (errors.ProtocolError, 7),
    ],
)  # fmt: skip
def test_an_error_is_a_line_a_hint_and_its_code(run, raising, kind, code):
    def fail():
        raise kind("x has 1, but y has 2", hint="try z")

    raising(fail)
    assert run("list", code=code).stderr == "Error: x has 1, but y has 2\nHint: try z\n"


def test_an_interrupted_command_ends_with_130(run, raising):
    def interrupt():
        raise KeyboardInterrupt

    raising(interrupt)
    assert run("list", code=130).stderr == "Error: interrupted\n"


def test_a_failure_of_the_system_is_no_traceback(run, raising):
    raising(lambda: Path("/no/such/folder/file").read_text())
    assert run("list", code=1).stderr == "Error: /no/such/folder/file: No such file or directory\n"


def test_a_bug_keeps_its_traceback(run, raising):
    raising(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run("list")


def test_a_warning_of_ours_is_one_line(run, raising):
    raising(lambda: warnings.warn("an odd\tthing", errors.AdapterWarning, stacklevel=1))
    assert run("list").stderr == "Warning: an odd\\tthing\n"
    assert run("-q", "list").stderr == ""


def test_no_control_character_of_an_error_reaches_the_terminal(run, raising):
    def fail():
        raise errors.NotFoundError("\x1b]0;owned\x07 and \u202e", hint="\x9b31m")

    raising(fail)
    shown = run("list", code=3).stderr
    assert all(character.isprintable() or character == "\n" for character in shown)


@pytest.mark.parametrize("arguments", [["nope"], ["list", "--nope"], ["show"], ["--home"]])
def test_a_wrong_command_line_ends_with_2(run, arguments):
    assert "Error: " in run(*arguments, code=2).stderr


def test_home_says_where_the_registry_lies(run, sql, tmp_path):
    run("--home", tmp_path / "mine", "add", sql, "sql")
    assert run("--home", tmp_path / "mine", "list").stdout.count("sql") == 1
    assert run("list").stdout.count("sql") == 0


def test_offline_is_told_to_the_hub_library(run, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    run("--offline", "list")
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("options", "environment", "colored"),
    [([], {}, True), (["--no-color"], {}, False), ([], {"NO_COLOR": "1"}, False)],
)
def test_colors_can_be_turned_off(options, environment, colored):
    done = CliRunner().invoke(
        boundary.main, [*options, "show", "nothing"], color=True, env=environment
    )
    assert done.exit_code == 3
    assert ("\x1b" in done.stderr) is colored


def test_a_reader_that_stops_reading_sees_no_traceback(stored):
    command = f"{sys.executable} -c 'from adapterkit.cli.main import main; main()' show sql --json"
    done = subprocess.run(
        ["bash", "-c", f"for i in 1 2 3; do {command}; done | head -c 1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == ""


def test_every_command_of_the_table_has_help(run):
    for name in boundary.COMMANDS:
        assert run(name, "--help").stdout.startswith("Usage: ")

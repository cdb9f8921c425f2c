"""Every row of the literal tables leads to something that imports."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import click
import pytest

from adapterkit.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
TARGET = re.compile(r"adapterkit(\.\w+)+(:\w+)?")
# Files of cli/ that are no commands.
SUPPORT = {"__init__", "main", "app", "cluster", "hints", "output", "progress", "text"}


def rows() -> list[str]:
    """"module" or "module:attribute", wherever a module-level dict of hub or registry names one."""
    found = []
    for path in sorted([*(ROOT / "hub").rglob("*.py"), *(ROOT / "registry").rglob("*.py")]):
        for node in ast.parse(path.read_text()).body:
            value = getattr(node, "value", None)
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(value, ast.Dict):
                texts = [getattr(item, "value", None) for item in ast.walk(value)]
                found += [t for t in texts if isinstance(t, str) and TARGET.fullmatch(t)]
    return found


def test_there_are_tables():
    assert len(rows()) > 3


@pytest.mark.parametrize("row", rows())
def test_every_row_imports(row):
    module, _, attribute = row.partition(":")
    found = import_module(module)
    assert not attribute or hasattr(found, attribute)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_says_what_the_table_says(name):
    command = import_module(f"adapterkit.cli.{name}").command
    assert isinstance(command, click.Command)
    assert command.help.split("\n\n")[0].replace("\n", " ") == COMMANDS[name]


def test_every_file_of_cli_is_a_command_in_the_table():
    files = {path.stem for path in (ROOT / "cli").glob("*.py")}
    assert files - SUPPORT == set(COMMANDS)

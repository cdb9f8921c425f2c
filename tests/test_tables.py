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
TARGET = re.compile(r"[a-z_][\w.]*:[A-Za-z_]\w*")
# Files of cli/ that are no commands.
SUPPORT = {"__init__", "main", "app", "output", "progress", "text"}


def rows() -> list[tuple[str, str]]:
    """(package, "file:attribute") of every module-level dict of hub and registry made of those."""
    found = []
    for path in sorted([*(ROOT / "hub").rglob("*.py"), *(ROOT / "registry").rglob("*.py")]):
        package = ".".join(("adapterkit", *path.parent.relative_to(ROOT).parts))
        for node in ast.parse(path.read_text()).body:
            value = getattr(node, "value", None)
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(value, ast.Dict):
                texts = [getattr(item, "value", None) for item in value.values]
                if texts and all(isinstance(t, str) and TARGET.fullmatch(t) for t in texts):
                    found += [(package, text) for text in texts]
    return found


def test_there_are_tables():
    assert len(rows()) > 3


@pytest.mark.parametrize(("package", "row"), rows(), ids=lambda value: value)
def test_every_row_imports(package, row):
    file, attribute = row.split(":")
    name = file if file.startswith("adapterkit.") else f"{package}.{file}"
    assert hasattr(import_module(name), attribute)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_says_what_the_table_says(name):
    command = import_module(f"adapterkit.cli.{name}").command
    assert isinstance(command, click.Command)
    assert command.help.split("\n\n")[0].replace("\n", " ") == COMMANDS[name]


def test_every_file_of_cli_is_a_command_in_the_table():
    files = {path.stem for path in (ROOT / "cli").glob("*.py")}
    assert files - SUPPORT == set(COMMANDS)

"""README and docs/cli.md are run, not believed.

Every `console` block is replayed, command by command, in one folder and one home per page; its
output must be what the page shows. Then every `pycon` block is replayed there as a doctest.
After a change of wording,  python tests/test_docs.py  rewrites the console blocks.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from adapterkit.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/cli.md")
CONSOLE = re.compile(r"(?<=```console\n).*?(?=^```)", re.M | re.S)
PYCON = re.compile(r"(?<=```pycon\n).*?(?=^```)", re.M | re.S)
# What differs from run to run: the day, the time; and, from one processor to another, the digest of
# what was computed.
VOLATILE = (
    (re.compile(r"^  sha256:[0-9a-f]{64}$", re.M), "  sha256:..."),
    (re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?Z?)?"), "2026-01-01"),
    (re.compile(r"\d+(\.\d+)? ?m?s\b"), "1 s"),
)


def same(text: str) -> str:
    for pattern, replacement in VOLATILE:
        text = pattern.sub(replacement, text)
    return text


def steps(block: str) -> list[tuple[str, str]]:
    """(command, output shown) of a block; a command is a line after `$ `."""
    parts = re.split(r"^\$ ", block, flags=re.M)
    assert parts[0] == "", f"a console block starts with output: {parts[0]!r}"
    pairs = [part.partition("\n") for part in parts[1:]]
    return [(command, output) for command, _, output in pairs]


class Shell:
    """An empty folder in which tests/data is that of the checkout, and a home of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tests").symlink_to(ROOT / "tests")
        scripts = Path(sys.executable).parent
        self.environment = os.environ | {
            "HOME": str(folder), "ADAPTERKIT_HOME": str(folder / "home"), "COLUMNS": "100",
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "ADAPTERKIT_AUTHOR": "you@laptop", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip

    def run(self, command: str) -> str:
        """What a terminal would show, with the exit code where it is not 0."""
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
        )  # fmt: skip
        shown = done.stdout.replace(str(self.folder), "$PWD")
        return shown if done.returncode == 0 else f"{shown}[exit code {done.returncode}]\n"


def replay(text: str, shell: Shell) -> str:
    """The page with what its commands print now."""

    def block(match: re.Match[str]) -> str:
        done = []
        for command, shown in steps(match[0]):
            output = shell.run(command)
            done.append(f"$ {command}\n{shown if same(shown) == same(output) else output}")
        return "".join(done)

    return CONSOLE.sub(block, text)


@pytest.mark.parametrize("page", PAGES)
def test_every_page_shows_what_happens(page, tmp_path):
    text, shell = (ROOT / page).read_text(), Shell(tmp_path)
    assert replay(text, shell) == text
    (tmp_path / "session.txt").write_text("\n".join(PYCON.findall(text)))
    done = shell.run("python -m doctest session.txt")
    assert "Failed example" not in done
    assert "AdapterWarning" not in done


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command):
    assert f"$ adapter {command} --help\n" in (ROOT / "docs/cli.md").read_text()
    assert re.search(rf"adapter (--home \S+ )?{command}\b", (ROOT / "README.md").read_text())


if __name__ == "__main__":
    for page in map(ROOT.__truediv__, PAGES):
        with tempfile.TemporaryDirectory() as folder:
            page.write_text(replay(page.read_text(), Shell(Path(folder))))

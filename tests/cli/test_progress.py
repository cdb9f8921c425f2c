"""Progress is for terminals."""

from __future__ import annotations

import io
from contextlib import redirect_stderr

from adapterkit.cli.app import App
from adapterkit.cli.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar():
    with redirect_stderr(Terminal()) as terminal, progress(App(), "Hashing", 100) as report:
        assert report is not None
        report(60)
        report(40)
    assert "Hashing" in terminal.getvalue()
    assert "100/100 bytes" in terminal.getvalue()


def test_a_quiet_terminal_shows_none():
    with redirect_stderr(Terminal()) as terminal, progress(App(verbosity=0), "x") as report:
        assert report is None
    assert terminal.getvalue() == ""


def test_a_pipe_shows_none(capsys):
    with progress(App(), "Hashing", 100) as report:
        assert report is None
    assert capsys.readouterr().err == ""

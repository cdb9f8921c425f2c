"""Tables, sizes and escapes."""

from __future__ import annotations

import pytest

from adapterkit.cli import output


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (16487, "16.1 KiB"), (5 << 30, "5.0 GiB"),
     (3 << 50, "3072.0 TiB")],
)  # fmt: skip
def test_sizes_are_for_people(n_bytes, text):
    assert output.size(n_bytes) == text


def test_one_thing_and_two_things():
    assert (output.count(1, "file"), output.count(2, "file")) == ("1 file", "2 files")


def test_a_table_lines_up(capsys):
    output.table(("NAME", "SIZE"), [("a", "1"), ("longer", "22")])
    assert capsys.readouterr().out == "NAME    SIZE\na       1\nlonger  22\n"


def test_a_table_fits_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    output.table(("NAME", "BASE"), [("a" * 30, "b" * 30)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == 30
    assert lines[1] == f"{'a' * 11}...  {'b' * 11}..."


def test_a_cell_cannot_break_a_table(capsys):
    output.table(("NAME",), [("two\nlines\x1b[2J",)])
    assert capsys.readouterr().out == "NAME\ntwo\\nlines\\x1b[2J\n"


def test_json_is_ascii(capsys):
    output.emit({"name": "\x1b[2Jé"})
    assert capsys.readouterr().out == '{\n  "name": "\\u001b[2J\\u00e9"\n}\n'

"""How results are printed; nothing that a name or a file holds reaches a terminal raw."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from adapterkit.cli.app import App
from adapterkit.hub.findings import Finding, clean

if TYPE_CHECKING:
    from adapterkit.hub.adapter import AdapterInfo

MAX_LINE = 4000
# The least width of a column of text; where there is room for less, texts stand below each other.
NARROW = 18
GAP = 2
# How users call what safetensors writes in headers.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def safe(text: str) -> str:
    """`text` with control characters escaped; its line breaks stay."""
    return "\n".join(clean(line, MAX_LINE) for line in text.split("\n"))


def readable(text: str) -> str:
    """A model's text without what drives a terminal; all that letters are made of stays."""
    import unicodedata

    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def say(text: str = "") -> None:
    """A result, to stdout."""
    click.echo(safe(text))


def note(app: App, label: str, text: str) -> None:
    """`Warning:` or `Hint:` and a text, to stderr; silent with -q."""
    if not app.quiet:
        click.echo(f"{click.style(f'{label}:', fg='yellow')} {safe(text)}", err=True)


def emit(value: object) -> None:
    """JSON, to stdout: indented, keys in the order given, ASCII so that any terminal shows it."""
    import json

    click.echo(json.dumps(value, indent=2))


def finding_record(finding: Finding) -> dict[str, str]:
    """The JSON form of a finding."""
    from dataclasses import asdict

    return asdict(finding)


def size(n_bytes: int) -> str:
    """`8600` -> `8.4 KiB`."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min((max(n_bytes, 1).bit_length() - 1) // 10, len(units) - 1)
    return f"{n_bytes / 1024**power:.1f} {units[power]}" if power else f"{n_bytes} B"


def count(n: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def dtype(code: str) -> str:
    """`F32` -> `float32`."""
    return DTYPES.get(code, code)


def meant(info: AdapterInfo, word: str = "on") -> str:
    """`LoRA of rank 8 on q_proj, v_proj`; `prefix tuning`, which has no modules."""
    rank = "" if info.rank is None else f" of rank {info.rank}"
    return f"{info.variant}{rank}" + (f" {word} {', '.join(info.targets)}" if info.targets else "")


def moment(created: str) -> str:
    """An ISO time to the minute, in UTC: `2026-03-01 14:05`."""
    return created[:16].replace("T", " ")


def day(created: str) -> str:
    return created[:10]


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns under their titles. On a terminal the widest are cut until a row fits one line."""
    cells = [[clean(cell, MAX_LINE) for cell in row] for row in [titles, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if sys.stdout.isatty():
        _fit(widths, _terminal_width())
    for row in cells:
        shown = [_cut(cell, width).ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(shown).rstrip())


def side_by_side(titles: Sequence[str], texts: Sequence[str]) -> None:
    """Texts in columns under their titles; below each other where columns would be narrow."""
    width = _terminal_width()
    if width + GAP >= len(titles) * (NARROW + GAP):
        _columns(titles, texts, width)
        return
    for number, (title, text) in enumerate(zip(titles, texts, strict=True)):
        click.echo("\n" * bool(number), nl=False)
        _columns([title], [text], width)


def _columns(titles: Sequence[str], texts: Sequence[str], width: int) -> None:
    from io import StringIO

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="")
    for title in titles:
        grid.add_column(Text(readable(title)), ratio=1, overflow="fold")
    grid.add_row(*(Text(readable(text).expandtabs(4)) for text in texts))
    made = StringIO()
    Console(file=made, width=width, color_system=None).print(grid)
    for line in made.getvalue().splitlines():
        click.echo(line.rstrip())


def fields(pairs: Sequence[tuple[str, str]], indent: str = "") -> None:
    """`name  value` lines, values aligned; pairs with an empty value are left out."""
    kept = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in kept), default=0)
    for name, value in kept:
        click.echo(f"{indent}{name.ljust(width)}  {clean(value, MAX_LINE)}")


def _terminal_width() -> int:
    import shutil

    return shutil.get_terminal_size().columns


def _fit(widths: list[int], available: int) -> None:
    smallest = 6
    while sum(widths) + 2 * (len(widths) - 1) > available:
        widest = max(range(len(widths)), key=widths.__getitem__)
        if widths[widest] <= smallest:
            return
        widths[widest] -= 1


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."

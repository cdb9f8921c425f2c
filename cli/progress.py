"""Progress on a terminal; nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from adapterkit.cli.app import App

# Told of bytes done since it was last told.
Report = Callable[[int], None]


@contextmanager
def progress(app: App, label: str, total: int | None = None) -> Iterator[Report | None]:
    """A function that moves a bar on stderr, or None where that is no terminal or with -q."""
    if app.quiet or not sys.stderr.isatty():
        yield None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.DownloadColumn())
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(label, total=total)
        yield lambda n_bytes: shown.advance(task, n_bytes)

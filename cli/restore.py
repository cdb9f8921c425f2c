"""adapter restore"""

from __future__ import annotations

from pathlib import Path

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import count, say, size
from adapterkit.cli.progress import progress


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@pass_app
def command(app: App, file: Path) -> None:
    """Make the registry anew from a file that `backup` wrote.

    The registry must be empty: `adapter --home FOLDER restore FILE`. Every byte is checked before
    it counts; if anything is missing or wrong, nothing is restored.
    """
    total = file.stat().st_size if file.is_file() else None
    with progress(app, "Restoring", total) as report:
        done = app.registry.restore(file, report or (lambda size: None))
    blobs = count(done.n_blobs, "blob")
    home = app.registry.home.path
    say(f"{home}: {count(done.n_versions, 'version')}, {blobs}, {size(done.size)}")

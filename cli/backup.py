"""adapter backup"""

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
    """Copy the whole registry into one file.

    FILE must be new. It holds the state of one moment, also while others add and remove, and is
    read again when it is written. What has rotted is named, and then there is no file.
    """
    with progress(app, "Copying", app.registry.usage()[1].size) as report:
        done = app.registry.backup(file, report or (lambda size: None))
    blobs = count(done.n_blobs, "blob")
    say(f"{file}: {count(done.n_versions, 'version')}, {blobs}, {size(done.size)}")

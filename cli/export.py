"""adapter export"""

from __future__ import annotations

from pathlib import Path

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import count, say, size
from adapterkit.registry.refs import Ref


@click.command()
@click.argument("ref")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@pass_app
def command(app: App, ref: str, folder: Path) -> None:
    """Write the files of a version into a folder.

    DIR must be new or empty. Every byte is checked against its digest on the way.
    """
    version = app.registry.resolve(Ref.parse(ref))
    app.registry.export(version.ref, folder)
    say(f"{version.ref}: {count(version.n_files, 'file')}, {size(version.size)} in {folder}")

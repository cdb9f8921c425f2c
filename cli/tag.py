"""adapter tag"""

from __future__ import annotations

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import say
from adapterkit.registry.refs import Ref


@click.command()
@click.argument("ref")
@click.argument("tag")
@pass_app
def command(app: App, ref: str, tag: str) -> None:
    """Point a tag at a version.

    TAG is a word such as prod. It may be moved later, and `adapter rm NAME:TAG` takes it away.
    """
    version = app.registry.resolve(Ref.parse(ref))
    before = app.registry.tag(version.ref, tag)
    moved = f", before {before.version}" if before and before.version != version.version else ""
    say(f"{version.ref.short_name}:{tag} is {version.version}{moved}")

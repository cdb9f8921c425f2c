"""adapter mv"""

from __future__ import annotations

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import say
from adapterkit.registry.refs import Ref


@click.command()
@click.argument("name")
@click.argument("new", metavar="NEW")
@pass_app
def command(app: App, name: str, new: str) -> None:
    """Give an adapter another name.

    All versions, tags and the history go along, and the old name leads to the new one. A name that
    was ever used for something else cannot be taken.
    """
    say(f"{Ref.parse(name)} is now {app.registry.mv(Ref.parse(name), Ref.parse(new))}")

"""adapter yank"""

from __future__ import annotations

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import say
from adapterkit.registry.errors import InvalidError
from adapterkit.registry.refs import Ref


@click.command()
@click.argument("ref")
@click.option("--reason", metavar="TEXT", help="Why; shown to whoever asks for it.")
@click.option("--undo", is_flag=True, help="Say that it may be used again.")
@pass_app
def command(app: App, ref: str, reason: str | None, undo: bool) -> None:
    """Say that a version should not be used any more.

    It stays where it is, but NAME alone no longer means it, and whoever uses it by its number, tag
    or digest is warned.
    """
    wanted = Ref.parse(ref)
    if undo:
        if reason is not None:
            raise InvalidError("--undo takes no --reason")
        say(f"{app.registry.unyank(wanted).ref} is not yanked")
    else:
        version = app.registry.yank(wanted, reason or "")
        say(f"yanked {version.ref}{f': {reason}' if reason else ''}")

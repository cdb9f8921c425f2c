"""adapter rm"""

from __future__ import annotations

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import say
from adapterkit.registry.refs import Ref


@click.command()
@click.argument("ref")
@pass_app
def command(app: App, ref: str) -> None:
    """Remove a version, or a tag.

    REF is NAME@VERSION, NAME@sha256:DIGEST, NAME where it has one version only, or NAME:TAG, which
    removes the tag. The number of a removed version is never used for anything else.
    """
    wanted = Ref.parse(ref)
    gone = app.registry.rm(wanted)
    say(f"removed {f'the tag {wanted}' if wanted.tag else gone.ref}")

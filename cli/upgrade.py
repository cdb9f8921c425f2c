"""adapter upgrade"""

from __future__ import annotations

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import say


@click.command()
@pass_app
def command(app: App) -> None:
    """Bring the registry to the format of this program.

    Files that change are copied first, into the folder before-NUMBER of the registry. A registry of
    a newer program is refused. New formats are rare: the command then says that one is needed.
    """
    from adapterkit.registry.reading import default_home
    from adapterkit.registry.upgrade import upgrade

    home = app.home or default_home()
    before, now = upgrade(home.absolute())
    if before == now:
        say(f"{home} has format {now}, the newest")
    else:
        say(f"{home} has format {now}, before {before}; what it was is in before-{before}")

"""adapter remote"""

from __future__ import annotations

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import emit, say, table


@click.group()
def command() -> None:
    """Name remotes.

    A name stands for a URL in `push` and `pull`. Names are kept in the registry.
    """


@command.command("add")
@click.argument("name")
@click.argument("url")
@pass_app
def add(app: App, name: str, url: str) -> None:
    """Give a URL a name: file:///FOLDER."""
    from adapterkit.hub.remotes import aliases

    say(f"{name} is {aliases.add(app.registry, name, url)}")


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def list_(app: App, as_json: bool) -> None:
    """List the names and their URLs."""
    from adapterkit.hub.remotes import aliases

    found = aliases.list(app.registry)
    if as_json:
        emit([{"name": name, "url": url} for name, url in found.items()])
    else:
        table(("NAME", "URL"), list(found.items()))


@command.command("rm")
@click.argument("name")
@pass_app
def rm(app: App, name: str) -> None:
    """Forget a name; what lies at the remote stays."""
    from adapterkit.hub.remotes import aliases

    say(f"removed {name}, which was {aliases.rm(app.registry, name)}")

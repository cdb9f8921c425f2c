"""adapter search"""

from __future__ import annotations

import click

from adapterkit.cli import list as listing
from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import note


@click.command()
@click.argument("words", metavar="TEXT", nargs=-1, required=True)
@click.option(
    "--limit", metavar="N", type=click.IntRange(1), default=50, show_default=True,
    help="Show the N best.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(app: App, words: tuple[str, ...], limit: int, as_json: bool) -> None:
    """Find versions by words, best match first.

    Searched are names, kinds, target modules, bases, notes and model cards. All words of TEXT must
    be there; 'ques*' is the beginning of a word.
    """
    found = app.registry.search(" ".join(words), limit + 1)
    listing.show(app, found[:limit], (), as_json)
    if len(found) > limit:
        note(app, "Hint", f"there are more than {limit}: give more words, or --limit")

"""adapter compare"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import count, emit, say, table

if TYPE_CHECKING:
    from adapterkit.hub.mixing.compare import Comparison, Likeness

SHOWN_MODULES = 20
TITLES = ("|A|", "|B|", "COSINE", "OUTPUTS", "INPUTS", "CONFLICT", "INTERFERENCE")


@click.command()
@click.argument("sources", metavar="SRC SRC...", nargs=-1, required=True)
@click.option("--base", metavar="BASE", help="A folder or ORG/NAME, where it is needed.")
@click.option(
    "--quantization", type=click.Choice(["nf4", "fp4", "int8", "none"]),
    help="How BASE is loaded.  [default: as it is stored]",
)  # fmt: skip
@click.option(
    "--png", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the cosines of every module as a heat map.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(
    app: App, sources: tuple[str, ...], base: str | None, quantization: str | None,
    png: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Show how alike adapters are, and what adding them puts at stake.

    COSINE is that of the two changes as vectors. OUTPUTS and INPUTS say how far they write to and
    read from the same subspaces (mean squared cosine of the principal angles). CONFLICT is the
    share of entries at which they pull in opposite directions. INTERFERENCE is the share of each
    that lies where the other acts: near 0, they can be added without losing any of it.
    """
    from adapterkit.hub.mixing.compare import compare

    found = compare(sources, base=base, quantization=quantization, registry=app.registry)
    if png is not None:
        from adapterkit.hub.mixing.heatmap import draw

        draw(found, png)
    if as_json:
        from dataclasses import asdict

        emit(asdict(found))
    elif len(found.pairs) == 1:
        _one(app, found)
    else:
        _many(found)


def _one(app: App, found: Comparison) -> None:
    (pair,) = found.pairs
    say(f"A  {pair.a}\nB  {pair.b}\n")
    modules = sorted(pair.modules, key=lambda row: -(row.interference or 0.0))
    shown = modules if app.detailed else modules[:SHOWN_MODULES]
    rows = [("all", *cells(pair.total)), *((row.module, *cells(row)) for row in shown)]
    table(("MODULE", *TITLES), rows)
    if modules[len(shown) :]:
        say(f"{count(len(modules) - len(shown), 'module')} more; -v shows all")
    if not modules:
        say("No module is changed by both: they do not touch each other.")


def _many(found: Comparison) -> None:
    rows = [(pair.a, pair.b, *cells(pair.total)) for pair in found.pairs]
    table(("A", "B", *TITLES), rows)


def cells(row: Likeness) -> list[str]:
    sizes = [f"{row.a:.4g}", f"{row.b:.4g}"]
    rest = (row.cosine, row.outputs, row.inputs, row.conflict, row.interference)
    return sizes + ["-" if value is None else f"{value:.3f}" for value in rest]

"""adapter merge"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.cluster import cluster_option, executor
from adapterkit.cli.output import count, emit, say, size, table
from adapterkit.cli.progress import progress
from adapterkit.registry.errors import InvalidError
from adapterkit.registry.refs import split_weight

if TYPE_CHECKING:
    from adapterkit.hub.merge.fidelity import Fidelity, MergeReport
    from adapterkit.hub.merge.rival import Comparison

# Parameters that are shown one by one, those with the least gain; with -v all are.
MOST = 10
TITLES = ("PARAMETER", "FORMAT", "CHANGE", "GAIN", "COSINE", "ERROR", "BASE ERROR")


@click.command()
@click.argument("sources", metavar="SRC[=WEIGHT]...", nargs=-1, required=True)
@click.option("--base", metavar="BASE", required=True, help="A folder or ORG/NAME.")
@click.option(
    "-o", "--output", metavar="DIR", type=click.Path(path_type=Path),
    help="Where the merged model goes: new or empty.",
)  # fmt: skip
@click.option(
    "--quantize", type=click.Choice(["nf4", "fp4", "int8", "none"]),
    help="What is written.  [default: as BASE is stored]",
)  # fmt: skip
@click.option(
    "--onto", type=click.Choice(["original", "dequantized", "auto"]), default="auto",
    show_default=True, help="Which weights of BASE the adapters are added to.",
)  # fmt: skip
@click.option(
    "--trained-on", type=click.Choice(["nf4", "fp4", "int8", "none"]),
    help="What the adapters were trained on, where the registry does not know.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of weights that are not quantized.  [default: as in BASE]",
)  # fmt: skip
@click.option(
    "--min-gain", type=click.FloatRange(0, 1), default=0.5, show_default=True, metavar="G",
    help="Stop when less of the adapters would survive in 8 or 4 bits; warn in other formats.",
)  # fmt: skip
@click.option(
    "--correction-rank", type=click.IntRange(1), metavar="R",
    help="Write a LoRA of this rank too, into DIR/correction, that holds what 8 or 4 bits lost.",
)  # fmt: skip
@click.option(
    "--allow-field", "allow_fields", metavar="NAME", multiple=True,
    help="Accept this config field although its meaning is unknown. Repeatable.",
)  # fmt: skip
@cluster_option
@click.option("--dry-run", is_flag=True, help="Compute the report, and write nothing.")
@click.option("--resume", is_flag=True, help="Go on where a merge into DIR was interrupted.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(
    app: App, /, sources: tuple[str, ...], base: str, output: Path | None, dry_run: bool,
    resume: bool, as_json: bool, cluster: str | None, **settings: Any,
) -> None:  # fmt: skip
    """Put adapters into the weights of their base.

    SRC is a folder (./tone) or a reference (team/sql@1.2); its WEIGHT is 1 when left out, and
    negative ones subtract. DIR gets a model that transformers loads, of the same files as BASE. It
    is there only when it is whole.

    GAIN is the share of an adapter's change that survived the rounding to the format, COSINE how
    much of what happened to the weight is that change, ERROR the size of the difference over that
    of the change, BASE ERROR the same of what the format does to the base alone. With
    --correction-rank they are those of the merged model with its correction attached, and the
    report says whether the base with one blended adapter of that rank would be nearer.
    """
    if output is None and not dry_run:
        raise InvalidError("there is no folder to merge into", hint="-o DIR, or --dry-run")
    from adapterkit.hub import merge
    from adapterkit.hub.bases.fingerprint import weights_size
    from adapterkit.hub.bases.folder import find_base, read_base

    place = find_base(base)
    label = "Measuring" if dry_run else "Merging"
    whole = weights_size(read_base(place))
    with executor(app, cluster) as machines, progress(app, label, whole) as report:
        made = merge(
            parsed(sources), base=place, out=output, dry_run=dry_run, resume=resume,
            progress=report, executor=machines, registry=app.registry, **settings,
        )  # fmt: skip
    if as_json:
        emit(made.record())
    else:
        tell(app, made)


def parsed(sources: tuple[str, ...]) -> dict[str, float]:
    """Source -> weight."""
    found: dict[str, float] = {}
    for text in sources:
        source, weight = split_weight(text)
        if source in found:
            raise InvalidError(f"{source} is given twice", hint="give it once, with one weight")
        found[source] = 1.0 if weight is None else weight
    return found


def tell(app: App, made: MergeReport) -> None:
    shown = sorted(made.parameters, key=lambda each: each.gain)
    shown = shown if app.detailed else shown[:MOST]
    if shown:
        table(TITLES, [row(each) for each in [*shown, made.total]])
    if len(shown) < len(made.parameters):
        say(f"and {len(made.parameters) - len(shown)} more, of more gain: -v shows all")
    say(f"onto {made.onto} weights: {made.why}")
    if made.untied:
        say("the head is a table of its own now: tie_word_embeddings is false")
    for key in made.added:
        say(f"new: {key}")
    if made.correction is not None:
        tell_correction(made.correction)
    changed = count(len(made.parameters), "parameter")
    if made.folder is None:
        say(f"nothing written: {changed} would change")
    else:
        say(f"{made.folder}: {changed} changed, {size(made.size)} of weights")


def tell_correction(found: Comparison) -> None:
    """What it is worth, beside what else could be done."""
    table(
        ("CORRECTED", "GAIN", "COSINE", "LEFT"),
        [
            ("not", *survived(found.plain), ""),
            (f"merged, with a correction of rank {found.rank}", *survived(found.corrected),
             f"{found.left:.3f}"),
            (f"not merged, with a blended adapter of rank {found.rank}", *survived(found.rival),
             f"{found.rival_left:.3f}"),
        ],
    )  # fmt: skip
    if found.better == "correction":
        say("better: the merged model with its correction, DIR/correction")
    else:
        say(f"better: the base as it is, with one adapter: adapter blend --rank {found.rank}")


def survived(of: Fidelity) -> tuple[str, str]:
    return f"{of.gain:.3f}", f"{of.cosine:.3f}"


def row(each: Fidelity) -> tuple[str, ...]:
    figures = (each.gain, each.cosine, each.error, each.own_error)
    return (each.name, each.format, f"{each.size:.2%}", *(f"{value:.3f}" for value in figures))

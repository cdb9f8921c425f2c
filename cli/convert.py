"""adapter convert"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli import hints as hinted
from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import count, dtype, emit, note, say, size, table
from adapterkit.registry.errors import InvalidError
from adapterkit.registry.refs import PathSource, Ref, parse_source

if TYPE_CHECKING:
    from adapterkit.hub.convert import Conversion, Converted
    from adapterkit.hub.made import Made

# Modules that are shown one by one; with -v all are.
MOST = 20


@click.command()
@click.argument("source", metavar="SRC")
@click.option("--to", type=click.Choice(["lora"]), default="lora", show_default=True)
@click.option("--rank", type=click.IntRange(1), metavar="R", help="At most; the best of it.")
@click.option("--base", metavar="BASE", help="A folder or ORG/NAME, where it is needed.")
@click.option(
    "--quantization", type=click.Choice(["nf4", "fp4", "int8", "none"]),
    help="How BASE is loaded where the adapter runs.  [default: as it is stored]",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of the factors.  [default: a half precision of SRC where exact, else float32]",
)  # fmt: skip
@click.option(
    "--allow-field", "allow_fields", metavar="NAME", multiple=True,
    help="Accept this config field although its meaning is unknown. Repeatable.",
)  # fmt: skip
@hinted.option
@click.option(
    "-o", "--output", metavar="NAME[@VERSION]|DIR", required=True,
    help="Store it under NAME, or write it into the new folder ./DIR.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(
    app: App, source: str, to: str, rank: int | None, base: str | None, quantization: str | None,
    dtype: str | None, allow_fields: tuple[str, ...], hints: dict[str, Any], output: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Make a plain LoRA of an adapter of another kind.

    SRC is a folder (./tone) or a reference (team/sql@1.2). It is exact where the adapter is a
    low-rank change: LoRA with patterns or rsLoRA, MoSLoRA, AdaLoRA, VeRA, LoHa, LoKr. Otherwise,
    as for DoRA and IA3, --rank gives the best of that rank, and its error is printed. The result
    has no patterns, and alpha is its rank, so that every reader of LoRA agrees about it.
    """
    from adapterkit.hub.convert import convert
    from adapterkit.hub.locate import with_hints

    place = target(output)
    made = convert(
        with_hints(source, hints), to, rank, base, registry=app.registry,
        quantization=quantization, dtype=dtype, allow_fields=allow_fields,
    )  # fmt: skip
    done = deliver(app, made, place)
    if as_json:
        emit(done | record(made))
    else:
        tell(app, made, done)


def target(output: str) -> Ref | PathSource:
    """Where a new adapter goes: a folder if it is written as one, else a name."""
    place = parse_source(output)
    if isinstance(place, PathSource):
        return place
    if not isinstance(place, Ref) or place.tag or place.digest:
        raise InvalidError(f"{output} is no place for a new adapter", hint="NAME, or ./FOLDER")
    return place


def deliver(app: App, made: Made, place: Ref | PathSource) -> dict[str, Any]:
    """Store or write it; where it is now, in JSON."""
    if isinstance(place, PathSource):
        return {"folder": str(made.save(place.path)), "ref": None, "id": None}
    added = made.add(app.registry, place.full_name, version=place.version)
    return {"folder": None, "ref": str(added.ref), "id": f"sha256:{added.id}"}


def record(made: Conversion) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "rank": made.rank,
        "dtype": made.dtype,
        "error": made.error,
        "rounding": made.rounding,
        "size": made.info.size,
        "modules": [asdict(module) for module in made.modules],
        "recipe": dict(made.recipe),
    }


def tell(app: App, made: Conversion, done: dict[str, Any]) -> None:
    info = made.info
    where = done["ref"] or done["folder"]
    what = info.variant + (f" of rank {made.rank}" if made.rank else "")
    on = f" on {', '.join(info.targets)}" if info.targets else ""
    say(f"{where}: {what}{on}, {size(info.size)}")
    if made.error:
        say(f"  error {made.error:.3g} of the change, over {count(len(made.modules), 'module')}")
    elif made.modules:
        say(f"  exact; rounding to {dtype(made.dtype)} changes {made.rounding:.1g} of it")
    if done["id"]:
        say(f"  {done['id']}")
    lossy = sorted((m for m in made.modules if m.error), key=lambda m: (-m.error, m.module))
    shown = lossy if app.detailed else lossy[:MOST]
    if shown:
        table(("MODULE", "RANK", "EXACT AT", "ERROR"), [row(module) for module in shown])
    if lossy[len(shown) :]:
        note(app, "Hint", f"{count(len(lossy) - len(shown), 'module')} more; -v shows all")


def row(module: Converted) -> tuple[str, ...]:
    return module.module, str(module.rank), str(module.needed), f"{module.error:.3g}"

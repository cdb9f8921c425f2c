"""adapter blend"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.cluster import cluster_option, executor
from adapterkit.cli.convert import deliver, record, target, tell
from adapterkit.cli.output import count, emit, say
from adapterkit.registry.errors import DamagedError, InvalidError
from adapterkit.registry.refs import PathSource, Ref, split_weight

if TYPE_CHECKING:
    from concurrent.futures import Executor


def _rank(ctx: click.Context, param: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == "auto":
        return value
    if not value.isdecimal() or not int(value):
        raise click.BadParameter(f"{value!r} is neither a positive number nor auto")
    return int(value)


def _shares(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> dict[str, list[float]]:
    found = {}
    for value in values:
        pattern, _, weights = value.rpartition("=")
        try:
            found[pattern] = [float(each) for each in weights.split(",")]
        except ValueError:
            pattern = ""
        if not pattern:
            raise click.BadParameter(f"{value!r} is not PATTERN=WEIGHT,WEIGHT,...")
    return found


@click.command()
@click.argument("sources", metavar="SRC[=WEIGHT]...", nargs=-1)
@click.option("--method", "-m", metavar="M", default="sum", show_default=True, help="As above.")
@click.option(
    "--rank", metavar="R|auto", callback=_rank,
    help="Of the result, at most; auto picks one per module.",
)  # fmt: skip
@click.option("--energy", type=float, help="Of the change, kept by --rank auto.  [default: 0.99]")
@click.option(
    "--density", type=float, help="Share of the entries that pruning keeps.  [default: 0.5]"
)
@click.option(
    "--gamma", type=float, help="Share of the largest entries breadcrumbs drops.  [default: 0.01]"
)
@click.option(
    "--epsilon", type=float, help="How far della's keeping varies around density.  [default: 0.1]"
)
@click.option("--seed", type=int, help="Of random choices.  [default: 0]")
@click.option("--inner", metavar="M", help="What knots and core merge by.  [default: ties]")
@click.option(
    "--sign", type=click.Choice(["total", "frequency"]),
    help="How ties elects a sign.  [default: total]",
)  # fmt: skip
@click.option("--clamp", type=float, help="svd_clamp of the dialect peft.")
@click.option(
    "--dialect", type=click.Choice(["paper", "peft", "mergekit", "adapters"]),
    help="Whose meaning a method's name has.  [default: paper]",
)  # fmt: skip
@click.option(
    "--at", metavar="PATTERN=W,...", multiple=True, callback=_shares,
    help="Weights for modules of these names, multiplied with SRC's. Repeatable.",
)  # fmt: skip
@click.option("--base", metavar="BASE", help="A folder or ORG/NAME, where it is needed.")
@click.option(
    "--quantization", type=click.Choice(["nf4", "fp4", "int8", "none"]),
    help="How BASE is loaded where the result runs.  [default: as it is stored]",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="[default: float32]"
)
@click.option(
    "--allow-field", "allow_fields", metavar="NAME", multiple=True,
    help="Accept this config field although its meaning is unknown. Repeatable.",
)  # fmt: skip
@click.option(
    "-o", "--output", metavar="NAME[@VERSION]|DIR",
    help="Store it under NAME, or write it into the new folder ./DIR.",
)  # fmt: skip
@click.option(
    "--as", "form", type=click.Choice(["adapter", "recipe"]), default="adapter", show_default=True,
    help="A recipe keeps any kinds, exactly, by reference; SRC are versions.",
)  # fmt: skip
@cluster_option
@click.option("--verify", metavar="REF", help="Make REF again from its recipe, and compare.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(
    app: App, /, sources: tuple[str, ...], output: str | None, verify: str | None, base: str | None,
    form: str, as_json: bool, cluster: str | None, at: dict[str, list[float]], **settings: Any,
) -> None:  # fmt: skip
    """Blend adapters into one.

    SRC is a folder (./tone) or a reference (team/sql@1.2); its WEIGHT is 1 when left out, and
    negative ones subtract. The result is a LoRA that PEFT loads; a DoRA where a sum of DoRAs is
    exact as one; of IA3s, of BitFits, of prompts, of bottlenecks, one of these.

    \b
    sum              the exact weighted sum, of the sum of ranks
    svd              the best of a rank of that sum
    average          the sum, its weights made to add up to 1
    slerp            along the arc between two adapters
    ties, dare_linear, dare_ties, della, della_linear, breadcrumbs,
    magnitude_prune  on the single entries of the changes
    knots, tsv, iso_c, core
                     in a basis that the changes share

    With --dialect peft, the combination types of PEFT's add_weighted_adapter; with --dialect
    adapters, those of AdapterHub's average_adapter.
    """
    if verify is not None:
        with executor(app, cluster) as machines:
            _verify(app, verify, base, sources, output, as_json, machines)
        return
    if not sources or output is None:
        raise InvalidError("give the adapters to blend, and -o NAME or -o ./FOLDER")
    place = target(output)
    chosen = {name: value for name, value in settings.items() if value not in (None, ())}
    given = [(source, 1.0 if w is None else w) for source, w in map(split_weight, sources)]
    if form == "recipe":
        extra = at or base or cluster or chosen.keys() - {"method"}
        _keep(app, given, place, extra, chosen["method"], as_json)
        return
    from adapterkit.hub.mixing.blend import blend

    with executor(app, cluster) as machines:
        made = blend(given, base=base, registry=app.registry, executor=machines, at=at, **chosen)
    done = deliver(app, made, place)
    if as_json:
        emit(done | record(made) | {"dora": made.dora})
    else:
        tell(app, made, done)


def _keep(
    app: App, given: list[tuple[str, float]], place: Ref | PathSource, extra: object, method: str,
    as_json: bool,
) -> None:  # fmt: skip
    """The sum as a recipe."""
    if extra or method != "sum":
        raise InvalidError("a recipe is the plain sum of its parts: it takes weights and -o only")
    from adapterkit.hub.mixing.kept import as_recipe, made_of, store

    recipe = as_recipe(given, app.registry)
    done: dict[str, Any] = {"folder": None, "ref": None, "id": None}
    if isinstance(place, PathSource):
        done["folder"] = str(made_of(recipe).save(place.path))
    else:
        added = store(recipe, app.registry, place.full_name, place.version)
        done |= {"ref": str(added.ref), "id": f"sha256:{added.id}"}
    if as_json:
        emit(done | {"recipe": recipe.record()})
        return
    say(f"{done['ref'] or done['folder']}: a recipe of {count(len(recipe.parts), 'part')}")
    if done["id"]:
        say(f"  {done['id']}")
    for part in recipe.parts:
        say(f"  {part.weight:g} {part.label}")


def _verify(
    app: App, ref: str, base: str | None, sources: tuple[str, ...], output: str | None,
    as_json: bool, machines: Executor | None,
) -> None:  # fmt: skip
    if sources or output:
        raise InvalidError("--verify takes no adapters and no -o: the recipe of REF names them")
    from adapterkit.hub.mixing.rebuild import CLOSE, rebuild

    found = rebuild(ref, registry=app.registry, base=base, executor=machines)
    if as_json:
        emit({"ref": ref, "same": found.same, "distance": found.distance, "module": found.module})
    elif found.same:
        say(f"{ref}: same bytes")
    elif found.close:
        say(f"{ref}: same within {CLOSE:g}, per module")
    if not found.close:
        raise DamagedError(
            f"{ref} is not what its recipe makes: {found.module} differs by {found.distance:.2g}"
        )

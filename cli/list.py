"""adapter list"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import day, emit, note, size, table
from adapterkit.registry.filters import ORDERS, Condition, Filter, parse_ranks

if TYPE_CHECKING:
    from adapterkit.registry import Version

Metrics = Mapping[str, Mapping[str, float]]


@click.command()
@click.argument("pattern", required=False)
@click.option("--kind", help="Such as lora or dora.")
@click.option("--rank", metavar="N|N..M", help="Such as 16, 8..64, 8.. or ..64.")
@click.option("--base", metavar="PATTERN", help="The id of the base, or the last part of it.")
@click.option(
    "--target", "targets", metavar="NAME", multiple=True,
    help="Changes these modules, such as q_proj. Repeatable.",
)  # fmt: skip
@click.option("--quantization", metavar="Q", help="Trained on a base in this form, such as nf4.")
@click.option("--tag", metavar="TAG", help="Has this tag.")
@click.option(
    "--where", metavar="CONDITION", multiple=True,
    help="Such as 'loss<1.2', about a metric. Repeatable.",
)  # fmt: skip
@click.option(
    "--sort", metavar="KEY", default="name", show_default=True,
    help="name, added, size, rank, a metric, or -METRIC for the largest first.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(
    app: App, pattern: str | None, kind: str | None, rank: str | None, base: str | None,
    targets: tuple[str, ...], quantization: str | None, tag: str | None, where: tuple[str, ...],
    sort: str, as_json: bool,
) -> None:  # fmt: skip
    """List adapters and versions.

    PATTERN selects by name: 'team/*', '*-sql'. Everything else that is given must hold too. Metrics
    that are asked for are shown.
    """
    conditions = tuple(map(Condition.parse, where))
    wanted = Filter(
        kind, parse_ranks(rank) if rank else None, base, targets, quantization, tag, conditions
    )
    found = app.registry.list(pattern, wanted, sort)
    shown = [condition.metric for condition in conditions]
    shown += [] if sort in ORDERS else [sort.removeprefix("-")]
    show(app, found, list(dict.fromkeys(shown)), as_json)
    if not (as_json or found) and (pattern, wanted) == (None, Filter()):
        note(app, "Hint", "the registry is empty: adapter add FOLDER NAME")


def show(app: App, found: Sequence[Version], metrics: Sequence[str], as_json: bool) -> None:
    """As a table, with a column for each of `metrics`, or as JSON with all of them."""
    values = app.registry.metrics_of(found) if metrics or as_json else {}
    if as_json:
        emit([record(version) | {"metrics": values.get(version.id, {})} for version in found])
        return
    titles = ("NAME", "VERSION", "KIND", "RANK", "BASE", "TAGS", *metrics, "SIZE", "ADDED")
    table(titles, [row(version, values.get(version.id, {}), metrics) for version in found])
    for version in found:
        if version.damaged:
            note(app, "Warning", f"{version.ref}: {version.damaged}")


def row(version: Version, values: Mapping[str, float], metrics: Sequence[str]) -> tuple[str, ...]:
    facts = version.facts
    rank = "" if facts.rank is None else str(facts.rank)
    kind = "damaged" if version.damaged else facts.kind
    number = version.version if version.yanked is None else f"{version.version} yanked"
    numbers = [f"{values[name]:g}" if name in values else "" for name in metrics]
    return (
        version.ref.short_name, number, kind, rank, facts.base, ", ".join(version.tags), *numbers,
        size(version.size), day(version.created),
    )  # fmt: skip


def record(version: Version) -> dict[str, Any]:
    """The JSON form of a version; `show` adds to it."""
    facts = asdict(version.facts)
    return {
        "ref": str(version.ref),
        "name": version.name,
        "version": version.version,
        "id": f"sha256:{version.id}",
        "created": version.created,
        "author": version.author,
        "tags": list(version.tags),
        "size": version.size,
        "n_files": version.n_files,
        "damaged": version.damaged,
        "yanked": version.yanked,
        **facts,
        "targets": list(version.facts.targets),
    }

"""adapter list"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import day, emit, note, size, table

if TYPE_CHECKING:
    from adapterkit.registry import Version


@click.command()
@click.argument("pattern", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(app: App, pattern: str | None, as_json: bool) -> None:
    """List adapters and versions.

    PATTERN selects by name: 'team/*', '*-sql'.
    """
    found = app.registry.list(pattern)
    if as_json:
        emit([record(version) for version in found])
        return
    titles = ("NAME", "VERSION", "KIND", "RANK", "BASE", "TAGS", "SIZE", "ADDED")
    table(titles, [row(version) for version in found])
    for version in found:
        if version.damaged:
            note(app, "Warning", f"{version.ref}: {version.damaged}")
    if not found and pattern is None:
        note(app, "Hint", "the registry is empty: adapter add FOLDER NAME")


def row(version: Version) -> tuple[str, ...]:
    facts = version.facts
    rank = "" if facts.rank is None else str(facts.rank)
    kind = "damaged" if version.damaged else facts.kind
    number = version.version if version.yanked is None else f"{version.version} yanked"
    return (
        version.ref.short_name, number, kind, rank, facts.base,
        ", ".join(version.tags), size(version.size), day(version.created),
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

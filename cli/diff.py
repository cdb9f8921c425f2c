"""adapter diff"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import count, dtype, emit, say, table

if TYPE_CHECKING:
    from adapterkit.hub.diff import Change, Diff, ModuleDiff

SHOWN_MODULES = 20


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(app: App, a: str, b: str, as_json: bool) -> None:
    """Show what differs between two adapters.

    A and B are references (team/sql@1.2) or folders (./tone). Compared are configs, ranks, targets,
    metrics, and the change each makes to each module: |A| and |B| are its norms, computed from the
    factors, |A-B| is the norm of the difference. No base is needed; what only a base could tell is
    marked. The modules that differ most are shown, with -v all.
    """
    from adapterkit.hub.diff import diff

    found = diff(a, b, app.registry)
    if as_json:
        emit(record(found))
    else:
        tell(found, None if app.detailed else SHOWN_MODULES)


def record(found: Diff) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(found)


def tell(found: Diff, limit: int | None) -> None:
    say(f"A  {found.a}\nB  {found.b}")
    changes("config", found.config)
    changes("metrics", found.metrics)
    if all(module.distance == 0 for module in found.modules):
        say("\nThe weights are the same.")
        return
    say()
    rows = sorted(found.modules, key=lambda m: -(m.distance if m.distance is not None else 1e300))
    shown = [found.total, *rows[:limit]]
    table(("MODULE", "PART", "|A|", "|B|", "|A-B|", "COSINE", ""), [row(m) for m in shown])
    if len(shown) <= len(rows):
        say(f"{count(len(rows) - len(shown) + 1, 'part')} more; -v shows all")
    if found.total.needs_base:
        say("needs base: the base's weights have a part in it, so this is not all there is")


def changes(title: str, found: Sequence[Change]) -> None:
    if found:
        say()
        table((title.upper(), "A", "B"), [(c.field, text(c.a), text(c.b)) for c in found])


def text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        value = {dtype(name): item for name, item in value.items()}
    return f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')


def row(found: ModuleDiff) -> tuple[str, ...]:
    numbers = [
        "" if number is None else f"{number:.4g}"
        for number in (found.a, found.b, found.distance, found.cosine)
    ]
    return found.module or "all", found.part, *numbers, "needs base" if found.needs_base else ""

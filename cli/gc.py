"""adapter gc"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import count, emit, say, size

if TYPE_CHECKING:
    from adapterkit.registry import Version
    from adapterkit.registry.gc import Plan

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def duration(text: str) -> timedelta:
    found = re.fullmatch(r"(\d{1,6})([smhdw]?)", text)
    if found is None or not (found[2] or not found[1].strip("0")):
        raise click.BadParameter(f"{text!r} is not a time such as 90m, 36h, 30d or 0")
    return timedelta(**{_UNITS[found[2] or "s"]: int(found[1])})


@click.command()
@click.argument("pattern", required=False)
@click.option(
    "--keep-last", type=click.IntRange(0), metavar="N", help="First remove all but N per name."
)
@click.option("--older-than", type=duration, metavar="TIME", help="Remove only older ones.")
@click.option("--keep-tagged", is_flag=True, help="Remove none that has a tag.")
@click.option(
    "--grace", type=duration, default="1d", show_default=True, metavar="TIME",
    help="Leave what was stored, removed or trashed since.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(
    app: App, pattern: str | None, keep_last: int | None, older_than: timedelta | None,
    keep_tagged: bool, grace: timedelta, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Free the room of what no version needs.

    Blobs that nothing refers to go to the trash, and are deleted by a later gc, when they have been
    there for the grace. An add or pull that needs one meanwhile takes it back. TIME is such as 90m,
    36h or 30d.

    With --keep-last or --older-than, versions are removed first (as by rm): those of the names
    that match PATTERN, or of all. Never removed: the version that a bare NAME means, and one with a
    protected tag.
    """
    from adapterkit.registry.retention import Retention

    gone: list[Version] = []
    if keep_last is not None or older_than is not None or keep_tagged:
        rule = Retention(keep_last, older_than, keep_tagged)
        registry = app.registry
        act = registry.outdated if dry_run else registry.retain
        gone = list(act(rule, pattern))
    elif pattern is not None:
        raise click.UsageError("PATTERN is for --keep-last and --older-than")
    plan = app.registry.gc(grace, dry_run=dry_run)
    if as_json:
        emit(record(gone, plan, dry_run))
    else:
        tell(gone, plan, dry_run)


def record(gone: list[Version], plan: Plan, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "removed": [str(version.ref) for version in gone],
        "trashed": {"n_blobs": len(plan.thrown), "size": plan.trashed},
        "deleted": {"n_blobs": len(plan.deleted), "size": plan.freed},
        "revived": [f"sha256:{digest}" for digest in plan.revived],
        "n_spared": plan.spared,
        "leftovers": list(plan.leftovers),
    }


def tell(gone: list[Version], plan: Plan, dry_run: bool) -> None:
    would = "would be " if dry_run else ""
    for version in gone:
        say(f"{would}removed: {version.ref}")
    parts = [
        (f"{would}moved to the trash", len(plan.thrown), plan.trashed),
        (f"{would}deleted from the trash", len(plan.deleted), plan.freed),
    ]
    for text, n_blobs, n_bytes in parts:
        say(f"{text}: {count(n_blobs, 'blob')}, {size(n_bytes)}")
    if plan.revived:
        say(f"{would}taken back from the trash: {count(len(plan.revived), 'blob')}")
    if plan.leftovers:
        say(f"{would}removed from tmp: {count(len(plan.leftovers), 'leftover')}")
    if plan.spared:
        say(f"left, as too young or in use: {count(plan.spared, 'blob')}")

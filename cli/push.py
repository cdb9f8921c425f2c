"""adapter push"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import count, emit, say, size
from adapterkit.cli.progress import progress
from adapterkit.registry.errors import InvalidError
from adapterkit.registry.refs import Ref, parse_remote

if TYPE_CHECKING:
    from adapterkit.hub.remotes.plans import PullPlan, PushPlan


@click.command()
@click.argument("ref")
@click.argument("url", metavar="REMOTE")
@click.option("--tag", "tags", metavar="TAG", multiple=True, help="Move TAG there too. Repeatable.")
@click.option("--dry-run", is_flag=True, help="Say what would be sent, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(
    app: App, ref: str, url: str, tags: tuple[str, ...], dry_run: bool, as_json: bool
) -> None:
    """Send an adapter to a remote.

    REMOTE is file:///FOLDER or the name of a remote. What it has already is not sent again, and an
    interrupted push goes on where it stopped. Tags of the version go along where the remote does
    not have them yet.
    """
    from adapterkit.hub import remotes, sync

    if (named := parse_remote(url)).ref is not None:
        raise InvalidError(f"{url} names an adapter", hint=f"a push keeps the name: {named.remote}")
    remote = remotes.connect(url, app.registry)
    plan = sync.plan_push(app.registry, Ref.parse(ref), remote, tags)
    if not dry_run:
        with progress(app, "Sending", plan.size) as report:
            sync.push(app.registry, plan, remote, report)
    if as_json:
        emit(record(plan, dry_run) | {"ref": str(plan.ref)})
    else:
        tell(app, str(plan.ref), plan, "would send" if dry_run else "sent")


def record(plan: PushPlan | PullPlan, dry_run: bool) -> dict[str, Any]:
    """The JSON form of a plan for a push or a pull."""
    return {
        "id": f"sha256:{plan.id}",
        "remote": plan.remote,
        "dry_run": dry_run,
        "new": not plan.published,
        "n_blobs": len(plan.pieces),
        "size": plan.size,
        "blobs": [
            {"name": piece.name, "digest": f"sha256:{piece.digest}", "size": piece.size}
            for piece in plan.pieces
        ],
        "parts": [str(part.ref) for part in plan.parts],
        "tags": list(plan.tags),
        "kept_tags": list(plan.kept_tags),
        "yank": None if plan.yank is None else asdict(plan.yank),
        "former_names": list(plan.former),
    }


def tell(app: App, label: str, plan: PushPlan | PullPlan, verb: str) -> None:
    if plan.is_done:
        say(f"{label}: already there, nothing new")
    else:
        say(f"{label}: {verb} {count(len(plan.pieces), 'blob')}, {size(plan.size)}")
    if plan.parts:
        say(f"  with its parts {', '.join(str(part.ref) for part in plan.parts)}")
    if app.detailed:
        for piece in plan.pieces:
            say(f"  {piece.name}  sha256:{piece.digest}  {size(piece.size)}")
    if plan.yank is not None:
        state = "yanked" if plan.yank.yanked else "yanked no more"
        say(f"  {state}: {plan.yank.reason}" if plan.yank.reason else f"  {state}")
    for name in plan.former:
        say(f"  {Ref.parse(name)} leads to it")
    for tag in plan.kept_tags:
        say(f"  the tag {tag} stays on another version; --tag {tag} moves it")

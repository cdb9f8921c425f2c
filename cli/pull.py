"""adapter pull"""

from __future__ import annotations

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import emit, say
from adapterkit.cli.progress import progress
from adapterkit.cli.push import record, tell
from adapterkit.registry.errors import InvalidError
from adapterkit.registry.refs import Ref, parse_remote


@click.command()
@click.argument("url", metavar="REMOTE#NAME[@VERSION|:TAG]")
@click.argument("name", required=False)
@click.option("--tag", "tags", metavar="TAG", multiple=True, help="Move TAG here too. Repeatable.")
@click.option("--dry-run", is_flag=True, help="Say what would be fetched, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(
    app: App, url: str, name: str | None, tags: tuple[str, ...], dry_run: bool, as_json: bool
) -> None:
    """Fetch an adapter from a remote.

    REMOTE is file:///FOLDER or the name of a remote. It is stored under NAME, or its own name, with
    the number it has there. Every byte is checked, and the manifest against the files, before it
    becomes visible. What is here already is not fetched again, and an interrupted pull goes on
    where it stopped.
    """
    from adapterkit.hub import remotes, sync
    from adapterkit.hub.arrival import recheck

    wanted = parse_remote(url).ref
    if wanted is None:
        raise InvalidError(f"{url} does not say which adapter", hint=f"write {url}#NAME")
    if name is not None and str(Ref.parse(name)) != Ref.parse(name).short_name:
        raise InvalidError(f"{name} is a reference, expected a name")
    remote = remotes.connect(url, app.registry)
    plan = sync.plan_pull(app.registry, remote, wanted, name, tags)
    if not dry_run:
        with progress(app, "Fetching", plan.size) as report:
            sync.pull(app.registry, plan, remote, report, recheck)
    if as_json:
        emit(record(plan, dry_run) | {"source": str(plan.source), "ref": str(plan.ref)})
    else:
        tell(app, str(plan.ref), plan, "would fetch" if dry_run else "fetched")
        if plan.kept_name:
            old, new = Ref.parse(plan.kept_name), Ref.parse(plan.source.full_name)
            say(f"  {old} is called {new} there; adapter mv {old} {new} does the same here")

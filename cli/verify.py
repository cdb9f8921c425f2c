"""adapter verify"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import count, emit, say, size
from adapterkit.cli.progress import progress
from adapterkit.registry.errors import DamagedError, InvalidError
from adapterkit.registry.refs import Ref

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.registry.problems import Health, Problem
    from adapterkit.registry.repair import Mend


@click.command()
@click.argument("ref", required=False)
@click.option("--rebuild", is_flag=True, help="Make the catalog anew from log and blobs first.")
@click.option(
    "--repair-from", "remotes", metavar="REMOTE", multiple=True,
    help="Replace damaged blobs by good ones from there. Repeatable.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(
    app: App, ref: str | None, rebuild: bool, remotes: tuple[str, ...], as_json: bool
) -> None:
    """Read everything stored and say what is damaged.

    Every blob is hashed, every line of the log checked, and the catalog compared with one made
    anew. REF: only the blobs of that version. What is wrong is named with what it affects and how
    to repair it; then the exit code is 5. Notes (what an interruption left, what nothing needs) are
    no damage.

    With --repair-from (file:///FOLDER or the name of a remote), a blob that is damaged or missing
    is replaced, and only then: from the trash, from where it lies under a wrong name, or from the
    first REMOTE that has it. It is hashed before it takes its place. What is still damaged
    afterwards is told with the reason.
    """
    if ref is not None and (rebuild or remotes):
        option = "--rebuild" if rebuild else "--repair-from"
        raise InvalidError(f"{option} is about the whole registry, not about one version")
    mends: Sequence[Mend] = ()
    if ref is not None:
        found = of_version(app, Ref.parse(ref))
    elif remotes:
        found, mends = repaired(app, remotes, rebuild)
    else:
        found = of_all(app, rebuild)
    if as_json:
        emit(record(found, mends))
    else:
        tell(app, found, mends)
    if found.damage:
        click.get_current_context().exit(DamagedError.exit_code)


def of_version(app: App, ref: Ref) -> Health:
    from adapterkit.registry.verify import verify_version

    version = app.registry.resolve(ref)
    with progress(app, "Reading", version.size) as report:
        return verify_version(app.registry.home, version.ref, report)


def of_all(app: App, rebuild: bool) -> Health:
    """Without opening the registry, which would repair the catalog before it was looked at."""
    from adapterkit.registry.reading import default_home
    from adapterkit.registry.verify import to_read, verify

    home = app.home or default_home()
    if rebuild:
        app.registry.home.rebuild()
    with progress(app, "Reading", to_read(home)) as report:
        return verify(home, progress=report)


def repaired(app: App, places: Sequence[str], rebuild: bool) -> tuple[Health, Sequence[Mend]]:
    """Without opening the registry either: its old catalog may hold what else is lost."""
    from adapterkit.hub.remotes import connect
    from adapterkit.registry.reading import default_home
    from adapterkit.registry.refs import parse_remote
    from adapterkit.registry.repair import repair
    from adapterkit.registry.verify import to_read

    home = (app.home or default_home()).absolute()
    for place in places:
        if (named := parse_remote(place)).ref is not None:
            raise InvalidError(f"{place} names an adapter", hint=f"all is repaired: {named.remote}")
    sources = [connect(place, home) for place in places]
    alone = app.single_writer
    with progress(app, "Reading", 2 * to_read(home)) as report:
        told = report or (lambda size: None)
        done = repair(home, sources, progress=told, rebuild=rebuild, single_writer=alone)
    return done.health, done.mends


def record(found: Health, mends: Sequence[Mend] = ()) -> dict[str, Any]:
    return {
        "damaged": bool(found.damage),
        "problems": [asdict(p) | {"affects": list(p.affects)} for p in found.damage],
        "notes": [asdict(p) | {"affects": list(p.affects)} for p in found.notes],
        "n_blobs": found.n_blobs,
        "n_bytes": found.n_bytes,
        "n_records": found.n_records,
        "repaired": [
            {"digest": f"sha256:{m.digest}", "affects": list(m.affects), "source": m.source}
            for m in mends
            if m.source
        ],
        "not_repaired": [
            {"digest": f"sha256:{m.digest}", "affects": list(m.affects), "why": list(m.reasons)}
            for m in mends
            if not m.source
        ],
    }


def tell(app: App, found: Health, mends: Sequence[Mend] = ()) -> None:
    for mend in mends:
        state = f"repaired, from {mend.source}" if mend.source else "still damaged"
        say(f"{mend.digest[:12]}: {state}")
        show_affected(mend.affects)
        for reason in mend.reasons:
            say(f"  {reason}")
    for problem in found.damage:
        show(problem)
    if app.detailed:
        for problem in found.notes:
            show(problem)
    elif found.notes:
        say(f"{count(len(found.notes), 'note')}, no damage: adapter -v verify shows them")
    read = f"{count(found.n_blobs, 'blob')}, {size(found.n_bytes)}"
    state = f"{count(len(found.damage), 'problem')}" if found.damage else "all good"
    say(f"{state}: read {read}, {count(found.n_records, 'record')}")


def show(problem: Problem) -> None:
    say(f"{problem.what}: {problem.where}: {problem.detail}")
    show_affected(problem.affects)
    say(f"  repair: {problem.repair}")


def show_affected(affects: Sequence[str]) -> None:
    for affected in affects[:20]:
        say(f"  affects {affected}")
    if len(affects) > 20:
        say(f"  affects {len(affects) - 20} more")

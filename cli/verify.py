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
    from adapterkit.registry.problems import Health, Problem


@click.command()
@click.argument("ref", required=False)
@click.option("--rebuild", is_flag=True, help="Make the catalog anew from log and blobs first.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(app: App, ref: str | None, rebuild: bool, as_json: bool) -> None:
    """Read everything stored and say what is damaged.

    Every blob is hashed, every line of the log checked, and the catalog compared with one made
    anew. REF: only the blobs of that version. What is wrong is named with what it affects and how
    to repair it; then the exit code is 5. Notes (what an interruption left, what nothing needs) are
    no damage.
    """
    if ref is not None and rebuild:
        raise InvalidError("--rebuild is about the whole registry, not about one version")
    found = of_version(app, Ref.parse(ref)) if ref is not None else of_all(app, rebuild)
    if as_json:
        emit(record(found))
    else:
        tell(app, found)
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


def record(found: Health) -> dict[str, Any]:
    return {
        "damaged": bool(found.damage),
        "problems": [asdict(p) | {"affects": list(p.affects)} for p in found.damage],
        "notes": [asdict(p) | {"affects": list(p.affects)} for p in found.notes],
        "n_blobs": found.n_blobs,
        "n_bytes": found.n_bytes,
        "n_records": found.n_records,
    }


def tell(app: App, found: Health) -> None:
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
    for affected in problem.affects[:20]:
        say(f"  affects {affected}")
    if len(problem.affects) > 20:
        say(f"  affects {len(problem.affects) - 20} more")
    say(f"  repair: {problem.repair}")

"""adapter du"""

from __future__ import annotations

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import count, emit, say, size, table
from adapterkit.registry.refs import Ref


@click.command()
@click.argument("pattern", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(app: App, pattern: str | None, as_json: bool) -> None:
    """Show how much room adapters take.

    SIZE is that of the files of all versions, STORED the same with equal files counted once, and
    OWN what no other name has: what goes when the name goes. PATTERN selects by name.
    """
    names, disk = app.registry.usage(pattern)
    if as_json:
        emit({
            "names": [
                {"name": u.name, "versions": u.n_versions, "size": u.size, "stored": u.stored,
                 "own": u.own}
                for u in names
            ],
            "disk": {"blobs": disk.n_blobs, "size": disk.size},
        })  # fmt: skip
        return
    largest = sorted(names, key=lambda u: (-u.own, u.name))
    rows = [
        (Ref.parse(u.name).short_name, str(u.n_versions), size(u.size), size(u.stored), size(u.own))
        for u in largest
    ]
    table(("NAME", "VERSIONS", "SIZE", "STORED", "OWN"), rows)
    say(f"{count(disk.n_blobs, 'blob')} on the disk, {size(disk.size)}")

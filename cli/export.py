"""adapter export"""

from __future__ import annotations

from pathlib import Path

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import count, say, size
from adapterkit.registry.refs import Ref


@click.command()
@click.argument("ref")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--format", "form", type=click.Choice(["native", "peft", "adapters"]), default="native",
    show_default=True, help="As it was added, or as that library reads it.",
)  # fmt: skip
@click.option("--base", metavar="BASE", help="A folder or ORG/NAME, where a format needs it.")
@pass_app
def command(app: App, ref: str, folder: Path, form: str, base: str | None) -> None:
    """Write the files of a version into a folder.

    DIR must be new or empty. Every byte is checked against its digest on the way. With --format
    peft, what another tool wrote is said in PEFT's words, with --format adapters in those of
    AdapterHub's library; where that library has nothing that is the same, it is refused with the
    reason. What is written is read back and compared before it is there.
    """
    version = app.registry.resolve(Ref.parse(ref))
    if form == "native":
        app.registry.export(version.ref, folder)
        n_files, n_bytes = version.n_files, version.size
    else:
        from adapterkit.hub.exporting import exported

        made = exported(str(version.ref), form, base, registry=app.registry)
        made.save(folder)
        n_files, n_bytes = len(made.files), sum(map(len, made.files.values()))
    say(f"{version.ref}: {count(n_files, 'file')}, {size(n_bytes)} in {folder}")

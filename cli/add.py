"""adapter add"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli import hints as hinted
from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import emit, finding_record, meant, note, say, size
from adapterkit.cli.progress import progress
from adapterkit.hub.recipes import KIND
from adapterkit.registry.errors import InvalidError
from adapterkit.registry.refs import Ref

if TYPE_CHECKING:
    from adapterkit.hub.ingest import Ingested


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("name", metavar="NAME[@VERSION]")
@click.option("--base", metavar="BASE", help="The base it was trained on: a folder or ORG/NAME.")
@click.option("--weights", is_flag=True, help="Record digests of all weights of BASE too.")
@click.option(
    "--trained-on", type=click.Choice(["nf4", "fp4", "int8", "none"]),
    help="How the base was quantized when the adapter was trained.",
)  # fmt: skip
@click.option("--tag", "tags", metavar="TAG", multiple=True, help="Tag the version. Repeatable.")
@click.option(
    "--metric", "metrics", metavar="K=V", multiple=True, help="Attach a number. Repeatable."
)
@click.option("--note", "text", metavar="TEXT", help="Attach a text.")
@click.option(
    "--include", metavar="GLOB", multiple=True,
    help="Store these files too, which are skipped otherwise. Repeatable.",
)  # fmt: skip
@click.option(
    "--allow-field", "allow_fields", metavar="NAME", multiple=True,
    help="Accept this config field although its meaning is unknown. Repeatable.",
)  # fmt: skip
@hinted.option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(
    app: App, path: Path, name: str, as_json: bool, base: str | None, weights: bool,
    trained_on: str | None, tags: tuple[str, ...], metrics: tuple[str, ...], text: str | None,
    include: tuple[str, ...], allow_fields: tuple[str, ...], hints: dict[str, Any],
) -> None:  # fmt: skip
    """Store an adapter folder as a new version of NAME.

    PATH is a folder, or the file of a recipe, which is made of versions that are here.

    Stored are the config, the weights, tokenizer files, the model card and the licence; every other
    file is skipped and listed. Without @VERSION it becomes 1.0, then 1.1 and so on. An adapter that
    is stored already is not stored again.
    """
    from adapterkit.hub import ingest
    from adapterkit.hub.locate import folder

    ref = Ref.parse(name)
    if ref.tag or ref.digest:
        raise InvalidError(f"{name} names a tag or a digest, expected NAME or NAME@VERSION")
    with progress(app, "Adding") as report:
        done = ingest.add(
            app.registry, folder(path, **hints), ref.full_name, version=ref.version, base=base,
            trained_on=trained_on, weights=weights, tags=tags, note=text,
            metrics=dict(map(metric, metrics)), include=include, allow_fields=allow_fields,
            cache=app.cache, progress=report,
        )  # fmt: skip
    if as_json:
        emit(record(done))
    else:
        tell(app, done, base)


def metric(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not name or not math.isfinite(number):
        raise InvalidError(f"{text!r} is not a metric", hint="write NAME=NUMBER, such as loss=0.71")
    return name, number


def record(done: Ingested) -> dict[str, object]:
    added = done.added
    return {
        "ref": str(added.ref),
        "id": added.id,
        "created": added.created,
        "size": added.size,
        "new_bytes": added.new_bytes,
        "adapter": done.info.record(),
        "skipped": [{"path": name, "size": n_bytes} for name, n_bytes in done.skipped],
        "warnings": [finding_record(finding) for finding in done.warnings],
    }


def tell(app: App, done: Ingested, base: str | None) -> None:
    added, info = done.added, done.info
    if added.created:
        shared = added.new_bytes < added.size
        new = f", only {size(added.new_bytes)} of it new" if shared else ""
        say(f"{added.ref}: stored {size(added.size)}{new}")
    else:
        say(f"{added.ref}: already stored, nothing new")
    say(f"  {meant(info, 'of' if info.kind == KIND else 'on')}")
    say(f"  sha256:{added.id}")
    for name, n_bytes in done.skipped:
        say(f"  skipped {name} ({size(n_bytes)})")
    for finding in done.warnings:
        note(app, "Warning", str(finding))
    if base is None and info.kind != KIND:
        name = f", only its name {info.base}" if info.base else ""
        note(app, "Hint", f"the identity of the base is not recorded{name}: give --base BASE")

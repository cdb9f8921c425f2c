"""adapter base"""

from __future__ import annotations

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import emit, fields, say, size
from adapterkit.cli.progress import progress
from adapterkit.cli.show import flat


@click.command()
@click.argument("base", metavar="BASE")
@click.option("--weights", is_flag=True, help="Read all weights, for the digests of every byte.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(app: App, base: str, weights: bool, as_json: bool) -> None:
    """Show the identity of a base model.

    BASE is a folder, or ORG/NAME for a model in the local cache of the Hugging Face Hub. Without
    --weights only headers are read, and a few values of each tensor.
    """
    from adapterkit.hub.bases.fingerprint import fingerprint, weights_size
    from adapterkit.hub.bases.folder import find_base, read_base

    found = read_base(find_base(base))
    total = weights_size(found)
    with progress(app, "Hashing", total) as report:
        identity = fingerprint(found, weights=weights, cache=app.cache, progress=report).record()
    if as_json:
        emit({"base": base, "tensors": len(found.tensors), "size": total, "identity": identity})
        return
    say(f"{base}: {len(found.tensors)} tensors, {size(total)}")
    fields(list(flat(identity, None)), "  ")

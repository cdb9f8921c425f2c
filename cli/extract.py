"""adapter extract"""

from __future__ import annotations

from typing import Any

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.convert import deliver, record, target, tell
from adapterkit.cli.output import emit


@click.command()
@click.option("--base", metavar="BASE", required=True, help="A folder or ORG/NAME.")
@click.option("--tuned", metavar="MODEL", required=True, help="The same after training.")
@click.option("--rank", type=click.IntRange(1), metavar="R", required=True, help="Of the LoRA.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32",
    show_default=True, help="Of the factors.",
)  # fmt: skip
@click.option(
    "-o", "--output", metavar="NAME[@VERSION]|DIR", required=True,
    help="Store it under NAME, or write it into the new folder ./DIR.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(
    app: App, base: str, tuned: str, rank: int, dtype: str, output: str, as_json: bool
) -> None:
    """Make a LoRA of what fine-tuning changed in a whole model.

    For each weight, the best of the rank of tuned - base; what that leaves out is printed. Norms
    and biases that changed are kept whole. Both models are read one tensor at a time.
    """
    from adapterkit.hub.mixing.extract import extract

    place = target(output)
    made = extract(base, tuned, rank, dtype=dtype)
    done: dict[str, Any] = deliver(app, made, place)
    if as_json:
        emit(done | record(made))
    else:
        tell(app, made, done)

"""--cluster: the machines that compute, the same wherever something can be sent to them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import click

from adapterkit.cli.app import App
from adapterkit.registry.errors import InvalidError

if TYPE_CHECKING:
    from concurrent.futures import Executor

cluster_option = click.option(
    "--cluster", metavar="tcp://HOST:PORT", help="Let the workers of a Dask cluster compute."
)


def executor(app: App, address: str | None) -> AbstractContextManager[Executor | None]:
    """None for this process."""
    if address is None:
        return nullcontext()
    if app.offline:
        raise InvalidError(f"{address} is reached through the network", hint="without --offline")
    from adapterkit.hub.cluster import cluster

    return cluster(address)

"""Machines of a Dask cluster, as an executor."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor
from contextlib import contextmanager
from typing import Any

from adapterkit.hub.findings import clean
from adapterkit.registry.errors import AdapterError, InvalidError, RemoteError, UnreachableError

WAIT = 60


@contextmanager
def cluster(address: str) -> Iterator[Executor]:
    """The cluster whose scheduler listens there: `tcp://host:8786`. A task of a worker that dies is
    done by another one.

    Raises UnreachableError if nothing answers, RemoteError if the cluster gives up.
    """
    try:
        import dask
        from distributed import Client, KilledWorker
    except ImportError as error:
        raise AdapterError(
            "a cluster needs dask.distributed, which is not installed",
            hint="pip install 'adapterkit[cluster]'",
        ) from error
    if "://" not in address:
        raise InvalidError(f"{clean(address)} is no address", hint=f"tcp://{address}")
    # Inputs are sent on purpose: Dask need not warn of their size.
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TiB"}):
        try:
            client = Client(address)  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:  # no such host; a timeout; an unknown protocol
            raise UnreachableError(f"no cluster answers at {clean(address)}: {error}") from error
        try:
            with client:
                _require_workers(client, address)
                yield client.get_executor(pure=False)  # type: ignore[no-untyped-call]
        except KilledWorker as error:
            raise RemoteError(f"every worker that took a task died: {error}") from error
        except CancelledError as error:
            raise RemoteError(f"the cluster at {clean(address)} went away") from error


def _require_workers(client: Any, address: str) -> None:
    """Tasks would wait for them without end."""
    try:
        client.wait_for_workers(1, timeout=WAIT)
    except TimeoutError as error:
        raise UnreachableError(
            f"the cluster at {clean(address)} has no workers after {WAIT} seconds"
        ) from error

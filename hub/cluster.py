"""Machines of a Dask cluster, as an executor."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from adapterkit.hub.findings import clean
from adapterkit.hub.workers import AHEAD
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
                with Machines(client) as machines:
                    yield machines
        except KilledWorker as error:
            raise RemoteError(f"every worker that took a task died: {error}") from error
        except CancelledError as error:
            raise RemoteError(f"the cluster at {clean(address)} went away") from error


class Machines(Executor):
    """Dask's own executor looks at the state of a task after it has its result: when the worker
    that held it dies in between, the result is lost, and a TypeError is all that is said."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._waiting = ThreadPoolExecutor(AHEAD)

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        """For tasks that may be done twice: one whose worker is gone is done by another."""
        asked = self._client.submit(function, *arguments, pure=False, **named)
        return self._waiting.submit(asked.result)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._waiting.shutdown(wait=False, cancel_futures=True)


def _require_workers(client: Any, address: str) -> None:
    """Tasks would wait for them without end."""
    try:
        client.wait_for_workers(1, timeout=WAIT)
    except TimeoutError as error:
        raise UnreachableError(
            f"the cluster at {clean(address)} has no workers after {WAIT} seconds"
        ) from error
    try:  # a worker that cannot read a task drops out, and its tasks wait for others
        client.run(import_module, "adapterkit.hub.parcels")
    except ImportError as error:
        raise RemoteError(
            f"a worker of the cluster at {clean(address)} has no adapterkit: {error}"
        ) from error

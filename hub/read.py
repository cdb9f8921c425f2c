"""From a folder to an adapter that knows everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.formats import read_folder
from adapterkit.hub.kinds import kind
from adapterkit.hub.sources import Folder


def read_adapter(folder: Folder, allow_fields: Collection[str] = ()) -> Adapter:
    """The adapter in `folder`; its `findings` hold what is incomplete or odd.

    Raises DamagedError when a file cannot be read at all, NotFoundError when a file is missing or
    the adapter is of a type or format that is not supported.
    """
    adapter = read_folder(folder, allow_fields)
    problems = kind(adapter.kind).problems(adapter)
    return replace(adapter, findings=(*adapter.findings, *problems))

"""What a live model's weights were before a merge: kept in memory, on disk, or read again from the
files that the model came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit.hub.bases.base import Base
from adapterkit.hub.findings import clean
from adapterkit.hub.merge.live import Target, source_of
from adapterkit.registry.errors import AdapterError, ConflictError, InvalidError

SOURCE, MEMORY, DISK = CHOICES = ("source", "memory", "disk")


class Undo(Protocol):
    """Every target's tensors, as they were when it was made."""

    def restored(self) -> Iterator[tuple[Target, Mapping[str, Tensor]]]: ...


class InMemory:
    def __init__(self, targets: list[Target]) -> None:
        self._kept = [(t, {n: held.clone() for n, held in t.tensors().items()}) for t in targets]

    def restored(self) -> Iterator[tuple[Target, Mapping[str, Tensor]]]:
        yield from self._kept


class OnDisk:
    """In a temporary folder that goes with this object."""

    def __init__(self, targets: list[Target]) -> None:
        self._folder = TemporaryDirectory(prefix="adapterkit-undo-")
        self._targets = targets
        for i, target in enumerate(targets):
            held = {name: t.detach().cpu().contiguous() for name, t in target.tensors().items()}
            save_file(held, self._path(i))

    def _path(self, number: int) -> Path:
        return Path(self._folder.name) / f"{number}.safetensors"

    def restored(self) -> Iterator[tuple[Target, Mapping[str, Tensor]]]:
        for i, target in enumerate(self._targets):
            yield target, load_file(self._path(i))
        self._folder.cleanup()


class FromSource:
    """Nothing is kept but digests. Raises ConflictError if the files hold other weights than the
    model has."""

    def __init__(self, targets: list[Target], base: Base) -> None:
        self._base = base
        self._digests = [(target, digest(target.tensors())) for target in targets]
        for _ in self.restored():
            pass

    def restored(self) -> Iterator[tuple[Target, Mapping[str, Tensor]]]:
        for target, wanted in self._digests:
            found = target.from_source(self._base)
            if found is None or digest(found) != wanted:
                raise ConflictError(
                    f"{clean(target.name)} in {clean(self._base.name)} is not what the model has",
                    hint="merge with undo='memory' or undo='disk'",
                )
            yield target, found


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names and bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(name.encode())
        found.update(memoryview(flat.numpy()))  # type: ignore[arg-type]
    return found.hexdigest()


def made(how: str | None, targets: list[Target], folder: str) -> Undo | None:
    """how: None for no way back; "auto" for the source where that is one, else memory."""
    if how not in (None, "auto", *CHOICES):
        raise InvalidError(f"undo is {how!r}, expected one of {', '.join(CHOICES)}, or None")
    if how is None:
        return None
    if how in (SOURCE, "auto"):
        try:
            return FromSource(targets, source_of(folder))
        except AdapterError:
            if how == SOURCE:
                raise
    return OnDisk(targets) if how == DISK else InMemory(targets)

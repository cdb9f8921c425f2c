"""What every format needs to know its folders and to find the weights in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapterkit.hub.findings import WARNING, Finding, clean
from adapterkit.hub.formats.config import ConfigReader
from adapterkit.hub.headers import Header, Stored, read_header
from adapterkit.hub.sources import Folder, read_object
from adapterkit.hub.torchfile import TorchFile, read_torch
from adapterkit.registry.errors import DamagedError, NotFoundError

CONFIG = "adapter_config.json"
SAFE = ".safetensors"
SUFFIXES = (SAFE, ".bin", ".pt", ".pth", ".ckpt")
# What trainers leave beside a checkpoint under the same suffixes.
OTHER_STATE = ("training_args", "optimizer", "scheduler", "rng_state", "scaler", "random_states")

# Scores of a claim: a mark of this format alone; names that point to it; nothing against it.
CERTAIN, LIKELY, POSSIBLE = 3, 2, 1


@dataclass(frozen=True)
class Claim:
    """A format says that a folder is one of its own. evidence: why, in words."""

    score: int
    evidence: str


@dataclass(frozen=True)
class Weights:
    """path: of the file that was read. values: what a torch file holds beside its tensors."""

    path: str
    header: Header
    findings: list[Finding] = field(default_factory=list)

    @property
    def values(self) -> Mapping[str, Any]:
        return self.header.values if isinstance(self.header, TorchFile) else {}


def weights_of(folder: Folder, names: Sequence[str]) -> Weights:
    """The tensors of the one weights file among `names`; of two, the safetensors file is read.

    Raises NotFoundError if there is none, DamagedError for several, an empty one and one that holds
    anything but tensors and plain values."""
    found = [name for name in names if name in folder.files]
    if not found:
        raise NotFoundError(f"{clean(folder.name)} has no weights: {names[0]} is missing")
    safe = [name for name in found if name.endswith(SAFE)]
    chosen, *others = safe or found
    if len(safe or found) > 1:
        shown = ", ".join(map(clean, found[:10]))
        raise DamagedError(f"{clean(folder.name)} has several files of weights: {shown}")
    findings = [
        Finding(WARNING, "two-weight-files", name, f"only {chosen}", "both; safetensors is read")
        for name in found
        if name != chosen
    ]
    header = read_weights(folder, chosen)
    if not header.tensors:
        raise DamagedError(f"{clean(folder.name)}/{clean(chosen)} is empty: it holds no tensor")
    return Weights(chosen, header, findings)


def read_weights(folder: Folder, name: str) -> Header:
    """The header of a weights file: of safetensors by its name, else of torch.save."""
    source = folder.files[name]
    return read_header(source) if name.endswith(SAFE) else read_torch(source)


def bare_weights(folder: Folder) -> Weights | None:
    """The only weights file at the top of a folder whose format has no file names of its own;
    None if there is none, or more than one that is not a copy in another suffix."""
    names = [
        name
        for name in folder.files
        if "/" not in name and name.endswith(SUFFIXES) and not name.startswith(OTHER_STATE)
    ]
    stems = {name.rpartition(".")[0] for name in names}
    return weights_of(folder, names) if len(stems) == 1 else None


def required_weights(folder: Folder) -> Weights:
    """The same. Raises NotFoundError where there is no such file, or several."""
    weights = bare_weights(folder)
    if weights is None:
        raise NotFoundError(f"{clean(folder.name)} has no single file of weights")
    return weights


def read_config(folder: Folder, name: str) -> ConfigReader:
    """The JSON object of that name. Raises NotFoundError, DamagedError."""
    if name not in folder.files:
        raise NotFoundError(f"{clean(folder.name)} has no {name}")
    config = read_object(folder.files[name], f"{clean(folder.name)}/{name}")
    return ConfigReader(config, f"{folder.name}/{name}")


def without_root(tensors: Mapping[str, Stored], *roots: str) -> dict[str, Stored]:
    """The tensors, their keys without the first of the roots that all of them start with."""
    root = next((r for r in roots if all(key.startswith(r) for key in tensors)), "")
    return {key.removeprefix(root): stored for key, stored in tensors.items()}


def rest_of_file(weights: Weights) -> list[Finding]:
    """What a torch file holds beside its tensors, for formats that make nothing of it."""
    return [
        Finding(WARNING, "unknown-value", path, "tensors alone", clean(repr(value), 80))
        for path, value in weights.values.items()
    ]

"""Adapters made wrong on purpose: copies of a fixture with another config or other tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.folder import read_base
from adapterkit.hub.sources import ByteSource, Folder

# key -> (dtype, shape, bytes)
Tensors = dict[str, tuple[str, list[int], bytes]]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def read_tensors(path: Path) -> Tensors:
    data = path.read_bytes()
    stop = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:stop])
    header.pop("__metadata__", None)
    return {
        key: (e["dtype"], e["shape"], data[stop + start : stop + end])
        for key, e in header.items()
        for start, end in [e["data_offsets"]]
    }


def write_tensors(path: Path, tensors: Mapping[str, tuple[str, list[int], bytes]]) -> None:
    header, body = {}, b""
    for key, (dtype, shape, data) in tensors.items():
        offsets = [len(body), len(body) + len(data)]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


Edit = Callable[[Tensors], Tensors | None]
Make = Callable[..., Path]


@pytest.fixture
def make(fixtures: Path, tmp_path: Path) -> Make:
    """`make(case, edit, r=4)`: a copy of a case's adapter, its tensors edited, its config changed;
    `make("adapters/name", ...)` of a shared one.

    A value of ... removes a field of the config.
    """

    def copy(case: str = "llama.lora_qv", edit: Edit | None = None, **config: Any) -> Path:
        folder = tmp_path / f"adapter{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        start = fixtures / (case if "/" in case else f"cases/{case}/adapter")
        for source in start.iterdir():
            shutil.copyfile(source, folder / source.name)  # not copy(): it may be read-only
        known = json.loads((folder / CONFIG).read_text()) | config
        kept = {name: value for name, value in known.items() if value is not ...}
        (folder / CONFIG).write_text(json.dumps(kept))
        if edit is not None:
            tensors = read_tensors(folder / WEIGHTS)
            write_tensors(folder / WEIGHTS, edit(tensors) or tensors)
        return folder

    return copy


@pytest.fixture(scope="session")
def base_of(fixtures: Path) -> Callable[[str], Base]:
    """A base of the fixtures by its name."""
    return lambda name: read_base(fixtures / "bases" / name)


@pytest.fixture(scope="session")
def llama(base_of: Callable[[str], Base]) -> Base:
    return base_of("llama")


@dataclass
class Counting:
    """A source that notes what is read of it: (name, start, size)."""

    inner: ByteSource
    reads: list[tuple[str, int, int]]
    name: str = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.name, self.size = self.inner.name, self.inner.size

    def read(self, start: int, size: int) -> bytes:
        self.reads.append((self.name, start, size))
        return self.inner.read(start, size)


@pytest.fixture
def counted() -> Callable[[Folder], tuple[Folder, list[tuple[str, int, int]]]]:
    """The same folder, and the list that its reads are noted in."""

    def count(folder: Folder) -> tuple[Folder, list[tuple[str, int, int]]]:
        reads: list[tuple[str, int, int]] = []
        files = {path: Counting(source, reads) for path, source in folder.files.items()}
        return Folder(folder.name, files, folder.root, folder.manifest, folder.sketch), reads

    return count

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.folder import read_base


@pytest.fixture(scope="session")
def base_of(fixtures: Path) -> Callable[[str], Base]:
    """A base of the fixtures by its name."""
    return lambda name: read_base(fixtures / "bases" / name)


@pytest.fixture
def copied(fixtures: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the fixtures' bases, to be changed."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(fixtures / "bases" / name, tmp_path / name))

    return copy


@pytest.fixture
def write() -> Callable[..., Path]:
    """Write a safetensors file of zeros, without a library that would refuse odd ones."""

    def write_file(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> Path:
        header, body = {}, b""
        for name, (dtype, shape, data) in tensors.items():
            offsets = [len(body), len(body) + len(data)]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            body += data
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + body)
        return path

    return write_file

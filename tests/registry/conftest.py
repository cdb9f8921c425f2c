from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import pytest

from adapterkit.registry import Added, Meaning, Registry


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def shm() -> Iterator[Path]:
    """A folder in memory, where there is such: a kill is survived by what was written, synced or
    not, so a disk would only take its time."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    with TemporaryDirectory(dir=place) as folder:
        yield Path(folder)


@pytest.fixture
def registry(home: Path) -> Iterator[Registry]:
    with Registry(home) as made:
        yield made


@pytest.fixture
def add(registry: Registry) -> Callable[..., Added]:
    """add(content, name, ...): a version of one file."""

    def make(content: bytes = b"weights", name: str = "sql", **options: object) -> Added:
        meaning = options.pop("meaning", None) or Meaning({"kind": "LORA", "rank": 8})
        return registry.add(name, {"w.bin": content}, meaning, **options)

    return make


@pytest.fixture(scope="session")
def faults() -> ModuleType:
    """tests/faults.py, which is no test and in no package."""
    spec = spec_from_file_location("faults", Path(__file__).parents[1] / "faults.py")
    found = module_from_spec(spec)
    spec.loader.exec_module(found)
    return found

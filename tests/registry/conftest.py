from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterkit.registry import Added, Meaning, Registry


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


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

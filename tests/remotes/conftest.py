from __future__ import annotations

from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from adapterkit.hub.remotes import connect
from adapterkit.hub.remotes.base import Remote
from adapterkit.registry import Meaning, Registry

SKETCH = b"sketch of the base"


@pytest.fixture(scope="session")
def faults() -> ModuleType:
    """tests/faults.py, which is no test and in no package."""
    spec = spec_from_file_location("faults", Path(__file__).parents[1] / "faults.py")
    found = module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Registry]:
    """A registry with team/sql 1.0 (tags best, old) and 1.1 (tag new)."""
    with Registry(tmp_path / "here") as made:
        fill(made)
        yield made


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Registry]:
    """An empty registry, as on another machine."""
    with Registry(tmp_path / "there") as made:
        yield made


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    return connect(f"file://{tmp_path}/remote")


def fill(registry: Registry) -> None:
    import hashlib

    sketch = {"digest": f"sha256:{hashlib.sha256(SKETCH).hexdigest()}", "size": len(SKETCH)}
    meaning = Meaning({"kind": "LORA", "rank": 8}, base={"sketch": sketch}, extra=(SKETCH,))
    files = {"w.bin": b"weights" * 1000, "config.json": b"{}"}
    registry.add(
        "team/sql", files, meaning, tags=["best", "old"], attachments={"metrics": b'{"loss":1}'}
    )
    registry.add("team/sql", files | {"w.bin": b"other"}, Meaning({"kind": "LORA"}), tags=["new"])

"""A 70B-shaped base is described without reading its weights."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from adapterkit.hub.bases.fingerprint import fingerprint, weights_size
from adapterkit.hub.bases.folder import read_base
from adapterkit.hub.bases.likeness import EXACT, compare_sketch
from adapterkit.hub.headers import Stored
from adapterkit.hub.sources import FileSource

BENCH = Path(__file__).parents[2] / "bench" / "shapes.py"


@pytest.fixture(scope="module")
def shapes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_shapes", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_70b_base_is_known_from_a_few_kilobytes(
    shapes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shapes.make_base(tmp_path / "base")
    sizes: list[int] = []
    read = FileSource.read

    def counted(self: FileSource, start: int, size: int) -> bytes:
        sizes.append(size)
        return read(self, start, size)

    monkeypatch.setattr(FileSource, "read", counted)
    base = read_base(folder)
    assert weights_size(base) > 130e9
    assert len(base.weight_files) == 30
    assert len(base.modules) == len(base.tensors) == 80 * 9 + 3
    blob = fingerprint(base).sketch_data
    assert blob is not None
    assert compare_sketch(blob, base).verdict == EXACT
    assert sum(sizes) < 1_000_000


def test_one_file_of_any_shape(shapes: ModuleType, tmp_path: Path) -> None:
    sizes = {"layers": 3, "hidden": 32, "intermediate": 48, "heads": 4, "kv_heads": 2}
    folder = shapes.make_base(tmp_path / "base", **sizes, vocab=100, shards=1, dtype="F32")
    base = read_base(folder)
    row = base.modules["model.layers.2.self_attn.k_proj"]
    assert row.shape == (16, 32)
    stored = base.tensors[row.weight[0]]
    assert isinstance(stored, Stored)
    assert stored.dtype == "F32"
    assert not any(stored.read())

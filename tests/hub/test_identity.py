"""Is this the base the adapter was trained on?  What was recorded, held against many bases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterkit.hub import check, exit_code, ingest
from adapterkit.hub.bases.base import Base
from adapterkit.hub.findings import FITS, IDENTICAL, OTHER_WEIGHTS, QUANTIZED_DIFFERENTLY, SAME_CAST
from adapterkit.registry import Registry

Make = Callable[..., Path]
Bases = Callable[[str], Base]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "home") as opened:
        yield opened


@pytest.fixture
def changed(fixtures: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the base `llama` with its weights changed."""

    def copy(change: Callable[[dict[str, torch.Tensor]], None], **config: object) -> Path:
        folder = tmp_path / f"base{len(list(tmp_path.iterdir()))}" / "llama"
        folder.mkdir(parents=True)
        for source in (fixtures / "bases" / "llama").iterdir():
            shutil.copyfile(source, folder / source.name)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        known = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(known))
        return folder

    return copy


def cast(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    return change


@pytest.mark.parametrize(
    ("base", "deep", "verdict", "level"),
    [
        ("llama", False, SAME_CAST, "sketch"),
        ("llama", True, IDENTICAL, "touched"),
        ("llama_sharded", False, SAME_CAST, "sketch"),
        ("llama_sharded", True, IDENTICAL, "touched"),
        ("llama_nf4_double", False, SAME_CAST, "sketch"),
        ("llama_nf4_double", True, SAME_CAST, "sketch"),
        ("llama_int8", False, SAME_CAST, "sketch"),
        ("llama_int8", True, SAME_CAST, "sketch"),
        ("llama_reseed", False, OTHER_WEIGHTS, "sketch"),
        ("llama_reseed", True, OTHER_WEIGHTS, "sketch"),
    ],
)
def test_a_recorded_base_is_recognised_and_another_is_not(
    registry: Registry, make: Make, fixtures: Path, base: str, deep: bool, verdict: str, level: str
) -> None:
    ingest.add(registry, make(), "sql", base=fixtures / "bases" / "llama", weights=True)
    report = check("sql", base=fixtures / "bases" / base, deep=deep, registry=registry)
    assert (report.verdict, report.level) == (verdict, level)
    assert exit_code(report, strict=True) == (6 if verdict == OTHER_WEIGHTS else 0)


def test_other_weights_are_named_with_values_and_place(
    registry: Registry, make: Make, fixtures: Path
) -> None:
    ingest.add(registry, make(), "sql", base=fixtures / "bases" / "llama")
    report = check("sql", base=fixtures / "bases" / "llama_reseed", registry=registry)
    assert report.verdict == OTHER_WEIGHTS
    assert {f.tensor for f in report.errors} == {
        f"model.layers.{i}.self_attn.{name}.weight" for i in (0, 1) for name in ("q_proj", "v_proj")
    }
    assert all(" at " in f.expected and float(f.found) for f in report.errors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("deep", [False, True])
def test_a_cast_is_the_same_base_in_both_directions(
    registry: Registry, make: Make, changed: Callable[..., Path], fixtures: Path,
    dtype: torch.dtype, deep: bool,
) -> None:  # fmt: skip
    full, small = fixtures / "bases" / "llama", changed(cast(dtype))
    for recorded, other in ((full, small), (small, full)):
        name = f"sql{recorded == full}"
        ingest.add(registry, make(), name, base=recorded, weights=True)
        report = check(name, base=other, deep=deep, registry=registry)
        assert (report.verdict, report.level) == (SAME_CAST, "sketch")


@pytest.mark.parametrize("recorded", ["llama_nf4_double", "llama_int8"])
def test_a_base_recorded_quantized_is_known_again(
    registry: Registry, make: Make, fixtures: Path, recorded: str
) -> None:
    ingest.add(registry, make(), "sql", base=fixtures / "bases" / recorded, weights=True)
    same = check("sql", base=fixtures / "bases" / recorded, deep=True, registry=registry)
    assert (same.verdict, same.level) == (IDENTICAL, "touched")
    dense = check("sql", base=fixtures / "bases" / "llama", registry=registry)
    assert (dense.verdict, dense.level) == (SAME_CAST, "sketch")
    other = check("sql", base=fixtures / "bases" / "llama_reseed", registry=registry)
    assert other.verdict == OTHER_WEIGHTS
    method = "int8" if recorded == "llama_int8" else "nf4"
    wrong = "nf4" if method == "int8" else "int8"
    kept = check(
        "sql", base=fixtures / "bases" / "llama", quantization=method, registry=registry
    )
    assert kept.verdict == SAME_CAST
    differs = check(
        "sql", base=fixtures / "bases" / "llama", quantization=wrong, registry=registry
    )
    assert differs.verdict == QUANTIZED_DIFFERENTLY
    assert (exit_code(differs), exit_code(differs, strict=True)) == (0, 6)


def test_one_changed_value_that_no_sketch_holds_is_found_deep(
    registry: Registry, make: Make, changed: Callable[..., Path], fixtures: Path
) -> None:
    from adapterkit.hub.bases.sketch import runs

    name = "model.layers.0.self_attn.q_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        places = runs(name, tuple(tensors[name].shape))
        held = {i for first, n in places for i in range(first, first + n)}
        place = next(i for i in range(tensors[name].numel()) if i not in held)
        tensors[name].view(-1)[place] += 1

    ingest.add(registry, make(), "sql", base=fixtures / "bases" / "llama", weights=True)
    base = changed(change)
    assert check("sql", base=base, registry=registry).verdict == SAME_CAST
    deep = check("sql", base=base, deep=True, registry=registry)
    assert (deep.verdict, deep.level) == (OTHER_WEIGHTS, "touched")


def test_a_change_the_adapter_does_not_touch_is_not_its_matter(
    registry: Registry, make: Make, changed: Callable[..., Path], fixtures: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] += 1

    ingest.add(registry, make(), "sql", base=fixtures / "bases" / "llama", weights=True)
    report = check("sql", base=changed(change), deep=True, registry=registry)
    assert (report.verdict, report.level) == (IDENTICAL, "touched")


def test_without_digests_of_weights_deep_stays_at_the_sketch(
    registry: Registry, make: Make, fixtures: Path
) -> None:
    ingest.add(registry, make(), "sql", base=fixtures / "bases" / "llama")
    report = check("sql", base=fixtures / "bases" / "llama", deep=True, registry=registry)
    assert (report.verdict, report.level) == (SAME_CAST, "sketch")


def test_what_differs_beside_the_weights_is_a_doubt(
    registry: Registry, make: Make, changed: Callable[..., Path], fixtures: Path
) -> None:
    base = changed(lambda tensors: None)
    (base / "tokenizer.json").write_text("{}")
    ingest.add(registry, make(), "sql", base=fixtures / "bases" / "llama")
    report = check("sql", base=base, registry=registry)
    assert report.verdict == SAME_CAST
    assert [f.code for f in report.warnings] == ["tokenizer-differs"]


def test_a_version_without_a_base_fits_with_a_doubt(
    registry: Registry, make: Make, fixtures: Path
) -> None:
    ingest.add(registry, make(), "sql")
    report = check("sql", base=fixtures / "bases" / "llama", registry=registry)
    assert (report.verdict, report.level) == (FITS, "none")
    assert [f.code for f in report.warnings] == ["base-not-recorded"]
    assert exit_code(report, strict=True) == 6


def test_the_same_shapes_and_other_weights_are_always_told_apart(
    registry: Registry, make: Make, fixtures: Path
) -> None:
    """Whatever else was recorded, from any format of the one to the other."""
    for recorded in ("llama", "llama_sharded", "llama_nf4_double", "llama_int8"):
        name = recorded.replace("_", "-")
        ingest.add(registry, make(), name, base=fixtures / "bases" / recorded)
        report = check(name, base=fixtures / "bases" / "llama_reseed", registry=registry)
        assert report.verdict == OTHER_WEIGHTS and exit_code(report) == 6

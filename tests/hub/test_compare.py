"""Comparing adapters from their factors, against the dense changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit.hub import compare
from adapterkit.registry.errors import ConflictError, InvalidError


def dense(folder: Path, scale: float) -> dict[str, Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): scale
        * tensors[key.replace("lora_A", "lora_B")].double()
        @ tensors[key].double()
        for key in tensors
        if key.endswith("lora_A.weight")
    }


def test_all_measures_are_those_of_the_dense_changes(fixtures: Path) -> None:
    paths = [fixtures / f"adapters/llama_{name}" for name in ("A", "B")]
    (pair,) = compare(paths).pairs
    left, right = dense(paths[0], 2.0), dense(paths[1], 2.0)
    assert {row.module for row in pair.modules} == left.keys() & right.keys()
    for row in pair.modules:
        x, y = left[row.module], right[row.module]
        cosine = float((x * y).sum() / x.norm() / y.norm())
        assert row.cosine == pytest.approx(cosine, abs=1e-9)
        signs = float((x * y < 0).double().mean())
        assert row.conflict == pytest.approx(signs, abs=1e-9)  # all rows are in the sample
        out_x, out_y = (torch.linalg.svd(each)[0][:, :8] for each in (x, y))
        angles = torch.linalg.svdvals(out_x.T @ out_y)
        assert row.outputs == pytest.approx(float(angles.square().mean()), abs=1e-9)
    whole = [torch.cat([each.flatten() for each in side.values()]) for side in (left, right)]
    cosine = float(whole[0] @ whole[1] / whole[0].norm() / whole[1].norm())
    assert pair.total.cosine == pytest.approx(cosine, abs=1e-9)


def scaled(source: Path, target: Path, by: float, part: str = "lora_B") -> Path:
    target.mkdir()
    (target / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    tensors = {k: by * v if part in k else v for k, v in tensors.items()}
    save_file(tensors, target / "adapter_model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("by", [1.5, -1.0])
def test_an_adapter_and_its_multiple_lie_in_one_line(
    fixtures: Path, tmp_path: Path, by: float
) -> None:
    source = fixtures / "adapters/llama_A"
    (pair,) = compare([source, scaled(source, tmp_path / "b", by)]).pairs
    for row in (pair.total, *pair.modules):
        assert row.cosine == pytest.approx(1 if by > 0 else -1)
        assert (row.outputs, row.inputs) == (pytest.approx(1), pytest.approx(1))
        assert row.interference == pytest.approx(1)
        assert row.conflict == (0 if by > 0 else 1)


def test_a_change_that_is_nothing_has_no_likeness(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "adapters/llama_A"
    (pair,) = compare([source, scaled(source, tmp_path / "b", 0.0)]).pairs
    assert pair.total.b == 0 and pair.total.cosine is None and pair.total.interference is None


def test_every_pair_is_compared_in_the_order_given(fixtures: Path) -> None:
    paths = [fixtures / f"adapters/llama_{name}" for name in ("D", "A", "R")]
    found = compare(paths)
    assert [(pair.a, pair.b) for pair in found.pairs] == [
        (str(a), str(b)) for a, b in (paths[:2], paths[::2], paths[1:])
    ]


def test_what_cannot_be_compared_says_why(fixtures: Path) -> None:
    a = fixtures / "adapters/llama_A"
    cases: list[tuple[list[Path], type[Exception], str]] = [
        ([a], InvalidError, "two adapters"),
        ([a, a], ConflictError, "listed twice"),
        ([a, fixtures / "adapters/llama_prefix1"], InvalidError, "no change of a weight"),
        ([a, fixtures / "adapters/llama_dora"], InvalidError, "without the weights"),
    ]
    for paths, kind, words in cases:
        with pytest.raises(kind, match=words):
            compare(paths)


def test_the_command_shows_one_pair_by_module_and_many_in_all(
    fixtures: Path, tmp_path: Path
) -> None:
    import json

    from click.testing import CliRunner

    from adapterkit.cli.main import main

    def run(*arguments: Any, code: int = 0) -> str:
        done = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
        assert done.exit_code == code, done.output
        return str(done.stdout)

    paths = [fixtures / f"adapters/llama_{name}" for name in ("A", "B", "R")]
    one = run("compare", *paths[:2])
    assert "model.layers.1.self_attn.v_proj" in one and "INTERFERENCE" in one
    assert len(run("compare", *paths).splitlines()) == 4
    assert len(json.loads(run("compare", *paths, "--json"))["pairs"]) == 3
    picture = tmp_path / "map.png"
    run("compare", *paths, "--png", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    run("compare", *paths, "--png", picture, code=4)
    run("compare", paths[0], code=2)

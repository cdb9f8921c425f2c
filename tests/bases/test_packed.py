"""Quantized checkpoints: decoded as bitsandbytes decodes them, refused when they lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.folder import open_base, read_base
from adapterkit.hub.bases.values import (
    CODES,
    block_values,
    half_unit,
    narrowest,
    read_values,
    rounded,
)
from adapterkit.hub.bases.weights import read_weights
from adapterkit.registry.errors import DamagedError, MismatchError

WEIGHT = "model.layers.0.mlp.down_proj.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


def values_of(base: Base, name: str, start: int, count: int) -> list[float]:
    found = read_values(base, name, start, count)
    assert found is not None
    assert all(a <= n <= b for a, n, b in zip(found.low, found.numbers, found.high, strict=True))
    return list(found.numbers)


@pytest.mark.parametrize("start", [0, 64, 8192 - 64, 13, 100])
def test_nested_four_bit_weights_are_decoded_as_by_bitsandbytes(
    start: int, base_of: Callable[[str], Base], fixtures: Path
) -> None:
    tensors = load_file(fixtures / "bases" / "llama_nf4_double" / "model.safetensors")
    parts = {k.removeprefix(f"{WEIGHT}."): v for k, v in tensors.items() if WEIGHT in k}
    packed = parts.pop(WEIGHT)
    state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
    whole = bnb.dequantize_4bit(packed, state).flatten()
    found = values_of(base_of("llama_nf4_double"), WEIGHT, start, 64)
    expected = whole[start : start + 64]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-6, atol=1e-7)


def test_int8_weights_are_codes_times_the_scale_of_their_row(
    base_of: Callable[[str], Base], fixtures: Path
) -> None:
    tensors = load_file(fixtures / "bases" / "llama_int8" / "model.safetensors")
    scales = tensors[WEIGHT.replace("weight", "SCB")]
    whole = (tensors[WEIGHT].float() * scales[:, None] / 127).flatten()
    found = values_of(base_of("llama_int8"), WEIGHT, 100, 300)
    torch.testing.assert_close(torch.tensor(found), whole[100:400])


@pytest.mark.parametrize("method", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_quantized_lies_in_the_intervals(
    method: str, double: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Blocks of every magnitude, so that the quantized scales are really off."""
    torch.manual_seed(0)
    dense = torch.randn(64, 512) * torch.logspace(-4, 1, 512)[None, :].roll(7, 1)
    packed, state = bnb.quantize_4bit(
        dense.to(dtype), blocksize=64, quant_type=method, compress_statistics=double
    )
    parts = {f"w.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    save_file({"w.weight": packed, **parts}, tmp_path / "model.safetensors")
    base = _loose(tmp_path)
    found = read_values(base, "w.weight", 0, dense.numel())
    assert found is not None
    inside = [a <= x <= b for a, x, b in zip(found.low, dense.flatten().tolist(), found.high,
                                             strict=True)]  # fmt: skip
    assert all(inside)
    shuffled = dense.flatten()[torch.randperm(dense.numel())].tolist()
    wrong = [a <= x <= b for a, x, b in zip(found.low, shuffled, found.high, strict=True)]
    assert sum(wrong) < 0.5 * len(wrong)


def _loose(folder: Path) -> Base:
    """Weights of no model."""
    tensors, files = read_weights(open_base(folder))
    return Base(str(folder), {}, {}, tensors, weight_files=files)


@pytest.mark.parametrize("method", CODES)
def test_the_code_tables_are_those_of_bitsandbytes(method: str) -> None:
    table = bnb.get_4bit_type(method, device="cpu")
    assert sorted({round(x, 6) + 0.0 for x in table.tolist()}) == pytest.approx(
        sorted(CODES[method]), abs=1e-6
    )


def test_a_block_in_memory_needs_no_scale() -> None:
    """Whole blocks hold their own absmax, so a live model can be compared by its values alone."""
    torch.manual_seed(1)
    dense = torch.randn(128)
    packed, state = bnb.quantize_4bit(dense, blocksize=64, quant_type="nf4")
    live = bnb.dequantize_4bit(packed, state).flatten().tolist()
    found = block_values("nf4", live)
    assert all(a <= x <= b for a, x, b in zip(found.low, dense.tolist(), found.high, strict=True))


def _lie(folder: Path, **changes: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    fields = json.loads(bytes(tensors[STATE].tolist())) | changes
    tensors[STATE] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [64, 256]}, {"shape": [64, -128]}, {"shape": []}, {"shape": "big"},
        {"shape": [1 << 40, 1 << 40]}, {"shape": [True]}, {"blocksize": 0}, {"blocksize": 32},
        {"blocksize": None}, {"quant_type": "fp4"}, {"nested_blocksize": 0},
        {"nested_blocksize": 16}, {"nested_offset": "x"}, {"nested_offset": float("nan")},
    ],
)  # fmt: skip
def test_a_quant_state_that_lies_is_damage(
    changes: dict[str, Any], copied: Callable[[str], Path]
) -> None:
    folder = copied("llama_nf4_double")
    _lie(folder, **changes)
    with pytest.raises(DamagedError, match=r"down_proj.*model\.safetensors"):
        read_base(folder)


def test_a_quant_state_that_is_no_json_is_damage(copied: Callable[[str], Path]) -> None:
    folder = copied("llama_nf4_double")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[STATE] = torch.tensor([91, 93], dtype=torch.uint8)
    save_file(tensors, path)
    with pytest.raises(DamagedError, match=r"quant_state.*model\.safetensors.* holds an array"):
        read_base(folder)


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_a_missing_constant_is_damage(part: str, copied: Callable[[str], Path]) -> None:
    folder = copied("llama_nf4_double")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"{WEIGHT}.{part}"]
    save_file(tensors, path)
    with pytest.raises(DamagedError, match=f"{part} is nothing"):
        read_base(folder)


def test_config_and_tensors_must_agree_on_the_quantization(copied: Callable[[str], Path]) -> None:
    folder = copied("llama_int8")
    config = json.loads((folder / "config.json").read_text())
    said = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DamagedError, match="none, the tensors are int8"):
        read_base(folder)
    other = config | {"quantization_config": said | {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(other))
    with pytest.raises(MismatchError, match="gptq"):
        read_base(folder)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(FLOATS)
def test_rounding_and_its_error_are_torchs(number: float) -> None:
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        cast = torch.tensor(number).to(dtype).item()
        if abs(cast) != float("inf"):
            assert rounded(number, name) == cast
            assert abs(number - cast) <= half_unit(number, name)


@given(st.lists(FLOATS, min_size=1, max_size=5))
def test_the_narrowest_format_holds_every_number(numbers: list[float]) -> None:
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    tensor = torch.tensor(numbers)
    assert tensor.to(dtype[narrowest(numbers)]).float().tolist() == tensor.tolist()


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_quantized_gpt2_has_the_modules_of_the_model(
    fixtures: Path, tmp_path: Path, method: str
) -> None:
    """bitsandbytes turns the transposed Conv1D into a linear layer, and that is what is saved."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from adapterkit.hub.compose.model import describe_model

    make: Any = BitsAndBytesConfig
    config = make(load_in_8bit=True) if method == "int8" else make(
        load_in_4bit=True, bnb_4bit_quant_type=method
    )  # fmt: skip
    base = fixtures / "bases/gpt2"
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    model.save_pretrained(tmp_path / "gpt2")
    found = read_base(tmp_path / "gpt2").modules
    live = describe_model(model).modules
    for name in (name for name in live if "c_attn" in name or "c_proj" in name):
        assert (found[name].type, found[name].shape) == (live[name].type, live[name].shape)
        assert found[name].type == "linear"

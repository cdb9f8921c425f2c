"""`describe`, on every adapter of the fixtures that is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapterkit.hub import describe
from adapterkit.registry import AdapterError
from adapterkit.registry.strictjson import canonical

FIXTURES = Path(os.environ.get("ADAPTERKIT_FIXTURES") or Path(__file__).parents[1] / "data")
CASES: list[dict[str, Any]] = json.loads((FIXTURES / "index.json").read_text())["cases"]
PATHS = sorted({adapter["path"] for case in CASES for adapter in case["adapters"]})


@pytest.mark.parametrize("path", PATHS)
def test_every_adapter_is_described_or_refused_by_name(path: str, fixtures: Path) -> None:
    """Numbers are those that the safetensors library, or torch, reads."""
    folder = fixtures / path
    try:
        info = describe(folder)
    except AdapterError as error:
        assert error.exit_code in (2, 3, 5) and str(error)  # 2: the user has to say more
        return
    if info.format != "peft":  # test_formats has those
        return
    if (folder / "adapter_model.safetensors").exists():
        held = load_file(folder / "adapter_model.safetensors")
    else:
        held = torch.load(folder / "adapter_model.bin", weights_only=True)
    sizes = [tensor.numel() for tensor in held.values()]
    named = ("unexpected-tensor", "wrong-prefix")
    placed = info.n_tensors + sum(finding.code in named for finding in info.findings)
    assert placed >= len(sizes)
    if info.n_tensors == len(sizes):
        assert info.n_parameters == sum(sizes)
    config = json.loads((folder / "adapter_config.json").read_text())
    if info.kind == "lora" and not config.get("rank_pattern") and info.ranks:
        assert info.ranks.keys() == {config["r"]} and info.rank == config["r"]
    assert info.base == config["base_model_name_or_path"]
    assert len(info.root) == 64
    assert canonical(info.record())

"""Bases whose weights lie on the CPU or on disk until a forward needs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload

from adapterkit.hub import attach
from adapterkit.registry.errors import MismatchError

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
IDS = torch.arange(8)[None] + 3
MAP = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def plain(fixtures: Path, **settings: Any) -> Any:
    base = fixtures / "bases/llama"
    return transformers.AutoModelForCausalLM.from_pretrained(base, **settings).eval()


def on_cpu(fixtures: Path, folder: Path) -> Any:
    model = plain(fixtures)
    cpu_offload(model, torch.device("cpu"))
    return model


def on_disk(fixtures: Path, folder: Path) -> Any:
    model = plain(fixtures)
    disk_offload(model, str(folder), torch.device("cpu"))
    return model


def mapped(fixtures: Path, folder: Path) -> Any:
    return plain(fixtures, device_map=MAP, offload_folder=folder)


@pytest.mark.parametrize("make", [on_cpu, on_disk, mapped])
@pytest.mark.parametrize("name", ["lora_qv", "dora"])
def test_an_offloaded_base_gives_what_it_gives_in_memory(
    make: Callable[[Path, Path], Any], name: str, fixtures: Path, tmp_path: Path
) -> None:
    """DoRA's constants are of weights that are nowhere in memory."""
    source = fixtures / f"cases/llama.{name}/adapter"
    whole = plain(fixtures)
    with attach(whole, {"a": source}):
        expected = logits(whole)
    model = make(fixtures, tmp_path)
    before = logits(model)
    forwards = {path: vars(m).get("forward") for path, m in model.named_modules()}
    with attach(model, {"a": source}) as adapters:
        torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=0)
        adapters.activate([])
        with adapters.routed(["a"]):
            torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=0)
        layer = model.model.layers[1].self_attn.q_proj
        assert layer.weight.device.type == "meta"  # attaching fetched nothing for good
    assert torch.equal(logits(model), before)
    after = {path: vars(m).get("forward") for path, m in model.named_modules()}
    assert after == forwards


def test_what_replaces_an_offloaded_parameter_is_refused_by_name(
    fixtures: Path, tmp_path: Path
) -> None:
    model = on_disk(fixtures, tmp_path)
    with pytest.raises(MismatchError, match="offloaded"):
        attach(model, {"a": fixtures / "adapters/llama_head1"})
    assert "forward" in vars(model.lm_head)  # accelerate's own is still there
    logits(model)

"""Merging into the weights of a live model, and out of them again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapterkit.hub import attach, attached, load, merge
from adapterkit.hub.compose.handle import Adapters
from adapterkit.hub.merge.undo import digest
from adapterkit.registry.errors import AdapterError, ConflictError, InvalidError, MismatchError

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
IDS = torch.arange(24).reshape(2, 12)
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"quantization": "int8"},
    "nf4": {"quantization": "nf4"},
    "fp4": {"quantization": "fp4"},
}
CASES = {
    "llama": ["llama.lora_qv", "llama.dora", "llama.lora_tokens", "llama.rslora_patterns"],
    "gpt2": ["gpt2.lora_c_attn", "gpt2.ln_tuning"],
    "bert": ["bert.ia3_cls", "bert.oft_cls", "bert.lora_bias_all_cls"],
    "mixtral": ["mixtral.lora_router"],
}
PAIRS = [(base, case) for base, cases in CASES.items() for case in cases]


def state(model: Any) -> dict[str, str]:
    """sha256 of every tensor, constants of quantized weights among them."""
    return {
        name: digest({"": tensor})
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits.float()


@pytest.fixture
def opened(fixtures: Path) -> Callable[..., tuple[Any, Adapters]]:
    """`opened(base, cases, ...)`: a model with adapters on it, and their handle."""

    def make(base: str, *cases: str, **settings: Any) -> tuple[Any, Adapters]:
        sources = {case: str(fixtures / f"cases/{case}/adapter") for case in cases}
        model = load(fixtures / "bases" / base, list(sources.values()), **settings)
        handle = attached(model)
        assert handle is not None
        return model, handle

    return make


@pytest.mark.parametrize(("base", "case"), PAIRS)
def test_merge_then_run_is_attach_and_run(base: str, case: str, opened: Any):
    model, adapters = opened(base, case)
    wanted = logits(model)
    report = adapters.merge_()
    assert report.gain == pytest.approx(1, abs=1e-6)
    assert not adapters.active
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("undo", ["source", "memory", "disk"])
@pytest.mark.parametrize("form", FORMATS)
def test_unmerging_restores_every_bit(form: str, undo: str, opened: Any):
    model, adapters = opened("llama", "llama.lora_qv", "llama.dora", **FORMATS[form])
    before = state(model)
    adapters.merge_(undo, min_gain=0)
    changed = {name for name, found in state(model).items() if found != before[name]}
    assert any("layers.0.self_attn.q_proj" in name for name in changed)
    assert not any("gate_proj" in name for name in changed)
    adapters.unmerge_()
    assert state(model) == before


@pytest.mark.parametrize(("base", "case"), PAIRS)
def test_every_kind_is_unmerged_bit_for_bit_from_the_files(base: str, case: str, opened: Any):
    model, adapters = opened(base, case)
    before = state(model)
    adapters.merge_("source")
    assert state(model) != before
    adapters.unmerge_()
    assert state(model) == before


def test_a_gpt2_in_4_bits_is_merged_and_unmerged(opened: Any):
    """Its layers are stored transposed, and quantized as linear ones."""
    model, adapters = opened("gpt2", "gpt2.lora_c_attn", quantization="nf4")
    before = state(model)
    report = adapters.merge_("source", min_gain=0)
    assert {row.format for row in report.parameters} == {"nf4"}
    adapters.unmerge_()
    assert state(model) == before


def test_it_is_the_merge_on_disk(opened: Any, fixtures: Path, tmp_path: Path):
    model, adapters = opened("llama", "llama.lora_qv", "llama.dora", dtype=torch.bfloat16)
    sources = {str(fixtures / f"cases/{case}/adapter"): w for case, w in
               (("llama.lora_qv", 0.5), ("llama.dora", -1.0))}  # fmt: skip
    adapters.activate(sources)
    adapters.merge_()
    # of a checkpoint in bf16, as the model is
    transformers.AutoModelForCausalLM.from_pretrained(
        fixtures / "bases/llama", dtype=torch.bfloat16
    ).save_pretrained(tmp_path / "base")
    merge(sources, base=tmp_path / "base", out=tmp_path / "merged")
    found = load_file(tmp_path / "merged/model.safetensors")
    live = model.state_dict()
    for name, tensor in found.items():
        assert (live[name] == tensor).float().mean() > 0.999, name


def test_while_merged_nothing_is_activated(opened: Any):
    model, adapters = opened("llama", "llama.lora_qv")
    active = dict(adapters.active)
    before = logits(model)
    adapters.merge_()
    with pytest.raises(ConflictError, match="merged into the weights") as caught:
        adapters.activate(active)
    assert caught.value.hint == "unmerge_() first"
    with pytest.raises(ConflictError, match="merged into the weights"):
        adapters.merge_()
    adapters.unmerge_()
    adapters.activate(active)
    assert torch.equal(logits(model), before)


def test_detaching_takes_a_merge_back(opened: Any):
    model, adapters = opened("llama", "llama.lora_qv")
    before = state(model)
    adapters.merge_("memory")
    adapters.detach()
    assert state(model) == before
    assert attached(model) is None


def test_a_merge_without_undo_stays(opened: Any):
    model, adapters = opened("llama", "llama.lora_qv")
    wanted = logits(model)
    adapters.merge_(None)
    with pytest.raises(ConflictError, match="nothing was kept") as caught:
        adapters.unmerge_()
    assert caught.value.hint == "merge_(undo='memory')"
    adapters.detach()
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=0)


def test_what_4_bits_would_erase_is_not_merged(opened: Any):
    model, adapters = opened("llama", "llama.lora_qv", quantization="nf4")
    (name,) = adapters.names
    adapters.activate({name: 0.01})
    before, active = state(model), dict(adapters.active)
    wanted = logits(model)
    with pytest.raises(AdapterError, match="would survive in nf4"):
        adapters.merge_()
    assert state(model) == before
    assert dict(adapters.active) == active
    assert torch.equal(logits(model), wanted)


def test_the_source_has_to_have_the_models_weights(opened: Any, tmp_path: Path, fixtures: Path):
    import shutil

    base = shutil.copytree(fixtures / "bases/llama", tmp_path / "base")
    model = load(base, [fixtures / "cases/llama.lora_qv/adapter"])
    adapters = attached(model)
    assert adapters is not None
    held = load_file(base / "model.safetensors")
    held["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
    save_file(held, base / "model.safetensors", {"format": "pt"})
    before = state(model)
    with pytest.raises(ConflictError, match="is not what the model has") as caught:
        adapters.merge_("source")
    assert "undo='memory'" in (caught.value.hint or "")
    assert state(model) == before
    adapters.merge_()  # falls back to memory
    adapters.unmerge_()
    assert state(model) == before


def test_a_source_that_changed_since_is_not_taken_for_the_base(
    opened: Any, tmp_path: Path, fixtures: Path
):
    import shutil

    base = shutil.copytree(fixtures / "bases/llama", tmp_path / "base")
    model = load(base, [fixtures / "cases/llama.lora_qv/adapter"])
    adapters = attached(model)
    assert adapters is not None
    adapters.merge_("source")
    held = load_file(base / "model.safetensors")
    held["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
    save_file(held, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConflictError, match="is not what the model has"):
        adapters.unmerge_()


def test_the_bytes_it_takes_are_said_first(opened: Any, caplog: pytest.LogCaptureFixture):
    _, adapters = opened("llama", "llama.lora_qv")
    with caplog.at_level(logging.INFO, logger="adapterkit"):
        adapters.merge_("memory")
    assert "4 parameters, 49152 bytes, undo=memory" in caplog.text


@pytest.mark.parametrize("undo", ["tape", 1, ""])
def test_an_undo_that_does_not_exist_is_refused(undo: Any, opened: Any):
    model, adapters = opened("llama", "llama.lora_qv")
    before = state(model)
    with pytest.raises(InvalidError, match="undo is"):
        adapters.merge_(undo)
    assert state(model) == before
    assert adapters.active


def test_nothing_active_is_nothing_to_merge(opened: Any):
    _, adapters = opened("llama", "llama.lora_qv")
    adapters.activate([])
    with pytest.raises(InvalidError, match="none is active"):
        adapters.merge_()
    with pytest.raises(ConflictError, match="nothing is merged"):
        adapters.unmerge_()


def test_what_no_weight_equals_is_refused_and_stays_active(opened: Any):
    model, adapters = opened("bert", "bert.prefix_cls")
    before, wanted = state(model), logits(model)
    with pytest.raises(InvalidError, match="which no weight equals"):
        adapters.merge_()
    assert state(model) == before
    assert torch.equal(logits(model), wanted)


def test_a_tied_table_of_which_one_end_would_change_is_refused(fixtures: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(fixtures / "bases/gpt2").eval()
    before = state(model)
    with attach(model, [fixtures / "cases/gpt2.lora_wte/adapter"]) as adapters:
        with pytest.raises(MismatchError, match="are one table"):
            adapters.merge_()
        assert adapters.active
    assert state(model) == before

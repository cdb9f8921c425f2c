"""Merging into, and out of, 8 and 4 bits: the bits of bitsandbytes, and how much survives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapterkit.hub import merge
from adapterkit.hub.ingest import add
from adapterkit.registry import Registry
from adapterkit.registry.errors import AdapterError, AdapterWarning, InvalidError

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
CPU = {"device_map": {"": "cpu"}}
PAIRS = {
    "llama": "llama.lora_qv",
    "gpt2": "gpt2.lora_c_attn",
    "bert": "bert.lora_cls",
    "t5": "t5.lora",
    "mixtral": "mixtral.lora_router",
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def config_of(method: str) -> Any:
    if method == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=method, bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip


def opened(folder: Path, **settings: Any) -> Any:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    loader = getattr(transformers, name)
    return loader.from_pretrained(folder, dtype=torch.float32, **CPU, **settings).eval()


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("base", PAIRS)
def test_the_bits_are_those_of_transformers_and_bitsandbytes(
    base: str, method: str, fixtures: Path, tmp_path: Path
):
    """Of the merged weights: quantized by transformers at load, and saved by it."""
    adapter, place = fixtures / f"cases/{PAIRS[base]}/adapter", fixtures / "bases" / base
    merge([adapter], base=place, out=tmp_path / "dense")
    merge([adapter], base=place, out=tmp_path / "merged", quantize=method, min_gain=0)
    reference = opened(tmp_path / "dense", quantization_config=config_of(method))
    reference.save_pretrained(tmp_path / "reference")
    wanted, found = weights(tmp_path / "reference"), weights(tmp_path / "merged")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    said = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        for name in ("reference", "merged")
    ]
    assert said[0] == said[1]
    model = opened(tmp_path / "merged")
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    assert sum(isinstance(m, kinds) for m in model.modules()) == sum(
        isinstance(m, kinds) for m in reference.modules()
    )


@pytest.fixture
def gaussian(tmp_path: Path) -> Callable[[float], tuple[Path, Path, torch.Tensor]]:
    """(base stored in NF4, adapter, its delta of q_proj), |delta| being a share of |W|."""
    import peft

    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=256, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=32,
    )  # fmt: skip

    def make(share: float) -> tuple[Path, Path, torch.Tensor]:
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
        base = opened(tmp_path / "dense", quantization_config=config_of("nf4"))
        base.save_pretrained(tmp_path / "base")
        tuned = peft.get_peft_model(
            opened(tmp_path / "dense"),
            peft.LoraConfig(target_modules=["q_proj"], r=8, lora_alpha=8, init_lora_weights=False),
        )
        tuned.save_pretrained(tmp_path / "adapter")
        path = tmp_path / "adapter/adapter_model.safetensors"
        held = load_file(path)
        a, b = sorted(held)
        weight = base.model.layers[0].self_attn.q_proj.weight
        dense = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
        size = share * dense.norm() / (held[b] @ held[a]).norm()
        held[b] = held[b] * size
        save_file(held, path, {"format": "pt"})
        return tmp_path / "base", tmp_path / "adapter", held[b] @ held[a]

    return make


@pytest.mark.parametrize("share", [0.0014, 0.014, 0.042, 0.14])
def test_the_report_says_how_much_of_the_adapter_is_left_in_4_bits(
    share: float, gaussian: Any, tmp_path: Path
):
    """Against the weights before and after, dequantized by bitsandbytes."""
    base, adapter, delta = gaussian(share)
    dry = merge([adapter], base=base, dry_run=True)
    report = merge([adapter], base=base, out=tmp_path / "merged", min_gain=0)
    assert dry.parameters == report.parameters
    values = []
    for folder in (base, tmp_path / "merged"):
        weight = opened(folder).model.layers[0].self_attn.q_proj.weight
        values.append(bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state))
    applied, wanted = (values[1] - values[0]).double().flatten(), delta.double().flatten()
    gain = float(applied @ wanted / (wanted @ wanted))
    cosine = float(torch.nn.functional.cosine_similarity(applied, wanted, dim=0))
    assert report.gain == pytest.approx(gain, abs=0.02)
    assert report.cosine == pytest.approx(cosine, abs=0.02)
    assert report.parameters[0].size == pytest.approx(share, rel=0.01)
    assert (report.gain < 0.5) == (share < 0.1)


def test_below_min_gain_a_quantized_merge_stops_and_leaves_nothing(gaussian: Any, tmp_path: Path):
    base, adapter, _ = gaussian(0.005)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(AdapterError, match=r"would survive in nf4 \(gain 0\.0") as caught:
        merge([adapter], base=base, out=tmp_path / "merged")
    assert "--dtype bfloat16" in (caught.value.hint or "")
    assert sorted(tmp_path.iterdir()) == before
    with pytest.warns(AdapterWarning, match="would survive"):
        merge([adapter], base=base, dry_run=True)
    merge([adapter], base=base, out=tmp_path / "plain", quantize="none")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


def test_what_no_adapter_changes_keeps_its_codes(gaussian: Any, tmp_path: Path):
    base, adapter, _ = gaussian(0.14)
    merge([adapter], base=base, out=tmp_path / "merged")
    before, after = weights(base), weights(tmp_path / "merged")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("q_proj" in name for name in changed)
    configs = [json.loads((top / "config.json").read_text()) for top in (base, tmp_path / "merged")]
    assert configs[0] == configs[1]


def test_auto_merges_onto_what_the_registry_recorded(fixtures: Path, tmp_path: Path):
    """dequantize(quantize(W)) of every layer that was quantized in training, adapted or not."""
    base, adapter = fixtures / "bases/llama", fixtures / "cases/llama.lora_qv/adapter"
    model = opened(base, quantization_config=config_of("nf4"))
    with Registry(tmp_path / "home") as registry:
        add(registry, adapter, "sql", base=base, trained_on="nf4")
        add(registry, adapter, "plain", base=base, trained_on="none")
        settings: dict[str, Any] = {"base": base, "registry": registry}
        report = merge({"sql": 1.0}, out=tmp_path / "auto", **settings)
        assert (report.onto, report.why) == ("dequantized", "the adapters were trained on nf4")
        plain = merge({"plain": 1.0}, out=tmp_path / "plain", **settings)
        assert plain.onto == "original"
        asked = merge({"sql": 1.0}, out=tmp_path / "original", onto="original", **settings)
        assert asked.onto == "original"
        with pytest.raises(InvalidError, match="expected one kind of quantized base"):
            merge(["sql", "plain"], dry_run=True, onto="dequantized", **settings)
    found = weights(tmp_path / "auto")
    delta = (
        weights(tmp_path / "plain")["model.layers.0.self_attn.q_proj.weight"]
        - weights(base)["model.layers.0.self_attn.q_proj.weight"]
    )
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = module.weight
            wanted = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            wanted = wanted + delta if name.endswith("layers.0.self_attn.q_proj") else wanted
            if "v_proj" not in name and name != "model.layers.1.self_attn.q_proj":
                torch.testing.assert_close(found[f"{name}.weight"], wanted, atol=1e-6, rtol=0)
    assert torch.equal(found["lm_head.weight"], weights(base)["lm_head.weight"])
    same = weights(tmp_path / "original")
    assert all(torch.equal(tensor, same[n]) for n, tensor in weights(tmp_path / "plain").items())


def test_what_they_were_trained_on_can_be_said(fixtures: Path, tmp_path: Path):
    base, adapter = fixtures / "bases/llama", fixtures / "cases/llama.lora_qv/adapter"
    said = merge([adapter], base=base, out=tmp_path / "said", trained_on="int8")
    assert said.onto == "dequantized"
    assert "int8" in said.why


def test_the_original_of_a_quantized_checkpoint_is_not_there(gaussian: Any, tmp_path: Path):
    base, adapter, _ = gaussian(0.1)
    with pytest.raises(InvalidError, match="its original weights are not there"):
        merge([adapter], base=base, out=tmp_path / "m", onto="original")


def test_a_dora_on_a_dequantized_base_has_the_norms_of_that_base(fixtures: Path, tmp_path: Path):
    from adapterkit.hub import load

    base, adapter = fixtures / "bases/llama", fixtures / "cases/llama.dora/adapter"
    merge([adapter], base=base, out=tmp_path / "merged", trained_on="nf4")
    ids = torch.arange(24).reshape(2, 12)
    live = load(base, [adapter], quantization="nf4")
    with torch.inference_mode():
        wanted, found = live(ids).logits, opened(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


def test_values_that_int8_is_not_made_from_are_named(gaussian: Any, tmp_path: Path):
    base, adapter, _ = gaussian(0.1)
    path = adapter / "adapter_model.safetensors"
    held = {name: tensor * 10000 for name, tensor in load_file(path).items()}
    save_file(held, path, {"format": "pt"})
    with pytest.raises(InvalidError, match="q_proj.weight has values above 65504"):
        merge([adapter], base=tmp_path / "dense", out=tmp_path / "m", quantize="int8")
    assert not (tmp_path / "m").exists()

"""Adapters in the names of other versions of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit.hub import attach
from adapterkit.registry.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
TOKENS = torch.arange(5, 15)[None]


def qwen2_vl() -> Any:
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=vision
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    text = transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=3)
    return transformers.LlavaForConditionalGeneration(config)


# model, and (start of a name now, start of it before transformers 4.52)
MODELS = {"qwen2_vl": (qwen2_vl, "model."), "llava": (llava, "language_model.model.")}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(tensors: dict[str, Tensor], **config: Any) -> Path:
        folder = tmp_path / f"adapter{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        known = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"]} | config
        (folder / "adapter_config.json").write_text(json.dumps(known))
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return make


def drawn(model: Any, start: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if "language_model" in name and name.endswith(("q_proj", "v_proj")):
            key = "base_model.model." + name.replace("model.language_model.", start)
            n_out, n_in = layer.weight.shape
            tensors[f"{key}.lora_A.weight"] = torch.randn(2, n_in)
            tensors[f"{key}.lora_B.weight"] = torch.randn(n_out, 2)
    return tensors


def run(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS).logits
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_language_model_of_a_vision_model_has_an_older_name(
    write: Callable[..., Path], name: str
) -> None:
    make, older = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    pattern = r".*language_model.*\.[qv]_proj"
    new = write(drawn(model, "model.language_model."), target_modules=pattern)
    before = run(model)
    with attach(model, [new]):
        expected = run(model)
    assert not torch.allclose(before, expected)
    tensors = drawn(model, older)
    target = rf"{older}layers.*\.[qv]_proj".replace(".", r"\.", 1)
    with attach(model, [write(tensors, target_modules=target)]) as adapters:
        assert torch.equal(run(model), expected)
        (report,) = adapters.report.values()
        assert {row.tensor for row in report} == tensors.keys()
    assert torch.equal(run(model), before)


def test_a_tensor_that_lacks_in_older_names_is_named(write: Callable[..., Path]) -> None:
    torch.manual_seed(0)
    model = qwen2_vl().eval()
    tensors = drawn(model, "model.")
    del tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.v_proj"):
        attach(model, [write(tensors)])


@pytest.mark.parametrize("head", ["bert", "roberta"])
def test_the_bias_of_a_masked_language_model_is_one_that_has_two_names(
    tmp_path: Path, head: str
) -> None:
    """PEFT's bias="all" writes both; where they differ, neither is the trained one for sure."""
    peft = pytest.importorskip("peft")
    sizes = {
        "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 40,
    }  # fmt: skip
    config, kind = {
        "bert": (transformers.BertConfig, transformers.BertForMaskedLM),
        "roberta": (transformers.RobertaConfig, transformers.RobertaForMaskedLM),
    }[head]
    torch.manual_seed(0)
    model = kind(config(**sizes)).eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    lora = peft.LoraConfig(target_modules=["query"], bias="all")
    wrapped = peft.get_peft_model(model, lora).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) / 3)
        wrapped.save_pretrained(str(tmp_path))
        expected = wrapped(input_ids=TOKENS).logits
    plain = wrapped.unload()
    plain.load_state_dict(state)
    with attach(plain, tmp_path) as adapters:
        torch.testing.assert_close(run(plain), expected, atol=1e-5, rtol=0)
        fates = {row.primitive for row in adapters.report[str(tmp_path)]}
        assert "copy" in fates
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(("predictions.bias", "lm_head.bias")))
    save_file(tensors | {key: tensors[key] + 1}, path)
    with pytest.raises(AdapterError, match="differs from the saved module it repeats"):
        attach(plain, tmp_path)

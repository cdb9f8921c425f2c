"""Saved modules whose parameters are not called weight and bias."""

from __future__ import annotations

import copy
import json
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
TOKENS = torch.arange(5, 15)[None]
SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def mixtral() -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    return transformers.MixtralForCausalLM(config).eval()


def run(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS).logits
    return found


def saved(model: Any, folder: Path, **options: Any) -> Tensor:
    """Logits of PEFT with everything it trains changed; the adapter is saved."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) / 5)
        wrapped.save_pretrained(str(folder))
        expected: Tensor = wrapped(input_ids=TOKENS).logits
    return expected


def test_saved_experts_and_their_router_are_replaced(mixtral: Any, tmp_path: Path) -> None:
    before = run(mixtral)
    expected = saved(mixtral, tmp_path, target_modules=["q_proj"], modules_to_save=["mlp"])
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.mlp.experts.down_proj" in held
    with attach(mixtral, tmp_path) as adapters:
        torch.testing.assert_close(run(mixtral), expected, atol=1e-5, rtol=0)
        assert {row.tensor for row in adapters.report[str(tmp_path)]} == held.keys()
    assert torch.equal(run(mixtral), before)


def test_replaced_experts_and_updates_of_them_add(mixtral: Any, tmp_path: Path) -> None:
    """W0 + w (T - W0) + v s B_e A_e, each token by its own expert."""
    saved(mixtral, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["experts"])
    name = "model.layers.1.mlp.experts.down_proj"
    new = load_file(tmp_path / "whole" / "adapter_model.safetensors")[f"base_model.model.{name}"]
    a, b = torch.randn(8, 24) / 3, torch.randn(16, 8) / 3
    folder = tmp_path / "low"
    folder.mkdir()
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 2, "peft_version": "0.21.2",
        "target_parameters": ["layers.1.mlp.experts.down_proj"], "target_modules": [],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    key = f"base_model.model.{name}".removesuffix(".down_proj")
    pair = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    save_file(pair, folder / "adapter_model.safetensors")
    experts = mixtral.model.layers[1].mlp.experts
    plain = copy.deepcopy(experts)
    x, chosen = torch.randn(5, 16), torch.tensor([[0, 3], [1, 2], [2, 3], [0, 1], [3, 1]])
    share = torch.full((5, 2), 0.5)
    with torch.no_grad(), attach(mixtral, {"whole": tmp_path / "whole", "low": folder}) as adapters:
        adapters.activate({"whole": 0.5, "low": -2})
        found = experts(x, chosen, share)
    with torch.no_grad():
        both = load_file(tmp_path / "whole" / "adapter_model.safetensors")
        up = both[f"base_model.model.{name}".replace("down", "gate_up")]
        plain.gate_up_proj.copy_((plain.gate_up_proj + up) / 2)
        plain.down_proj.copy_((plain.down_proj + new) / 2)
        for expert in range(4):
            plain.down_proj[expert] -= 2 * b[:, expert::4] @ a[2 * expert : 2 * expert + 2]
        expected = plain(x, chosen, share)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def gemma3() -> Any:
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config={**SIZES, "head_dim": 8}, vision_config=vision, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model


def test_a_parameter_of_the_saved_module_itself_is_replaced(tmp_path: Path) -> None:
    model = gemma3()
    projector = model.model.multi_modal_projector
    target = r".*language_model.*q_proj"
    saved(model, tmp_path, target_modules=target, modules_to_save=["multi_modal_projector"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    trained = copy.deepcopy(projector)
    start = "base_model.model.model.multi_modal_projector."
    trained.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if start in k})
    x = torch.randn(1, 16, 16)
    with torch.no_grad():
        before = projector(x)
        with attach(model, tmp_path):
            assert torch.equal(projector(x), trained(x))
            assert not torch.allclose(projector(x), before)
        assert torch.equal(projector(x), before)


@pytest.mark.parametrize("change", ["missing", "renamed", "reshaped"])
def test_such_a_parameter_is_named_when_it_is_wrong(
    mixtral: Any, tmp_path: Path, change: str
) -> None:
    saved(mixtral, tmp_path, target_modules=["q_proj"], modules_to_save=["experts"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.mlp.experts.down_proj"
    value = tensors.pop(key)
    if change != "missing":
        tensors[key + "s" if change == "renamed" else key] = value[:, :-1].contiguous()
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.experts\.down_proj"):
        attach(mixtral, tmp_path)

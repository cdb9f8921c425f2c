"""LoRA in plain torch, to train with, and the PEFT folder that carries the result."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

RANK, ALPHA = 8, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRA(nn.Module):
    """W + alpha/r B A on one linear layer, quantized or not: Hu et al. 2021, arXiv:2106.09685."""

    def __init__(self, layer: nn.Linear, draw: torch.Generator) -> None:
        super().__init__()
        width = layer.in_features
        self.A = nn.Parameter(torch.randn(RANK, width, generator=draw) / width**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, RANK))
        self.hook = layer.register_forward_hook(self.add)

    def add(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + ALPHA / RANK * (inputs[0] @ self.A.mT @ self.B.mT)


def put_on(model: nn.Module, seed: int) -> dict[str, LoRA]:
    """A fresh LoRA on every layer named in TARGETS; all other parameters are frozen."""
    model.requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    layers = dict(model.named_modules())
    return {
        name: LoRA(layer, draw)
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in TARGETS
    }


def take_off(loras: dict[str, LoRA]) -> None:
    for lora in loras.values():
        lora.hook.remove()


def save_peft(loras: dict[str, LoRA], folder: Path, base: str) -> Path:
    """The two files that PEFT's `save_pretrained` writes."""
    from safetensors.torch import save_file

    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "target_modules": list(TARGETS),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = {}
    for name, lora in loras.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora.A.detach()
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora.B.detach()
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder

"""Llama-shaped models of random weights, and adapters for all their linear layers, made cheaply.

A `twin` of a model has modules of its own and the same weights, so that PEFT, which replaces
modules, and this project stand beside each other on one base and can be timed in turn.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from adapterkit.registry.errors import AdapterWarning

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 16, 32
DISTINCT = 8  # files; more adapters are further names of these
PAST = 16  # tokens in the cache of a decoding step
EPSILON = 0.1
SHIFTS = 4096


@dataclass(frozen=True)
class Sizes:
    """Llama's shape; by default that of the model of 1 billion parameters."""

    hidden: int = 2048
    layers: int = 16
    intermediate: int = 8192
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 128256
    tied: bool = True

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden, num_hidden_layers=self.layers, vocab_size=self.vocab,
            intermediate_size=self.intermediate, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, tie_word_embeddings=self.tied, use_cache=True,
        )  # fmt: skip

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """(name, out, in) of all that an adapter of these benches touches."""
        narrow = self.hidden // self.heads * self.kv_heads
        wide = {"gate_proj": self.intermediate, "up_proj": self.intermediate}
        outs = {"k_proj": narrow, "v_proj": narrow, **wide}
        for layer in range(self.layers):
            for name in LINEARS:
                block = "self_attn" if name in LINEARS[:4] else "mlp"
                n_in = self.intermediate if name == "down_proj" else self.hidden
                yield f"model.layers.{layer}.{block}.{name}", outs.get(name, self.hidden), n_in

    def adapter_values(self, rank: int) -> int:
        return sum(rank * (n_out + n_in) for _, n_out, n_in in self.linears())


SEVEN_B = Sizes(4096, 32, 11008, 32, 32, 32000, tied=False)
TINY = Sizes(64, 2, 128, 4, 2, 256)


def build(
    sizes: Sizes, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> LlamaForCausalLM:
    """A model for inference; each weight is another run of one block of random values."""
    with torch.device("meta"):
        model = LlamaForCausalLM(sizes.config).to(dtype)
    model.to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    largest = max(parameter.numel() for parameter in model.parameters())
    size = min(largest, 1 << 24) + SHIFTS
    block = torch.randn(size, generator=generator, device=device).mul_(0.02).to(dtype)
    for index, parameter in enumerate(model.parameters()):
        values = parameter.data.view(-1)
        if parameter.ndim == 1:
            values.fill_(1)
            continue
        for piece in values.split(len(block) - SHIFTS):
            piece.copy_(block[97 * index % SHIFTS :][: len(piece)])
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    return model.eval().requires_grad_(False)


def twin(model: nn.Module) -> Any:
    """Modules of its own on the same parameters; what else quantized weights consist of, too."""
    states = [getattr(module, "quant_state", None) for module in model.modules()]
    return copy.deepcopy(model, {id(shared): shared for shared in (*model.parameters(), *states)})


def write_adapters(
    root: Path, sizes: Sizes, count: int, rank: int = RANK, dtype: torch.dtype = torch.float32
) -> dict[str, Path]:
    """Folders as PEFT writes them, a0 to a(count - 1); beyond the first 8 their weights are links
    to the same files, and their alphas differ."""
    found: dict[str, Path] = {}
    for index in range(count):
        folder = root / f"a{index}"
        folder.mkdir(parents=True)
        weights = folder / "adapter_model.safetensors"
        if index < DISTINCT:
            save_file(_factors(sizes, index, rank, dtype), weights, {"format": "pt"})
        else:
            os.link(found[f"a{index % DISTINCT}"] / weights.name, weights)
        said = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank,
            "lora_alpha": ALPHA + index // DISTINCT, "target_modules": list(LINEARS),
            "base_model_name_or_path": "", "inference_mode": True, "bias": "none",
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(said))
        found[folder.name] = folder
    return found


def _factors(sizes: Sizes, seed: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, n_out, n_in in sizes.linears():
        stem = f"base_model.model.{name}.lora"
        for role, shape in (("A", (rank, n_in)), ("B", (n_out, rank))):
            values = torch.randn(shape, generator=generator).mul_(0.02)
            tensors[f"{stem}_{role}.weight"] = values.to(dtype)
    return tensors


def with_peft(model: Any, folders: dict[str, Path]) -> peft.PeftModel:
    """All of them loaded, the first one active."""
    first, *rest = folders
    found = peft.PeftModel.from_pretrained(model, folders[first], adapter_name=first)
    for name in rest:
        found.load_adapter(folders[name], adapter_name=name)
    return found.eval()


class Step:
    """One more token for each row, behind a cache that every model shares."""

    def __init__(self, bare: Any, rows: int = 1, past: int = PAST) -> None:
        ids = tokens(bare, rows, past + 1)
        self._token = ids[:, -1:]
        self._cache = DynamicCache(config=bare.config)
        with torch.no_grad():
            bare(ids[:, :-1], past_key_values=self._cache, use_cache=True)

    def __call__(self, model: Any, **options: Any) -> Tensor:
        given = {"past_key_values": self._cache, "use_cache": True, **options}
        logits: Tensor = model(input_ids=self._token, **given).logits
        self._cache.crop(-1)
        return logits


def tokens(model: Any, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)
    return ids.to(next(model.parameters()).device)


@contextmanager
def quietly() -> Iterator[None]:
    """No gradients; no warning that the base of an adapter was not recorded."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)
        yield


def require_same(what: str, ours: Tensor, theirs: Tensor, bare: Tensor, whose: str = "PEFT") -> str:
    """How far both sides are apart, in parts of what the adapters change. Exits where they do not
    compute the same: then no time means anything."""
    ours, theirs, bare = (each.float() for each in (ours, theirs, bare))
    apart = float((ours - theirs).norm() / (theirs - bare).norm())
    if not apart <= EPSILON:
        raise SystemExit(f"{what}: logits differ by {apart:.2g} of what the adapters change")
    return f"{what}: logits differ from those of {whose} by {apart:.1%} of what the adapters change"

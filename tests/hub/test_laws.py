"""The algebra of additive updates, against dense float64 maths on random small models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from adapterkit.hub import attach

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
TARGETS = ("q_proj", "v_proj", "down_proj")
KINDS = ("lora", "rslora", "dora", "lora_bias")
WEIGHTS = st.floats(-2, 2).map(lambda w: round(w, 3))
QUICK = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def write(tmp_path: Path, model: Any) -> Callable[..., Path]:
    """Writes a PEFT folder of random factors for the model."""

    def make(name: str, kind: str, rank: int, alpha: float, seed: int) -> Path:
        draw = torch.Generator().manual_seed(seed)
        tensors: dict[str, Tensor] = {}
        for module, layer in model.named_modules():
            if not module.endswith(TARGETS):
                continue
            key = f"base_model.model.{module}"
            n_out, n_in = layer.weight.shape
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, n_in, generator=draw) / 4
            tensors[f"{key}.lora_B.weight"] = torch.randn(n_out, rank, generator=draw) / 4
            if kind == "dora":
                m = 0.5 + torch.rand(n_out, generator=draw)
                tensors[f"{key}.lora_magnitude_vector"] = m
            if kind == "lora_bias":
                tensors[f"{key}.lora_B.bias"] = torch.randn(n_out, generator=draw)
        config = {
            "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(TARGETS),
            "use_rslora": kind == "rslora", "use_dora": kind == "dora",
            "lora_bias": kind == "lora_bias",
        }  # fmt: skip
        folder = tmp_path / f"{name}-{kind}-{rank}-{seed}"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return make


def effect(model: Any, module: str, folder: Path) -> tuple[Tensor, Tensor]:
    """(change of the weight, change of the bias) of one adapter at weight 1, dense float64.

    LoRA: s B A, with s = alpha / r or alpha / sqrt(r); DoRA: diag(m / |V|) V - W, V = W + s B A.
    """
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    p = load_file(folder / "adapter_model.safetensors")
    key = f"base_model.model.{module}"
    w = model.get_submodule(module).weight.double()
    a, b = (p[f"{key}.lora_{x}.weight"].double() for x in "AB")
    rank = config["r"]
    s = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
    shift = s * p.get(f"{key}.lora_B.bias", torch.zeros(len(w))).double()
    if not config["use_dora"]:
        return s * b @ a, shift
    v = w + s * b @ a
    m = p[f"{key}.lora_magnitude_vector"].double()
    return (m / v.norm(dim=1))[:, None] * v - w, shift


adapters_drawn = st.lists(
    st.tuples(
        st.sampled_from(KINDS), st.integers(1, 6), st.floats(0.5, 8), st.integers(0, 999), WEIGHTS
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda drawn: drawn[3],
)


@QUICK
@given(drawn=adapters_drawn)
def test_a_live_forward_is_the_dense_weighted_sum(
    model: Any, write: Callable[..., Path], drawn: list[Any]
) -> None:
    """W + sum w_k delta_k and b + sum w_k beta_k, DoRA among them, whatever the ranks."""
    folders = {f"a{i}": write(f"a{i}", *row[:4]) for i, row in enumerate(drawn)}
    weights = {f"a{i}": row[4] for i, row in enumerate(drawn)}
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    module = "model.layers.1.self_attn.v_proj"
    layer = model.get_submodule(module)
    with torch.no_grad(), attach(model, folders) as adapters:
        adapters.activate(weights)
        found = layer(x).double()
    w, b = layer.weight.detach().double(), layer.bias.detach().double()
    for name, folder in folders.items():
        delta, shift = effect(model, module, folder)
        w, b = w + weights[name] * delta.detach(), b + weights[name] * shift.detach()
    expected = x.double() @ w.mT + b
    scale = expected.abs().max().clamp(min=1)
    torch.testing.assert_close(found / scale, expected / scale, atol=2e-5, rtol=0)


@QUICK
@given(drawn=adapters_drawn, order=st.randoms(use_true_random=False))
def test_order_does_not_matter(
    model: Any, write: Callable[..., Path], drawn: list[Any], order: Any
) -> None:
    folders = {f"a{i}": write(f"a{i}", *row[:4]) for i, row in enumerate(drawn)}
    weights = {f"a{i}": row[4] for i, row in enumerate(drawn)}
    names = list(weights)
    tokens = torch.arange(10)[None]
    with torch.no_grad(), attach(model, folders) as adapters:
        adapters.activate(weights)
        first = model(tokens).logits
        order.shuffle(names)
        adapters.activate({name: weights[name] for name in names})
        second = model(tokens).logits
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


@QUICK
@given(
    kind=st.sampled_from(KINDS),
    rank=st.integers(1, 6),
    seed=st.integers(0, 999),
    weight=WEIGHTS,
)
def test_b_minus_b_leaves_a(
    model: Any, write: Callable[..., Path], kind: str, rank: int, seed: int, weight: float
) -> None:
    a, b = write("a", "lora", 3, 4.0, 7), write("b", kind, rank, 4.0, seed)
    tokens = torch.arange(10)[None]
    with torch.no_grad(), attach(model, {"a": a, "plus": b, "minus": b}) as adapters:
        adapters.activate({"a": 1})
        alone = model(tokens).logits
        adapters.activate({"plus": weight, "a": 1, "minus": -weight})
        torch.testing.assert_close(model(tokens).logits, alone, atol=1e-5, rtol=0)

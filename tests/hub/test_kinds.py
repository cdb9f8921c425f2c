"""Every additive kind: the algebra of the sum against dense float64 maths, on any weight format."""

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
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit.hub import attach, check
from adapterkit.hub.quant import format_of

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
QUICK = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WEIGHTS = st.floats(-2, 2).map(lambda w: round(w, 3))
LINEARS, NORMS = ("q_proj", "v_proj", "down_proj"), ("input_layernorm", "norm")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
INT8 = {"load_in_8bit": True}
Sizes = dict[str, tuple[int, ...]]
P = dict[str, Tensor]
ALPHA = 3.0

# kind -> (config, sizes of its tensors for (out, in, r), change of the weight from them, float64)
Row = tuple[dict[str, Any], Callable[[int, int, int], Sizes], Callable[[P, int], Tensor]]
KINDS: dict[str, Row] = {
    "lora": (
        {"peft_type": "LORA", "lora_alpha": ALPHA},
        lambda n, m, r: {"lora_A.weight": (r, m), "lora_B.weight": (n, r)},
        lambda p, r: ALPHA / r * p["lora_B.weight"] @ p["lora_A.weight"],
    ),
    "moslora": (
        {"peft_type": "LORA", "lora_alpha": ALPHA, "lora_use_mixer": True},
        lambda n, m, r: {
            "lora_A.weight": (r, m), "lora_B.weight": (n, r), "lora_AB.weight": (r, r),
        },
        lambda p, r: ALPHA / r * p["lora_B.weight"] @ p["lora_AB.weight"] @ p["lora_A.weight"],
    ),
    "adalora": (
        {"peft_type": "ADALORA", "lora_alpha": ALPHA},
        lambda n, m, r: {"lora_A": (r, m), "lora_B": (n, r), "lora_E": (r, 1)},
        lambda p, r: ALPHA / (r + 1e-5) * p["lora_B"] @ (p["lora_E"] * p["lora_A"]),
    ),
    "vera": (
        {"peft_type": "VERA"},
        lambda n, m, r: {"vera_lambda_b": (n,), "vera_lambda_d": (r,)},
        lambda p, r: (
            p["vera_lambda_b"][:, None] * p["vera_B"][: len(p["vera_lambda_b"])]
        ) @ (p["vera_lambda_d"][:, None] * p["vera_A"][:, : p["n_in"]]),
    ),
    "loha": (
        {"peft_type": "LOHA", "alpha": ALPHA},
        lambda n, m, r: {
            "hada_w1_a": (n, r), "hada_w1_b": (r, m), "hada_w2_a": (n, r), "hada_w2_b": (r, m),
        },
        lambda p, r: (
            ALPHA / r * (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
        ),
    ),
    "lokr": (
        {"peft_type": "LOKR", "alpha": ALPHA},
        lambda n, m, r: {
            "lokr_w1_a": (2, r), "lokr_w1_b": (r, 4), "lokr_w2_a": (n // 2, r),
            "lokr_w2_b": (r, m // 4),
        },
        lambda p, r: ALPHA / r * torch.kron(
            p["lokr_w1_a"] @ p["lokr_w1_b"], p["lokr_w2_a"] @ p["lokr_w2_b"]
        ),
    ),
    "lokr whole": (
        {"peft_type": "LOKR", "alpha": ALPHA},
        lambda n, m, r: {"lokr_w1": (4, 2), "lokr_w2_a": (n // 4, r), "lokr_w2_b": (r, m // 2)},
        lambda p, r: ALPHA / r * torch.kron(p["lokr_w1"], p["lokr_w2_a"] @ p["lokr_w2_b"]),
    ),
    "beft": (
        {"peft_type": "BEFT"},
        lambda n, m, r: {"beft_bias": (1, n)},
        lambda p, r: torch.zeros(p["beft_bias"].shape[1], int(p["n_in"])).double(),
    ),
    "norms": (
        {"peft_type": "LN_TUNING"},
        lambda n, m, r: {"ln_tuning_layers.weight": (m,)},
        lambda p, r: p["ln_tuning_layers.weight"] - p["weight"],
    ),
}  # fmt: skip


def write(model: Any, folder: Path, kind: str, rank: int, seed: int) -> Path:
    """A PEFT folder of random tensors for the model."""
    draw = torch.Generator().manual_seed(seed)
    settings, sizes, _ = KINDS[kind]
    targets = NORMS if kind == "norms" else LINEARS
    tensors: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] in targets:
            n_in = getattr(layer, "in_features", None) or len(layer.weight)
            shapes = sizes(getattr(layer, "out_features", n_in), n_in, rank)
            for key, shape in shapes.items():
                tensors[f"base_model.model.{name}.{key}"] = torch.randn(shape, generator=draw) / 3
    if kind == "vera":
        tensors["base_model.vera_A"] = torch.randn(rank, shared_in(model), generator=draw) / 4
        tensors["base_model.vera_B"] = torch.randn(shared_out(model), rank, generator=draw)
    config = {**settings, "r": rank, "init_r": rank, "target_modules": list(targets)}
    del config["r" if kind in ("adalora", "beft", "norms") else "init_r"]
    if kind in ("beft", "norms"):
        del config["init_r"]
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def linears(model: Any) -> list[Any]:
    return [layer for name, layer in model.named_modules() if name.rpartition(".")[2] in LINEARS]


def shared_in(model: Any) -> int:
    return max(layer.in_features for layer in linears(model))


def shared_out(model: Any) -> int:
    return max(layer.out_features for layer in linears(model))


def effect(model: Any, module: str, folder: Path, kind: str, rank: int) -> tuple[Tensor, Tensor]:
    """(change of the weight, change of the bias) at weight 1, dense float64."""
    layer = model.get_submodule(module)
    prefix = f"base_model.model.{module}."
    stored = load_file(folder / "adapter_model.safetensors")
    p: dict[str, Any] = {
        key.removeprefix(prefix).removeprefix("base_model."): tensor.double()
        for key, tensor in stored.items()
        if key.startswith(prefix) or "base_model.vera_" in key
    }
    if not any(key.startswith(prefix) for key in stored):
        return torch.zeros(1).double(), torch.zeros(1).double()
    p |= {"n_in": getattr(layer, "in_features", 0), "weight": layer.weight.detach().double()}
    shift = p["beft_bias"][0] if "beft_bias" in p else torch.zeros(1).double()
    return KINDS[kind][2](p, rank), shift


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


drawn_adapters = st.lists(
    st.tuples(st.sampled_from(sorted(KINDS)), st.integers(1, 6), st.integers(0, 999), WEIGHTS),
    min_size=1,
    max_size=4,
    unique_by=lambda row: row[2],
)


def close(found: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().clamp(min=1)
    torch.testing.assert_close(found.double() / scale, expected / scale, atol=2e-5, rtol=0)


@QUICK
@given(drawn=drawn_adapters, order=st.randoms(use_true_random=False))
def test_any_mix_of_kinds_is_the_dense_weighted_sum(
    model: Any, tmp_path: Path, drawn: list[Any], order: Any
) -> None:
    """W + sum w delta and b + sum w beta, in any order; so linear in every weight."""
    folders = {
        f"a{i}": write(model, tmp_path / f"{kind}-{rank}-{seed}", kind, rank, seed)
        for i, (kind, rank, seed, _) in enumerate(drawn)
    }
    weights = {f"a{i}": row[3] for i, row in enumerate(drawn)}
    names = list(weights)
    order.shuffle(names)
    draw = torch.Generator().manual_seed(1)
    value, norm = (f"model.layers.0.{name}" for name in ("self_attn.v_proj", "input_layernorm"))
    x = torch.randn(3, 5, 32, generator=draw)
    with torch.no_grad(), attach(model, folders) as adapters:
        adapters.activate({name: weights[name] for name in names})
        found = [model.get_submodule(name)(x) for name in (value, norm)]
    totals = []
    for module in (value, norm):
        layer = model.get_submodule(module)
        w, b = layer.weight.detach().double(), torch.zeros(1).double()
        for (kind, rank, *_), (name, folder) in zip(drawn, folders.items(), strict=True):
            delta, shift = effect(model, module, folder, kind, rank)
            w, b = w + weights[name] * delta, b + weights[name] * shift
        totals.append((w, b))
    (w, b), (g, _) = totals
    wide = x.double()
    close(found[0], wide @ w.mT + b + model.get_submodule(value).bias.detach().double())
    close(found[1], g * wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())


@QUICK
@given(
    kind=st.sampled_from(sorted(KINDS)), rank=st.integers(1, 6), seed=st.integers(0, 999),
    weight=WEIGHTS,
)  # fmt: skip
def test_plus_and_minus_cancel_and_detach_leaves_no_bit_changed(
    model: Any, tmp_path: Path, kind: str, rank: int, seed: int, weight: float
) -> None:
    folder = write(model, tmp_path / f"{kind}-{rank}-{seed}", kind, rank, seed)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        before = model(tokens).logits
        with attach(model, {"plus": folder, "minus": folder}) as adapters:
            adapters.activate({"plus": weight, "minus": -weight})
            torch.testing.assert_close(model(tokens).logits, before, atol=1e-5, rtol=0)
            adapters.activate({"plus": 1})
            assert not torch.equal(model(tokens).logits, before)
        assert torch.equal(model(tokens).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.fixture(scope="module")
def quantized(fixtures: Path) -> Callable[[str], Any]:
    """The same base, its linear layers stored in 4 or 8 bits."""
    held: dict[str, Any] = {}

    def load(method: str) -> Any:
        if method not in held:
            how = transformers.BitsAndBytesConfig(**(NF4 if method == "nf4" else INT8))
            held[method] = transformers.AutoModelForCausalLM.from_pretrained(
                fixtures / "bases" / "llama", dtype=torch.float32, quantization_config=how,
                device_map={"": "cpu"},
            ).eval()  # fmt: skip
        return held[method]

    return load


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"norms"}))
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_quantized_base_gets_the_same_change(
    quantized: Callable[[str], Any], tmp_path: Path, method: str, kind: str
) -> None:
    """The change itself is exact; the sum is that of the dequantized weight."""
    model, module = quantized(method), "model.layers.1.self_attn.q_proj"
    folder = write(model, tmp_path / "a", kind, 3, 5)
    layer = model.get_submodule(module)
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        w, plain = format_of(layer).read_weight(layer).double(), layer(x).double()
        with attach(model, {"a": folder}) as adapters:
            adapters.activate({"a": -0.5})
            found = layer(x).double()
        assert torch.equal(layer(x).double(), plain)
    delta, shift = effect(model, module, folder, kind, 3)
    close(found, plain - 0.5 * (x.double() @ delta.mT + shift))
    rounded = 0.2 if method == "int8" else 1e-4  # int8 rounds activations as well
    dense = x.double() @ (w - 0.5 * delta).mT - 0.5 * shift
    torch.testing.assert_close(found, dense, atol=rounded, rtol=0)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_norms_of_a_quantized_base_are_replaced(
    quantized: Callable[[str], Any], tmp_path: Path, method: str
) -> None:
    model, module = quantized(method), "model.layers.1.input_layernorm"
    folder = write(model, tmp_path / "a", "norms", 3, 5)
    layer = model.get_submodule(module)
    x = torch.randn(4, len(layer.weight), generator=torch.Generator().manual_seed(2))
    p = load_file(folder / "adapter_model.safetensors")
    new = p[f"base_model.model.{module}.ln_tuning_layers.weight"]
    with torch.no_grad():
        plain = layer(x)
        with attach(model, {"a": folder}):
            torch.testing.assert_close(layer(x), plain / layer.weight * new, atol=1e-5, rtol=1e-5)
        assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_projections_of_vera_are_stored_once(
    model: Any, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    folder = write(model, tmp_path / "a", "vera", 4, 0)
    with attach(model, {"a": folder}, dtype=dtype) as adapters:
        forwards = [vars(module).get("forward") for module in model.modules()]
        patches = [made.__self__ for made in forwards if made is not None]
        state = patches[0]._current.now
        sums = [state.ready[patch.path].sums for patch in patches]
        assert len(sums) == len(linears(model)) > 1
        for factor in ("A", "B"):
            held = {getattr(each, factor).untyped_storage().data_ptr() for each in sums}
            assert len(held) == 1
            assert {getattr(each, factor).dtype for each in sums} == {dtype or torch.float32}
        shared = sum(getattr(sums[0], factor).nbytes for factor in ("A", "B"))
        assert shared <= adapters.report["a"].size < 2 * shared


def test_projections_too_large_for_half_precision_stay_float32(model: Any, tmp_path: Path) -> None:
    folder = write(model, tmp_path / "a", "vera", 4, 0)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.vera_A"] *= 1e6
    save_file(tensors, path)
    with torch.no_grad(), attach(model, {"a": folder}, dtype=torch.float16):
        assert torch.isfinite(model(torch.arange(5)[None]).logits).all()


def test_what_pruning_left_nothing_of_changes_nothing(model: Any, tmp_path: Path) -> None:
    """AdaLoRA may prune a module to rank 0: its tensors are empty, and that is no fault."""
    folder = write(model, tmp_path / "a", "adalora", 4, 0)
    q = "model.layers.0.self_attn.q_proj"
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, axis in (("A", 0), ("E", 0), ("B", 1)):
        key = f"base_model.model.{q}.lora_{name}"
        tensors[key] = tensors[key].narrow(axis, 0, 0).contiguous()
    save_file(tensors, path)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["rank_pattern"] = {f"{q}.lora_E": [False] * 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    layer, x = model.get_submodule(q), torch.ones(1, 32)
    with torch.no_grad():
        plain = layer(x)
        with attach(model, {"a": folder}):
            assert torch.equal(layer(x), plain)
    config["rank_pattern"] = {}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = {f.code for f in check(folder, base=model_folder(model, tmp_path)).errors}
    assert found == {"empty-tensor"}


def model_folder(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"

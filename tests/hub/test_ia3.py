"""IA3: what it computes on every weight format, and how a file that is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
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
from adapterkit.hub.bases.base import Base
from adapterkit.hub.quant import format_of
from adapterkit.registry.errors import MismatchError

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
Make = Callable[..., Path]
LLAMA = "adapters/llama_ia3_1"
CASES = {LLAMA: "llama", "bert.ia3_cls": "bert", "t5.ia3": "t5"}
DOWN, KEY = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.k_proj"
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}
INT8 = {"load_in_8bit": True}
WEIGHTS = st.floats(-2, 2).map(lambda w: round(w, 3))


def load(folder: Path, **quantization: Any) -> Any:
    extra: dict[str, Any] = {}
    if quantization:
        config = transformers.BitsAndBytesConfig(**quantization)
        extra = {"quantization_config": config, "device_map": {"": "cpu"}}
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **extra
    ).eval()


@pytest.mark.parametrize("quantization", [{}, NF4, INT8], ids=["fp32", "nf4", "int8"])
@pytest.mark.parametrize("weight", [1, 0.5, -2])
def test_a_gain_scales_outputs_or_inputs_on_every_weight_format(
    fixtures: Path, quantization: dict[str, Any], weight: float
) -> None:
    model = load(fixtures / "bases" / "llama", **quantization)
    source = fixtures / LLAMA
    p = load_file(source / "adapter_model.safetensors")
    gains = {
        name: 1 + weight * (p[f"base_model.model.{name}.ia3_l"].flatten() - 1)
        for name in (DOWN, KEY)
    }
    down, key = model.get_submodule(DOWN), model.get_submodule(KEY)
    torch.manual_seed(0)
    x, z = torch.randn(2, 3, key.in_features), torch.randn(2, 3, down.in_features)
    with torch.no_grad():
        w = [format_of(layer).read_weight(layer) for layer in (key, down)]
        alone = key(x) * gains[KEY], down(z * gains[DOWN])
        with attach(model, {"a": source}) as adapters:
            adapters.activate({"a": weight})
            found = key(x), down(z)
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    formula = (x @ w[0].mT) * gains[KEY], (z * gains[DOWN]) @ w[1].mT
    atol = 0.2 if "load_in_8bit" in quantization else 1e-4  # int8 rounds activations as well
    torch.testing.assert_close(found, formula, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def biased() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


KINDS = ("lora", "dora", "ia3_out", "ia3_in")
MODULE = "model.layers.0.mlp.down_proj"


def write(folder: Path, kind: str, seed: int, layer: Any) -> None:
    """A PEFT folder of random tensors for one module."""
    draw = torch.Generator().manual_seed(seed)
    n_out, n_in = layer.weight.shape
    config: dict[str, Any] = {"target_modules": ["down_proj"]}
    if kind.startswith("ia3"):
        inputs = kind == "ia3_in"
        shape = (1, n_in) if inputs else (n_out, 1)
        tensors = {"ia3_l": 1 + torch.randn(shape, generator=draw) / 2}
        config |= {"peft_type": "IA3", "feedforward_modules": ["down_proj"] if inputs else []}
    else:
        tensors = {
            "lora_A.weight": torch.randn(3, n_in, generator=draw) / 4,
            "lora_B.weight": torch.randn(n_out, 3, generator=draw) / 4,
        }
        if kind == "dora":
            tensors["lora_magnitude_vector"] = 0.5 + torch.rand(n_out, generator=draw)
        config |= {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "use_dora": kind == "dora"}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    named = {f"base_model.model.{MODULE}.{key}": tensor for key, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")


def formula(layer: Any, parts: list[tuple[float, str, dict[str, Tensor]]], x: Tensor) -> Tensor:
    """rho * (W+ (p * x) + b) in float64."""
    w, b = layer.weight.detach().double(), layer.bias.detach().double()
    change, rho, p = torch.zeros_like(w), torch.ones_like(b), torch.ones(w.shape[1]).double()
    for weight, kind, stored in parts:
        t = {key.rpartition("down_proj.")[2]: tensor.double() for key, tensor in stored.items()}
        if kind == "ia3_out":
            rho = rho * (1 + weight * (t["ia3_l"].flatten() - 1))
        elif kind == "ia3_in":
            p = p * (1 + weight * (t["ia3_l"].flatten() - 1))
        else:
            delta = 2 * t["lora_B.weight"] @ t["lora_A.weight"]
            if kind == "dora":
                v = w + delta
                delta = (t["lora_magnitude_vector"] / v.norm(dim=1))[:, None] * v - w
            change = change + weight * delta
    return rho * (x.double() * p @ (w + change).mT + b)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    drawn=st.lists(
        st.tuples(st.sampled_from(KINDS), st.integers(0, 99), WEIGHTS),
        min_size=1, max_size=5, unique_by=lambda row: row[:2],
    ),
    order=st.randoms(use_true_random=False),
)  # fmt: skip
def test_a_mix_of_lora_dora_and_ia3_is_the_dense_formula_in_any_order(
    biased: Any, tmp_path: Path, drawn: list[Any], order: Any
) -> None:
    layer = biased.get_submodule(MODULE)
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(1))
    parts, weights = [], {}
    for kind, seed, weight in drawn:
        folder = tmp_path / f"{kind}{seed}"
        write(folder, kind, seed, layer)
        parts.append((weight, kind, load_file(folder / "adapter_model.safetensors")))
        weights[folder.name] = weight
    expected = formula(layer, parts, x)
    scale = expected.abs().max().clamp(min=1)
    with torch.no_grad(), attach(biased, {name: tmp_path / name for name in weights}) as adapters:
        for names in (list(weights), order.sample(list(weights), len(weights))):
            adapters.activate({name: weights[name] for name in names})
            found = layer(x).double()
            torch.testing.assert_close(found / scale, expected / scale, atol=2e-5, rtol=0)


def test_a_gain_and_a_replaced_part_act_together(fixtures: Path) -> None:
    """The head that the file brings, behind layers that its vectors scale, both halfway."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        fixtures / "bases" / "bert", dtype=torch.float32
    ).eval()
    source = fixtures / "cases" / "bert.ia3_cls" / "adapter"
    p = load_file(source / "adapter_model.safetensors")
    tokens = torch.tensor([[3, 14, 15]])
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad(), attach(model, {"a": source}) as adapters:
        adapters.activate({"a": 0.5})
        found = model(tokens).logits
    with torch.no_grad():  # halfway by hand, in the weights themselves
        for key, value in p.items():
            name = key.removeprefix("base_model.model.").removesuffix(".ia3_l")
            if not key.endswith("ia3_l"):
                model.get_parameter(name).lerp_(value, 0.5)
                continue
            layer, gain = model.get_submodule(name), 1 + 0.5 * (value - 1)
            layer.weight.mul_(gain)
            if gain.shape[0] > 1:
                layer.bias.mul_(gain.flatten())
        expected = model(tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(start["classifier.weight"], model.classifier.weight)


def errors(folder: Path, base: Base) -> Iterator[str]:
    return (str(f) for f in check(folder, base=base).errors)


@pytest.mark.parametrize("case", CASES)
def test_a_tensor_that_is_missing_renamed_or_reshaped_is_named(
    make: Make, base_of: Callable[[str], Base], case: str
) -> None:
    base, whole = base_of(CASES[case]), make(case)
    assert not [*errors(whole, base)]
    for key in load_file(whole / "adapter_model.safetensors"):
        module = key.removeprefix("base_model.model.").removesuffix(".ia3_l")

        def without(tensors: Any, key: str = key) -> None:
            del tensors[key]

        def renamed(tensors: Any, key: str = key) -> None:
            tensors[f"{key}x"] = tensors.pop(key)

        def reshaped(tensors: Any, key: str = key) -> None:
            dtype, shape, data = tensors[key]
            tensors[key] = (dtype, shape[::-1] if len(shape) > 1 else [1, *shape], data)

        assert any(module.rpartition(".")[0] in e for e in errors(make(case, without), base)), key
        assert any(f"{key}x" in e for e in errors(make(case, renamed), base)), key
        assert any(key in e for e in errors(make(case, reshaped), base)), key


def test_shape_and_feedforward_modules_must_agree(make: Make, llama: Base) -> None:
    for listed, means in ([["k_proj"], "means"], [[], "does not mean"]):
        found = [*errors(make(LLAMA, feedforward_modules=listed), llama)]
        (first,) = [e for e in found if "layers.0.mlp.down_proj.ia3_l" in e]
        assert f"feedforward_modules {listed} does not mean model.layers.0.mlp.down_proj" in first
        assert "[1, 128]" in first
        assert any(means in e for e in found)


def test_feedforward_modules_are_ends_of_names_or_a_pattern_over_whole_ones(
    make: Make, llama: Base
) -> None:
    """PEFT compares a list without a dot before it, and a string with all of the name."""
    for right in (["wn_proj"], ["layers.0.mlp.down_proj", "1.mlp.down_proj"], r".*\.down_proj"):
        assert not [*errors(make(LLAMA, feedforward_modules=right), llama)]
    for wrong in (["down"], "down_proj"):
        assert [*errors(make(LLAMA, feedforward_modules=wrong), llama)]


@pytest.mark.parametrize("unsaid", [..., None])
def test_shapes_tell_where_the_config_does_not_say(make: Make, fixtures: Path, unsaid: Any) -> None:
    model = load(fixtures / "bases" / "llama")
    tokens = torch.tensor([[3, 14, 15]])
    with torch.no_grad(), attach(model, {"a": make(LLAMA)}) as adapters:
        said = model(tokens).logits
        adapters.add("b", make(LLAMA, feedforward_modules=unsaid))
        adapters.activate(["b"])
        assert torch.equal(model(tokens).logits, said)


@pytest.mark.parametrize("wrong", [5, {"a": 1}, [""], [1]])
def test_feedforward_modules_of_another_type_are_named(make: Make, llama: Base, wrong: Any) -> None:
    found = str(check(make(LLAMA, feedforward_modules=wrong), base=llama).findings[0])
    assert "feedforward_modules is" in found


def test_a_feedforward_pattern_nobody_vetted_is_bounded(make: Make, llama: Base) -> None:
    report = check(make(LLAMA, feedforward_modules="(a+)+[", target_modules=["k_proj"]),
                   base=llama)  # fmt: skip
    assert "feedforward_modules" in str(report.findings[0])


def test_a_module_type_without_gains_is_refused(make: Make, fixtures: Path) -> None:
    model = load(fixtures / "bases" / "llama")
    with pytest.raises(MismatchError, match=r"model\.norm.*norm module"):
        attach(model, [make(LLAMA, target_modules=["down_proj", "k_proj", "v_proj", "norm"])])


@pytest.mark.parametrize(
    "weights", [{"a": 1, "b": 1}, {"a": 0.6, "b": 0.4}, {"a": 1, "b": 1, "lora": 0.5}]
)
def test_gains_multiply_and_pefts_weighted_ones_are_summed(
    fixtures: Path, weights: dict[str, float]
) -> None:
    """At weight 1 both dialects multiply, as `set_adapter([a, b])` does; at others the peft dialect
    gives what `add_weighted_adapter` makes of them."""
    model = load(fixtures / "bases" / "llama")
    sources = {name: fixtures / f"adapters/llama_ia3_{i}" for i, name in enumerate("ab", 1)}
    files = {name: load_file(sources[name] / "adapter_model.safetensors") for name in "ab"}
    sources["lora"] = fixtures / "cases/llama.lora_qv/adapter"  # not on this module
    key = f"base_model.model.{KEY}.ia3_l"
    a, b = (files[name][key].flatten() for name in "ab")
    layer = model.get_submodule(KEY)
    x = torch.randn(2, layer.in_features)
    product = (1 + weights["a"] * (a - 1)) * (1 + weights["b"] * (b - 1))
    weighted = a * b if weights["a"] == 1 else weights["a"] * a + weights["b"] * b
    with torch.no_grad():
        alone = layer(x)
        for dialect, gain in (("exact", product), ("peft", weighted)):
            with attach(model, sources, dialect=dialect) as adapters:
                adapters.activate(weights)
                torch.testing.assert_close(layer(x), alone * gain)


def test_a_transposed_linear_is_scaled_by_its_outputs_and_inputs(
    fixtures: Path, tmp_path: Path
) -> None:
    model = load(fixtures / "bases" / "gpt2")
    layers = {
        f"transformer.h.0.{name}": model.transformer.h[0].get_submodule(name)
        for name in ("attn.c_attn", "mlp.c_proj")
    }
    (n_in, n_out), (n_inner, _) = (layer.weight.shape for layer in layers.values())
    vectors = dict(zip(layers, (torch.randn(n_out, 1), torch.randn(1, n_inner)), strict=True))
    config = {
        "peft_type": "IA3",
        "target_modules": r"transformer\.h\.0\.(attn\.c_attn|mlp\.c_proj)",
        "feedforward_modules": r".*\.mlp\.c_proj",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    named = {f"base_model.model.{name}.ia3_l": vector for name, vector in vectors.items()}
    save_file(named, tmp_path / "adapter_model.safetensors")
    out, inner = layers.values()
    x, z = torch.randn(2, n_in), torch.randn(2, n_inner)
    l_out, l_in = (vector.flatten() for vector in vectors.values())
    expected = out(x) * l_out, inner(z * l_in)
    with attach(model, [tmp_path]):
        torch.testing.assert_close((out(x), inner(z)), expected)

"""Adapters that took their start out of the base: PiSSA and OLoRA, as PEFT saves them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from adapterkit.hub import attach, describe, ingest
from adapterkit.registry import Registry
from adapterkit.registry.errors import AdapterError, MismatchError

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
TOKENS = torch.arange(20).reshape(2, 10)
TARGETS = ["q_proj", "down_proj"]


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    return wide(transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | changes))))


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)
    return wide(transformers.GPT2LMHeadModel(config))


def wide(model: Any) -> Any:
    """Weights large enough to matter, and not what initialization left."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def run(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS).logits
    return found


def trained(model: Any, folder: Path, **options: Any) -> Tensor:
    """The logits of PEFT after something like a training; the adapter is saved."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | options))
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape) / 5)
        wrapped.save_pretrained(str(folder))
        expected: Tensor = wrapped(input_ids=TOKENS).logits
    return expected


@pytest.mark.parametrize("init", ["pissa", "olora", "OLoRA"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 7}}])
def test_the_logits_are_pefts(tmp_path: Path, init: str, options: dict[str, Any]) -> None:
    """PEFT changes the base when it loads such a file; here nothing is but for what is active."""
    model = llama()
    before = run(model)
    expected = trained(model, tmp_path, init_lora_weights=init, **options)
    assert not torch.allclose(before, expected, atol=1e-2)
    with attach(model, tmp_path):
        torch.testing.assert_close(run(model), expected, atol=1e-4, rtol=0)
    assert torch.equal(run(model), before)


def test_a_conv1d_is_taken_as_the_matrix_that_it_applies(tmp_path: Path) -> None:
    model = gpt2()
    expected = trained(model, tmp_path, init_lora_weights="pissa", target_modules=["c_attn"])
    with attach(model, tmp_path):
        torch.testing.assert_close(run(model), expected, atol=1e-4, rtol=0)


def test_the_file_that_peft_converts_is_the_same_adapter(tmp_path: Path) -> None:
    """Plain LoRA of twice the rank, which readers that change no base get right too."""
    peft = pytest.importorskip("peft")
    model = llama()
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa")
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(str(tmp_path / "start"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape) / 5)
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    wrapped.save_pretrained(str(tmp_path / "own"))
    wrapped.save_pretrained(
        str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    found = {}
    for name in ("own", "plain"):
        with attach(model, tmp_path / name):
            found[name] = run(model)
    assert describe(tmp_path / "own").variant == "PiSSA"
    assert describe(tmp_path / "plain").ranks == {8: 4}
    torch.testing.assert_close(found["own"], found["plain"], atol=1e-4, rtol=0)


Tensors = dict[str, Tensor]


def write(folder: Path, tensors: Mapping[str, Tensor], init: Any, **config: Any) -> Path:
    folder.mkdir()
    known = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": TARGETS}
    text = json.dumps(known | {"init_lora_weights": init} | config)
    (folder / "adapter_config.json").write_text(text)
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    return folder


def drawn(model: Any, rank: int = 3) -> Tensors:
    torch.manual_seed(1)
    tensors: Tensors = {}
    for name, layer in model.named_modules():
        if name.endswith(tuple(TARGETS)):
            n_out, n_in = layer.weight.shape
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, n_in) / 3
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(n_out, rank) / 3
    return tensors


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("weights", [{"a": 1}, {"a": -0.5, "b": 2}])
def test_weights_scale_the_whole_change(
    tmp_path: Path, init: str, weights: dict[str, float]
) -> None:
    """W + w (s B A - W0), with W0 the best approximation of rank r, or that from r columns."""
    model = llama()
    tensors = drawn(model)
    dense = copy.deepcopy(model).double()
    total = {"a": weights["a"], "b": weights.get("b", 0)}
    for name, layer in dense.named_modules():
        if not name.endswith(tuple(TARGETS)):
            continue
        w = layer.weight.data
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        if init == "pissa":
            u, s, v = torch.linalg.svd(w)
            start = u[:, :3] @ torch.diag(s[:3]) @ v[:3]
        else:  # twice the projection onto the span of the first three columns
            first = w[:, :3]
            start = 2 * first @ torch.linalg.pinv(first) @ w
        layer.weight.data = w + total["a"] * (2 * b @ a - start) + total["b"] * 2 * b @ a
    plain = write(tmp_path / "b", tensors, "gaussian")
    folders = {"a": write(tmp_path / "a", tensors, init), "b": plain}
    with attach(model, folders) as adapters:
        adapters.activate(weights)
        torch.testing.assert_close(run(model).double(), run(dense), atol=1e-4, rtol=1e-5)


def test_a_start_that_rounding_decides_is_refused(tmp_path: Path) -> None:
    """Where singular values are equal, any of their directions is as good."""
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.copy_(torch.eye(32))
    folder = write(tmp_path / "a", drawn(model), "pissa")
    with pytest.raises(MismatchError, match=r"1\.self_attn\.q_proj: .*singular values 3 and"):
        attach(model, folder)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[:, 1] = 0
    folder = write(tmp_path / "b", drawn(model), "olora")
    with pytest.raises(MismatchError, match=r"layers\.1\.self_attn\.q_proj: .*its first columns"):
        attach(model, folder)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_is_not_what_it_was_taken_out_of(
    tmp_path: Path, quantization: str
) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    config: Any = transformers.BitsAndBytesConfig
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    how = config(**(four if quantization == "nf4" else {"load_in_8bit": True}))
    small = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=how, dtype=torch.float32
    ).eval()
    with pytest.raises(MismatchError, match=f"a base that is not quantized, found {quantization}"):
        attach(small, write(tmp_path / "a", drawn(model), "pissa"))


@pytest.mark.parametrize(
    ("init", "config", "message"),
    [
        ("pissa", {"use_dora": True}, "no use_dora"),
        ("olora", {"lora_bias": True}, "no lora_bias"),
        ("pissa", {"target_parameters": ["q_proj.weight"]}, "no target_parameters"),
        ("corda", {}, "init_lora_weights 'corda' subtracts the adapter's start"),
        ("pissa_niter_4", {}, "init_lora_weights 'pissa_niter_4' subtracts"),
        ("loftq", {}, "path_initial_model_for_weight_conversion"),
        ("pissa", {"lora_use_mixer": True}, "init_lora_weights 'pissa' subtracts"),
    ],
)
def test_what_the_base_does_not_determine_is_refused_with_its_reason(
    tmp_path: Path, init: str, config: dict[str, Any], message: str
) -> None:
    model = llama()
    with pytest.raises(AdapterError, match=message):
        attach(model, write(tmp_path / "a", drawn(model), init, **config))


def test_olora_of_a_conv1d_is_refused(tmp_path: Path) -> None:
    """PEFT takes the columns of the stored matrix, which are the rows of the one it applies."""
    model = gpt2()
    name = "base_model.model.transformer.h.0.attn.c_proj"
    shapes = {"A": (3, 16), "B": (16, 3)}
    tensors = {f"{name}.lora_{x}.weight": torch.ones(shape) for x, shape in shapes.items()}
    target = r"transformer\.h\.0\.attn\.c_proj"
    with pytest.raises(MismatchError, match="one of linear for olora, found a conv1d module"):
        attach(model, write(tmp_path / "a", tensors, "olora", target_modules=target))


def beside(tmp_path: Path, init: str, **changes: Any) -> tuple[Path, Tensors, Tensors]:
    """A folder with its start inside, trained factors, and those of the start."""
    trained_, start = drawn(llama()), {key: value / 2 + 1 for key, value in drawn(llama()).items()}
    folder = write(tmp_path / "a", trained_, init)
    write(folder / f"{init}_init", start, True, **changes)
    return folder, trained_, start


@pytest.mark.parametrize("init", ["corda", "pissa_niter_4", "pissa", "lora_ga"])
def test_a_start_that_was_saved_beside_it_is_taken_out(tmp_path: Path, init: str) -> None:
    """W + s (B A - B0 A0): then nothing has to be known of how the start was made."""
    folder, tensors, start = beside(tmp_path, init)
    model = llama()
    dense = copy.deepcopy(model).double()
    for name, layer in dense.named_modules():
        if name.endswith(tuple(TARGETS)):
            a, b = (f"base_model.model.{name}.lora_{x}.weight" for x in "AB")
            change = tensors[b].double() @ tensors[a].double()
            layer.weight.data += 2 * (change - start[b].double() @ start[a].double())
    with attach(model, folder) as adapters:
        torch.testing.assert_close(run(model).double(), run(dense), atol=2e-4, rtol=1e-4)
        assert len(adapters.report[str(folder)]) == 2 * len(tensors)


def test_a_start_is_stored_with_its_adapter(tmp_path: Path) -> None:
    folder, *_ = beside(tmp_path, "corda")
    model, registry = llama(), Registry()
    ingest.add(registry, folder, "team/corda")
    with attach(model, folder):
        expected = run(model)
    with attach(model, ["team/corda"], registry=registry):
        assert torch.equal(run(model), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"lora_alpha": 3}, "lora_alpha: expected 6, found 3"), ({"r": 4}, "corda_init.*r: expected")],
)
def test_another_adapters_start_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder, *_ = beside(tmp_path, "corda", **changes)
    with pytest.raises(AdapterError, match=message):
        attach(llama(), folder)


def test_a_start_that_lacks_a_module_is_named(tmp_path: Path) -> None:
    folder, _, start = beside(tmp_path, "corda")
    gone = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    rest = {key: value for key, value in start.items() if key != gone}
    save_file(rest, folder / "corda_init" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"1\.self_attn\.q_proj: expected a tensor start_B"):
        attach(llama(), folder)

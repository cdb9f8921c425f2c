"""BitFit: plain dumps of biases, and OpenDelta's folders."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from adapterkit.hub import attach, describe, folder, ingest
from adapterkit.hub.formats import read_folder
from adapterkit.hub.sources import open_folder
from adapterkit.registry import Registry
from adapterkit.registry.errors import AdapterError, DamagedError, InvalidError, NotFoundError

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
TOKENS = torch.arange(20).reshape(2, 10) % 61
SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert() -> Any:
    config = transformers.BertConfig(**SIZES, intermediate_size=24, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def qwen2() -> Any:
    config = transformers.Qwen2Config(**SIZES, intermediate_size=24, num_key_value_heads=1)
    return transformers.Qwen2ForCausalLM(config)


def llama() -> Any:
    config = transformers.LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config)


MODELS = {"bert": bert, "gpt2": gpt2, "qwen2": qwen2, "llama": llama}


def made(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def models() -> Callable[[str], Any]:
    held = {name: made(name) for name in MODELS}
    return held.__getitem__


def run(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS).logits
    return found


Tensors = dict[str, Tensor]


def dump(model: Any, seed: int, part: str = "", head: bool = False) -> Tensors:
    """New values for the biases with `part` in their names, and for a head."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(parameter.shape, generator=draw)
        for name, parameter in model.named_parameters()
        if (name.endswith("bias") and part in name) or (head and name.startswith("classifier."))
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(
        tensors: Mapping[str, Tensor], name: str = "model.safetensors", config: Any = None
    ) -> Path:
        place = tmp_path / f"adapter{len(list(tmp_path.iterdir()))}"
        place.mkdir()
        if name.endswith(".safetensors"):
            save_file(dict(tensors), place / name)
        else:
            torch.save(dict(tensors), place / name)
        if config is not None:
            (place / "config.json").write_text(json.dumps(config))
        return place

    return make


drawn = st.lists(
    st.tuples(
        st.integers(0, 99),
        st.sampled_from(["", "0.", "1.", "attn", "dense", "ln_1", "LayerNorm", "q_proj"]),
        st.floats(-2, 2).map(lambda w: round(w, 2)).filter(bool),
    ),
    min_size=1,
    max_size=3,
)  # fmt: skip


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.sampled_from(["bert", "gpt2", "qwen2"]), rows=drawn, is_delta=st.booleans())
def test_biases_move_by_the_weighted_sum_of_their_changes(
    models: Callable[[str], Any], write: Callable[..., Path], name: str, rows: list[Any],
    is_delta: bool,
) -> None:  # fmt: skip
    """b0 + sum w_k (b_k - b0), or b0 + sum w_k d_k, on linear layers and norms; one that is in one
    dump only moves by that dump's weight."""
    model = models(name)
    state = {key: value.double() for key, value in model.state_dict().items()}
    total, folders, weights = dict(state), {}, {}
    for place, (seed, part, weight) in enumerate(rows):
        tensors = {k: v for k, v in dump(model, seed, part).items() if "classifier" not in k}
        if not tensors:
            continue
        hints = {"values": "delta"} if is_delta else {}
        folders[f"a{place}"] = folder(write(tensors), **hints)
        weights[f"a{place}"] = weight
        for key, value in tensors.items():
            change = value.double() if is_delta else value.double() - state[key]
            total[key] = total[key] + weight * change
    expected = copy.deepcopy(model).double()
    expected.load_state_dict(total)
    with attach(model, folders) as adapters:
        adapters.activate(weights)
        found = run(model).double()
    wanted = run(expected)
    scale = wanted.abs().max().clamp(min=1)
    torch.testing.assert_close(found / scale, wanted / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen2"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "bitfit.pt"])
def test_a_dump_alone_is_the_model_that_was_trained(
    models: Callable[[str], Any], write: Callable[..., Path], name: str, file: str
) -> None:
    model = models(name)
    tensors = dump(model, 1, head=True)
    trained = copy.deepcopy(model)
    trained.load_state_dict({**model.state_dict(), **tensors})
    before = run(model)
    with attach(model, [write(tensors, file)]) as adapters:
        torch.testing.assert_close(run(model), run(trained), atol=1e-5, rtol=0)
        (report,) = adapters.report.values()
        assert {row.tensor for row in report} == tensors.keys()
    assert torch.equal(run(model), before)


def test_nested_state_dicts_are_found(
    models: Callable[[str], Any], write: Callable[..., Path]
) -> None:
    model = models("gpt2")
    place = write({}, "pytorch_model.bin")
    tensors = dump(model, 1)
    torch.save({"state_dict": tensors}, place / "pytorch_model.bin")
    with attach(model, [write(tensors)]):
        expected = run(model)
    with attach(model, [place]):
        assert torch.equal(run(model), expected)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_biases_are_replaced_on_quantized_layers(
    models: Callable[[str], Any], write: Callable[..., Path], tmp_path: Path, quantization: str
) -> None:
    models("qwen2").save_pretrained(tmp_path / "base")
    config: Any = transformers.BitsAndBytesConfig
    how = config(load_in_8bit=True) if quantization == "int8" else config(load_in_4bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=how, dtype=torch.float32
    ).eval()
    tensors = dump(model, 1)
    layer, x = model.model.layers[1].self_attn.q_proj, torch.randn(4, 16)
    with torch.no_grad():
        shift = tensors["model.layers.1.self_attn.q_proj.bias"] - layer.bias
        expected = layer(x) + shift
        with attach(model, [write(tensors)]):
            torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_what_the_files_do_not_say_is_recorded_once_it_was_said(
    models: Callable[[str], Any], write: Callable[..., Path]
) -> None:
    """Without a word the tensors are new values, which is recorded too."""
    model, registry = models("gpt2"), Registry()
    tensors = dump(model, 1)
    ingest.add(registry, write(tensors), "local/plain")
    ingest.add(registry, folder(write(tensors), values="delta"), "local/moves")
    for name, values in {"local/plain": "absolute", "local/moves": "delta"}.items():
        info = describe(name, registry=registry)
        assert (info.kind, info.variant) == ("bitfit", "BitFit")
        assert info.hints["values"] == values
        assert info.hints["tensors"] == sorted(tensors)
    state = model.state_dict()
    moved = copy.deepcopy(model)
    moved.load_state_dict({**state, **{k: state[k] + v for k, v in tensors.items()}})
    with attach(model, ["local/moves"], registry=registry):
        torch.testing.assert_close(run(model), run(moved), atol=1e-5, rtol=0)


def test_a_tensor_that_went_missing_since_is_named(
    models: Callable[[str], Any], write: Callable[..., Path]
) -> None:
    """Nothing in a dump says which tensors it has to hold: the list recorded at `add` does."""
    model = models("gpt2")
    tensors = dump(model, 1)
    recorded = dict(read_folder(open_folder(write(tensors))).hints)
    gone = "transformer.h.1.mlp.c_fc.bias"
    fewer = {key: value for key, value in tensors.items() if key != gone}
    with pytest.raises(DamagedError, match=gone):
        attach(model, [folder(write(fewer), **recorded)])
    more = {**tensors, "transformer.h.7.mlp.c_fc.bias": torch.zeros(64)}
    with pytest.raises(DamagedError, match=r"transformer\.h\.7\.mlp\.c_fc\.bias"):
        attach(model, [folder(write(more), **recorded)])


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        ({"values": "relative"}, "the hint values is 'relative', expected absolute or delta"),
        ({"values": 1}, "the hint values is 1"),
        ({"tensors": "all"}, "the hint tensors is 'all', expected names"),
        ({"alpha": 1}, "hints that are not used: alpha"),
    ],
)
def test_a_hint_that_means_nothing_is_refused(
    models: Callable[[str], Any], write: Callable[..., Path], hints: dict[str, Any], message: str
) -> None:
    place = write(dump(models("gpt2"), 1))
    with pytest.raises(InvalidError, match=message):
        attach(models("gpt2"), [folder(place, **hints)])


def test_a_bias_for_a_layer_without_one_is_refused_by_name(
    models: Callable[[str], Any], write: Callable[..., Path]
) -> None:
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(AdapterError, match=f"the linear module {name} has no bias"):
        attach(models("llama"), [write({f"{name}.bias": torch.ones(16)})])


def changed(tensors: Tensors, key: str, how: str) -> Tensors:
    value, rest = tensors[key], {k: v for k, v in tensors.items() if k != key}
    if how == "renamed":
        return rest | {key.replace("dense", "dence"): value}
    values = {
        "shorter": value[:-1], "matrix": value[None], "integers": value.int(),
        "nan": value * float("nan"), "empty": value[:0],
    }  # fmt: skip
    return rest | {key: values[how].contiguous()}


@pytest.mark.parametrize("how", ["renamed", "shorter", "matrix", "integers", "nan", "empty"])
def test_a_tensor_that_is_not_a_bias_of_the_base_is_named(
    models: Callable[[str], Any], write: Callable[..., Path], how: str
) -> None:
    model = models("bert")
    key = "bert.encoder.layer.1.output.dense.bias"
    before = run(model)
    place = write(changed(dump(model, 1), key, how))
    named = key.replace("dense", "dence") if how == "renamed" else key
    with pytest.raises(AdapterError, match=named):
        attach(model, [place])
    assert torch.equal(run(model), before)


def test_half_of_a_head_is_named(models: Callable[[str], Any], write: Callable[..., Path]) -> None:
    tensors = dump(models("bert"), 1, head=True)
    del tensors["classifier.bias"]
    with pytest.raises(AdapterError, match="classifier: expected a tensor replace.bias"):
        attach(models("bert"), [write(tensors)])


def test_a_whole_model_is_not_taken_for_biases(
    models: Callable[[str], Any], write: Callable[..., Path]
) -> None:
    state = {key: value.clone() for key, value in models("qwen2").state_dict().items()}
    with pytest.raises(NotFoundError):
        attach(models("qwen2"), [write(state)])


def test_the_bias_of_a_masked_language_models_head_has_two_names(
    write: Callable[..., Path],
) -> None:
    """transformers registers it in the head and in its last layer; dumps have the shorter name."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, intermediate_size=24)
    model = transformers.BertForMaskedLM(config).eval()
    tensors = dump(model, 1)
    assert "cls.predictions.bias" in tensors
    trained = copy.deepcopy(model)
    trained.load_state_dict({**model.state_dict(), **tensors}, strict=False)
    with torch.no_grad():
        trained.cls.predictions.decoder.bias.copy_(tensors["cls.predictions.bias"])
    with attach(model, [write(tensors)]):
        torch.testing.assert_close(run(model), run(trained), atol=1e-5, rtol=0)


OPENDELTA = {
    "delta_type": "bitfit", "opendelta_version": "0.3.2", "backbone_checkpoint_name": "bert",
    "backbone_class": "BertForSequenceClassification", "backbone_hash": None,
    "common_structure": None, "exclude_modules": None, "transformers_version": "4.30.2",
    "modified_modules": ["attention.self.query", "output.dense"], "unfrozen_modules": ["deltas"],
}  # fmt: skip


def delta_dump(model: Any, seed: int = 1) -> Tensors:
    ends = ("attention.self.query.bias", "output.dense.bias")
    return {key: value for key, value in dump(model, seed).items() if key.endswith(ends)}


def test_opendeltas_folder_holds_new_values(
    models: Callable[[str], Any], write: Callable[..., Path]
) -> None:
    model = models("bert")
    tensors = delta_dump(model)
    trained = copy.deepcopy(model)
    trained.load_state_dict({**model.state_dict(), **tensors})
    place = write(tensors, "pytorch_model.bin", OPENDELTA)
    assert describe(place).task == "SEQ_CLS"
    with attach(model, [place]):
        torch.testing.assert_close(run(model), run(trained), atol=1e-5, rtol=0)


def test_opendelta_gives_a_bias_to_layers_without_one(
    models: Callable[[str], Any], write: Callable[..., Path]
) -> None:
    """To linear layers as their own, to others through a layer behind them."""
    model = models("llama")
    tensors: Tensors = {}
    for layer in range(2):
        start = f"model.layers.{layer}"
        tensors[f"{start}.self_attn.q_proj.bias"] = torch.randn(16)
        tensors[f"{start}.input_layernorm.bitfit.bias"] = torch.randn(16)
    trained = copy.deepcopy(model)
    for layer, block in enumerate(trained.model.layers):
        start = f"model.layers.{layer}"
        block.self_attn.q_proj.bias = torch.nn.Parameter(tensors[f"{start}.self_attn.q_proj.bias"])
        shift = tensors[f"{start}.input_layernorm.bitfit.bias"]
        block.input_layernorm.register_forward_hook(lambda m, x, y, d=shift: y + d)
    config = OPENDELTA | {
        "modified_modules": ["q_proj", "input_layernorm"], "backbone_class": "LlamaForCausalLM",
    }  # fmt: skip
    with attach(model, [write(tensors, "pytorch_model.bin", config)]):
        torch.testing.assert_close(run(model), run(trained), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"delta_type": "lora"}, "OpenDelta's type lora, which this version does not read"),
        ({"delta_type": None}, "OpenDelta's type None"),
        ({"modified_modules": 3}, "modified_modules is 3, expected a list of names"),
        ({"modified_modules": ["attention.self.query", "key"]}, r"layer\.0\.attention\.self\.key"),
        ({"unfrozen_modules": ["deltas", "classifier"]}, "classifier: expected a tensor"),
        ({"backbone_class": 1}, "backbone_class is 1"),
        ({"mystery": 5}, "mystery"),
    ],
)
def test_what_opendelta_says_and_the_file_lacks_is_named(
    models: Callable[[str], Any], write: Callable[..., Path], config: dict[str, Any], message: str
) -> None:
    place = write(delta_dump(models("bert")), "pytorch_model.bin", OPENDELTA | config)
    with pytest.raises(AdapterError, match=message):
        attach(models("bert"), [place])


@pytest.mark.parametrize(
    "config",
    [
        {"modified_modules": ["[r](query|output\\.dense)"]},
        {"modified_modules": ["attn", "ff"], "common_structure": True},
        {
            "modified_modules": ["attention.self", "output.dense"],
            "exclude_modules": ["key", "value"],
        },
    ],
)
def test_names_that_are_not_the_bases_ask_for_nothing(
    models: Callable[[str], Any], write: Callable[..., Path], config: dict[str, Any]
) -> None:
    place = write(delta_dump(models("bert")), "pytorch_model.bin", OPENDELTA | config)
    with attach(models("bert"), [place]):
        pass


def test_a_head_beside_differences_holds_new_values(
    models: Callable[[str], Any], write: Callable[..., Path]
) -> None:
    model = models("bert")
    tensors = dump(model, 1, head=True)
    state = model.state_dict()
    moved = {
        key: value if key.startswith("classifier.") else state[key] + value
        for key, value in tensors.items()
    }
    trained = copy.deepcopy(model)
    trained.load_state_dict({**state, **moved})
    with attach(model, [folder(write(tensors), values="delta")]):
        torch.testing.assert_close(run(model), run(trained), atol=1e-5, rtol=0)

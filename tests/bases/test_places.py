"""Every row of the places, held against a tiny model of its family and against its layer written
out by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from adapterkit.hub.bases.places import ATTENTION, CROSS, EMBEDDINGS, OUTPUT, PLACES, places
from adapterkit.hub.compose.admit import Options
from adapterkit.hub.compose.blocks import Setup
from adapterkit.hub.compose.layers import Layers
from adapterkit.hub.compose.lowering import Lowered
from adapterkit.hub.compose.model import describe_model
from adapterkit.hub.fields import Wiring
from adapterkit.hub.primitives import Bottleneck

PAGE = Path(__file__).parents[2] / "docs" / "add-a-family.md"
WIDTH = 16
SMALL = {"vocab_size": 40, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0}  # fmt: skip
DECODER = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
MOE = {**DECODER, "moe_intermediate_size": 12, "num_experts": 4, "num_local_experts": 4,
       "num_experts_per_tok": 2, "shared_expert_intermediate_size": 12}  # fmt: skip
TWO_STACKS = {"vocab_size": 40, "d_model": WIDTH, "num_layers": 2, "num_heads": 2, "d_kv": 8,
              "d_ff": 24, "decoder_start_token_id": 0}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": SMALL, "roberta": SMALL, "xlm-roberta": SMALL, "deberta-v2": SMALL,
    "electra": {**SMALL, "embedding_size": WIDTH},
    "distilbert": {"vocab_size": 40, "dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "gpt2": {"vocab_size": 40, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "llama": DECODER, "mistral": DECODER, "qwen2": DECODER, "qwen3": DECODER, "gemma": DECODER,
    "phi3": DECODER, "mixtral": MOE, "qwen2_moe": MOE, "qwen3_moe": MOE, "glm4": DECODER,
    "t5": TWO_STACKS, "mt5": TWO_STACKS,
    "bart": {"vocab_size": 40, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
             "decoder_ffn_dim": 24, "max_position_embeddings": 32},
}  # fmt: skip

WIRINGS = [
    pytest.param(Wiring(ln_before=True), id="sequential"),
    pytest.param(Wiring(parallel=True), id="parallel"),
]
# (h, x0, norm of the sum) -> what stands for h
Net = Callable[[Tensor, Tensor, Any], Tensor]
# (layer, its input, what its attention gave, the network) -> its output
Layer = Callable[[Any, Tensor, Tensor, Net], Tensor]


def bert(layer: Any, x: Tensor, attention: Tensor, net: Net) -> Tensor:
    inner, outer = layer.attention.output, layer.output
    y = inner.LayerNorm(x + net(inner.dense(attention), x, inner.LayerNorm))
    h = outer.dense(layer.intermediate(y))
    return outer.LayerNorm(y + net(h, y, outer.LayerNorm))


def distilbert(layer: Any, x: Tensor, attention: Tensor, net: Net) -> Tensor:
    y = layer.sa_layer_norm(x + net(attention, x, layer.sa_layer_norm))
    return layer.output_layer_norm(y + net(layer.ffn(y), y, layer.output_layer_norm))


def gpt2(layer: Any, x: Tensor, attention: Tensor, net: Net) -> Tensor:
    y = x + net(attention, x, None)
    return y + net(layer.mlp(layer.ln_2(y)), y, None)


def llama(layer: Any, x: Tensor, attention: Tensor, net: Net) -> Tensor:
    y = x + net(attention, x, None)
    return y + net(layer.mlp(layer.post_attention_layernorm(y)), y, None)


def glm4(layer: Any, x: Tensor, attention: Tensor, net: Net) -> Tensor:
    y = x + net(layer.post_self_attn_layernorm(attention), x, None)
    h = layer.post_mlp_layernorm(layer.mlp(layer.post_attention_layernorm(y)))
    return y + net(h, y, None)


def t5(layer: Any, x: Tensor, attention: Tensor, net: Net) -> Tensor:
    y = x + net(attention, x, None)
    block = layer.layer[-1]
    return y + net(block.DenseReluDense(block.layer_norm(y)), y, None)


def bart(layer: Any, x: Tensor, attention: Tensor, net: Net) -> Tensor:
    first, second = layer.self_attn_layer_norm, layer.final_layer_norm
    y = first(x + net(attention, x, first))
    return second(y + net(layer.fc2(layer.activation_fn(layer.fc1(y))), y, second))


# (by hand, the first layer, its attention)
BERT = (bert, "encoder.layer.0", "attention.self")
LLAMA = (llama, "layers.0", "self_attn")
BY_HAND: dict[str, tuple[Layer, str, str]] = {
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "deberta-v2", "electra"], BERT),
    "distilbert": (distilbert, "transformer.layer.0", "attention"),
    "gpt2": (gpt2, "h.0", "attn"),
    "glm4": (glm4, "layers.0", "self_attn"),
    **dict.fromkeys(["t5", "mt5"], (t5, "encoder.block.0", "layer.0.SelfAttention")),
    "bart": (bart, "encoder.layers.0", "self_attn"),
    **dict.fromkeys(["llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
                     "gemma", "phi3"], LLAMA),
}  # fmt: skip


def model_of(family: str) -> Any:
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(family, **CONFIGS[family])
    return transformers.AutoModel.from_config(config).eval()


def inputs(model: Any) -> dict[str, Tensor]:
    ids = torch.arange(1, 13).reshape(2, 6)
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :4]} if both(model) else {})}


def both(model: Any) -> bool:
    return bool(model.config.is_encoder_decoder)


def outputs(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(**inputs(model)).last_hidden_state
    return found


def networks(model: Any, names: set[str], wiring: Wiring, up: float) -> Lowered:
    """One at every place of these names; the same everywhere."""
    generator = torch.Generator().manual_seed(5)
    down = torch.randn(4, WIDTH, generator=generator)
    weights = up * torch.randn(WIDTH, 4, generator=generator)
    updates: dict[str, tuple[Bottleneck, ...]] = {}
    for found in places(describe_model(model)).values():
        if found.name in names:
            made = Bottleneck(found.place, down, weights, act="tanh", wiring=wiring)
            updates[found.layer] = (*updates.get(found.layer, ()), made)
    return Lowered(updates, ())


def switched(model: Any, lowered: Lowered) -> Layers:
    part = Layers(model, describe_model(model), Options())
    part.current.switch(part.plan(Setup({"a": 1.0}), {"a": lowered}))
    return part


def by_formula(net: Bottleneck) -> Net:
    """Formulas for h, x0 and the norm, as facts of the library, not as the engine has them."""

    def made(h: Tensor, x0: Tensor, norm: Any) -> Tensor:
        z = x0 if net.wiring.parallel else h
        if net.wiring.ln_before:
            z = h + x0 if norm is None else norm(h + x0)
        return h + torch.tanh(z @ net.down.T) @ net.up.T

    return made


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of docs/add-a-family.md, in place."""
    (block,) = re.findall(r"(?<=```python\n).*?(?=^```)", PAGE.read_text(), re.M | re.S)
    monkeypatch.setitem(PLACES, "glm4", PLACES["llama"])  # so that the page's is taken back
    exec(block, {})


def test_every_row_has_a_tiny_model_and_a_layer_by_hand() -> None:
    assert {*PLACES, "glm4"} == set(CONFIGS) == set(BY_HAND)


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize("family", CONFIGS)
def test_the_places_of_every_layer_are_modules_of_the_model(family: str) -> None:
    model = model_of(family)
    modules, found = dict(model.named_modules()), places(describe_model(model))
    kinds = [one.name for one in found.values()]
    stacks = 2 if both(model) else 1
    assert kinds.count(ATTENTION) == kinds.count(OUTPUT) == 2 * stacks
    assert kinds.count(CROSS) == 2 * (stacks - 1)
    assert kinds.count(EMBEDDINGS) == 1
    for one in found.values():
        assert {one.layer, one.place.h} <= modules.keys()
        assert {one.place.x0, one.place.norm} <= {"", *modules}
        assert one.width == WIDTH
    layers = [one.number for one in found.values() if one.name == OUTPUT]
    assert layers == list(range(2 * stacks))


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize("family", CONFIGS)
def test_a_network_that_adds_nothing_changes_nothing(family: str) -> None:
    model = model_of(family)
    before = outputs(model)
    part = switched(model, networks(model, {ATTENTION, CROSS, OUTPUT}, Wiring(), up=0.0))
    assert torch.equal(outputs(model), before)
    part.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_the_layer_is_what_its_modules_give_by_hand(family: str, wiring: Wiring) -> None:
    model = model_of(family)
    by_hand, path, attention = BY_HAND[family]
    layer = model.get_submodule(path)
    lowered = networks(model, {ATTENTION, OUTPUT}, wiring, up=0.3)
    net = next(iter(lowered.updates.values()))[0]
    assert isinstance(net, Bottleneck)
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in (("attention", layer.get_submodule(attention)), ("layer", layer)):
            stack.enter_context(Noted(module, name, seen))
        outputs(model)
        attention_output, plain = seen["attention"], seen["layer"]
        part = switched(model, lowered)
        outputs(model)
    part.remove()
    x = seen["layer input"]
    with torch.inference_mode():
        expected = by_hand(layer, x, attention_output, by_formula(net))
    torch.testing.assert_close(seen["layer"], expected, atol=1e-5, rtol=1e-5)
    assert (seen["layer"] - plain).abs().max() > 0.01


class Noted:
    """Notes a module's first input and its output."""

    def __init__(self, module: nn.Module, name: str, seen: dict[str, Tensor]) -> None:
        self._handle = module.register_forward_hook(self._note, with_kwargs=True)
        self._name, self._seen = name, seen

    def _note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._seen[f"{self._name} input"] = args[0] if args else next(iter(kwargs.values()))
        self._seen[self._name] = output[0] if isinstance(output, tuple) else output

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()


def test_a_family_without_a_row_has_no_places() -> None:
    config = transformers.AutoConfig.for_model(
        "gpt_neox", vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    assert places(describe_model(transformers.AutoModel.from_config(config))) == {}

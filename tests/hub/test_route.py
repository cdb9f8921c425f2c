"""Rows of one batch with adapters of their own: each is what it is alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_parity import CASES, DATA, INPUTS, check_logits, is_applied, logits, model_for, sources_of
from torch import Tensor, nn
from transformers import BertConfig, GptOssConfig, LlamaConfig, SwitchTransformersConfig, ViTConfig

from adapterkit.hub import attach

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
# What stands in front of the input is routed in test_route_context.py; heads of another size are
# refused, below.
CONTEXT = {"PrefixKV", "VirtualTokens"}
RESIZED = {"bert.ah_seq_bn_flex_head"}
MIXED = [case for case in CASES if case["operation"]["op"] == "mixed_batch"]


def is_kind(case: dict[str, Any]) -> bool:
    """Of one adapter on a plain base, whatever is done with it."""
    operation, load = case["operation"], case["base_load"]
    return (
        operation["op"] in ("forward", "merge")
        and len(case["adapters"]) == 1
        and is_applied(case)
        and load["dtype"] == "float32"
        and not load.get("quantization")
        and "repair_or_refuse" not in case["tags"]
        and "resize_token_embeddings" not in operation
        and case["id"] not in RESIZED
    )


def model_key(case: dict[str, Any]) -> tuple[str, str]:
    return case["base_path"], case["base_load"]["class"]


KINDS = list({case["adapters"][0]["path"]: case for case in CASES if is_kind(case)}.values())
MODELS = sorted({model_key(case) for case in KINDS})


@pytest.mark.parametrize("case", MIXED, ids=lambda case: case["id"])
def test_a_mixed_batch_has_the_logits_of_its_reference(case: dict[str, Any]) -> None:
    model = model_for(case)
    rows = [None if name == "__base__" else name for name in case["operation"]["rows"]]
    with attach(model, sources_of(case)) as adapters, adapters.routed(rows):
        check_logits(logits(model, case), case)


def inputs_of(case: dict[str, Any], rows: int) -> dict[str, Tensor]:
    """The padded inputs of the fixtures, over and over."""
    held = load_file(DATA / case["inputs"]["file"])
    made = {k: v for k, v in held.items() if k in INPUTS and k != "block_flag"}
    return {name: v[torch.arange(rows) % len(v)] for name, v in made.items()}


def of_row(inputs: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1] for name, value in inputs.items()}


def run(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(**inputs).logits
    return found


def set_active(adapters: Any, row: Any) -> None:
    adapters.activate([] if row is None else [row] if isinstance(row, str) else row)


def check_rows(model: Any, adapters: Any, rows: list[Any], inputs: Mapping[str, Tensor]) -> None:
    """And rows with adapters are not what the base gives."""
    adapters.activate([])
    base = run(model, inputs)
    with adapters.routed(rows):
        found = run(model, inputs)
    for number, row in enumerate(rows):
        set_active(adapters, row)
        expected = run(model, of_row(inputs, number))[0]
        gap = float((found[number] - expected).abs().max())
        assert gap <= 1e-5 * max(1.0, float(expected.abs().max())), (row, gap)
        # trained rows of a table change nothing where their tokens do not occur
        changes = "trainable_tokens" not in str(row)
        changes &= isinstance(row, str) or any((row or {}).values())
        assert not changes or (found[number] - base[number]).abs().max() > 1e-3, row


def every_kind(model: Any, key: tuple[str, str]) -> tuple[Any, list[str]]:
    """(the model's adapters, the names of all that need nothing in front of the input)"""
    adapters = attach(model, {})
    for case in KINDS:
        if model_key(case) == key:
            adapters.add(case["id"], next(iter(sources_of(case).values())))
    made = {
        name: {p for row in adapters.report[name] for p in row.primitive.split("+")}
        for name in adapters.names
    }
    return adapters, [name for name in adapters.names if CONTEXT.isdisjoint(made[name])]


@pytest.mark.parametrize("key", MODELS, ids=lambda key: f"{Path(key[0]).name}-{key[1]}")
def test_rows_of_all_kinds_are_what_they_are_alone(key: tuple[str, str]) -> None:
    """All adapters of the fixtures that a base takes, in one padded batch: LoRA of all sorts, DoRA,
    IA3, OFT, biases, norms, tables, heads, bottlenecks, ReFT, experts, routers."""
    case = next(case for case in KINDS if model_key(case) == key)
    model = model_for(case)
    adapters, names = every_kind(model, key)
    with adapters:
        if names:  # the last first, then every second once more: not in the order of the banks
            rows = [*reversed(names), None, *names[::2], None]
            check_rows(model, adapters, rows, inputs_of(case, len(rows)))


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
TINY: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "bert": lambda: transformers.BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        GptOssConfig(
            **SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, head_dim=8
        )
    ),
    "switch": lambda: transformers.SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_experts=2,
            num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        )
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            image_size=8, patch_size=4, num_labels=3,
        )
    ),
}  # fmt: skip
ATTENTION = ["q_proj", "v_proj"]


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    model = TINY[family]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    if model.can_generate():
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 1
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """`folder(family, config)`: an adapter with random values, saved by PEFT."""

    def make(family: str, config: Any) -> Path:
        number = len(list(tmp_path.iterdir()))
        torch.manual_seed(number)
        wrapped = peft.get_peft_model(tiny(family), config)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.3
        wrapped.save_pretrained(tmp_path / str(number))
        return tmp_path / str(number)

    return make


def lora(rank: int = 4, targets: Any = ATTENTION, **more: Any) -> Any:
    return peft.LoraConfig(r=rank, target_modules=targets, lora_alpha=8, **more)


Folder = Callable[..., Path]


def tokens(rows: int, length: int = 6, padding: str = "") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(0, rows, 2) if padding else ():
        mask[row, : 1 + row % 3] = 0
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}


# Weights of sums, repeats, the base in the middle, and neighbours of other ranks left out.
SUMS: list[Any] = [
    {"b": -0.3, "a": 0.5}, "d", None, "c", {"a": 1}, {"c": -1, "dora": 0.25}, {}, "d", "gone",
    {"lin": 2, "ia3": 0.5}, {"a": 0}, "d", {"a": 1, "b": 1, "c": 1, "d": 1}, "a",
]  # fmt: skip
RANKS = {"d": 2, "b": 8, "gone": 3, "c": 4, "a": 4}


def llama_with_sums(folder: Folder) -> tuple[Any, Any]:
    model = tiny("llama")
    adapters = attach(model, {})
    everywhere = [*ATTENTION, "k_proj", "down_proj", "lm_head", "embed_tokens"]
    for number, (name, rank) in enumerate(RANKS.items()):
        adapters.add(name, folder("llama", lora(rank, everywhere[: 2 + number])))
    adapters.add("dora", folder("llama", lora(3, use_dora=True)))
    adapters.add("ia3", folder("llama", peft.IA3Config(
        target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )))  # fmt: skip
    adapters.add("lin", folder("llama", lora(4, "all-linear", lora_bias=True, use_rslora=True)))
    adapters.remove("gone")  # its place is free, and taken by a larger one elsewhere
    adapters.add("gone", folder("llama", lora(6)))
    return model, adapters


@pytest.mark.parametrize("padding", ["", "left"])
def test_rows_take_sums_with_weights(padding: str, folder: Folder) -> None:
    model, adapters = llama_with_sums(folder)
    check_rows(model, adapters, SUMS, tokens(len(SUMS), padding=padding))
    check_rows(model, adapters, ["d", "c", "d", "c"], tokens(4, padding=padding))
    check_rows(model, adapters, ["c", "a"] * 2, tokens(4, 1))


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("key", [k for k in MODELS if "bert" not in k[0]], ids=lambda k: k[0][6:])
def test_rows_of_all_kinds_generate_what_they_generate_alone(
    key: tuple[str, str], mode: dict[str, Any]
) -> None:
    """Token by token, with the cache and beams."""
    case = next(case for case in KINDS if model_key(case) == key)
    model = model_for(case)
    adapters, names = every_kind(model, key)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with adapters:
        rows = [None, *names[::-1]]
        inputs = inputs_of(case, len(rows))
        if not model.config.is_encoder_decoder:
            inputs = {name: value.flip(1) for name, value in inputs.items()}  # padding in front
        inputs = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
        with adapters.routed(rows):
            found = model.generate(**inputs, **settings, **mode)
        for number, row in enumerate(rows):
            set_active(adapters, row)
            expected = model.generate(**of_row(inputs, number), **settings, **mode)
            assert torch.equal(found[number : number + 1], expected), row

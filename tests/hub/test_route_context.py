"""Rows of one batch behind prefixes and prompts of their own: each is what it is alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    BartConfig,
    BertConfig,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    RobertaConfig,
    T5Config,
)

from adapterkit.hub import attach

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
WINDOW = {**GROUPED, "sliding_window": 6}
TYPES = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32)
    ),
    "bloom": lambda: transformers.BloomForCausalLM(
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    ),
    "falcon": lambda: transformers.FalconForCausalLM(
        FalconConfig(**SIZES, alibi=True, multi_query=False)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(MistralConfig(**WINDOW)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        Gemma3TextConfig(**WINDOW, head_dim=8, layer_types=TYPES)
    ),
    "mpt": lambda: transformers.MptForCausalLM(
        transformers.MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4)
    ),
    "causal bert": lambda: transformers.BertLMHeadModel(BertConfig(**SIZES, is_decoder=True)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            decoder_start_token_id=0,
        )
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        BartConfig(
            vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48,
            decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4,
            max_position_embeddings=64, forced_eos_token_id=None,
        )
    ),
    "bert": lambda: transformers.BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(
        RobertaConfig(**SIZES, num_labels=3)
    ),
    "tokens": lambda: transformers.RobertaForTokenClassification(
        RobertaConfig(**SIZES, num_labels=3)
    ),
    "masked": lambda: transformers.BertForMaskedLM(BertConfig(**SIZES)),
    "llama tokens": lambda: transformers.LlamaForTokenClassification(
        LlamaConfig(**GROUPED, num_labels=3)
    ),
    "llama whole": lambda: transformers.LlamaForSequenceClassification(
        LlamaConfig(**GROUPED, num_labels=3, pad_token_id=1)
    ),
}  # fmt: skip
ENCODERS = ("bert", "roberta", "tokens", "masked")
PAIRS = ("t5", "bart")
# Modules that a LoRA, a DoRA and an IA3 act on.
TARGETS = {
    "llama": (["q_proj", "v_proj"], "down_proj"),
    "gpt2": (["c_attn"], "mlp.c_proj"),
    "opt": (["q_proj", "v_proj"], "fc2"),
    "bloom": (["query_key_value"], "dense_4h_to_h"),
    "falcon": (["query_key_value"], "dense_4h_to_h"),
    "t5": (["q", "v"], "wo"),
    "bart": (["q_proj", "v_proj"], "fc2"),
}
BERT = (["query", "value"], "attention.output.dense")
ROWS = (None, "prefix 4", "prefix 9", "prompt 3", "lora", "dora", "ia3")
PAD = 1


def make(family: str) -> Any:
    """A model with the same random weights every time, large enough to tell prefixes by."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    if model.can_generate():
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = PAD
    return model


def config_of(family: str, kind: str) -> Any:
    """PEFT's, for a name such as "prefix 4"."""
    task = "SEQ_2_SEQ_LM" if family in PAIRS else "CAUSAL_LM"
    if family in ("bert", "roberta", "llama whole"):
        task = "SEQ_CLS"
    elif family in ("tokens", "llama tokens"):
        task = "TOKEN_CLS"
    elif family == "masked":
        task = "FEATURE_EXTRACTION"
    name, _, n = kind.partition(" ")
    if n:
        made = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[name]
        return made(task_type=task, num_virtual_tokens=int(n))
    targets, last = TARGETS.get(family, BERT)
    if name == "ia3":
        every = [*targets, last]
        return peft.IA3Config(target_modules=every, feedforward_modules=[last])
    return peft.LoraConfig(r=4, target_modules=targets, use_dora=name == "dora")


Folder = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Of a family's adapter of a kind, random and saved by PEFT."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, kind: str) -> Path:
        key = family, kind
        if key not in made:
            made[key] = tmp_path_factory.mktemp("adapter")
            torch.manual_seed(len(kind))
            wrapped = peft.get_peft_model(make(family), config_of(family, kind))
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad and "score" not in name and "classifier" not in name:
                    add = torch.randn_like(parameter) * (1.0 if "prompt" in name else 0.3)
                    parameter.data += add
            wrapped.save_pretrained(made[key])
        return made[key]

    return get


def attached(family: str, folder: Folder, kinds: tuple[str | None, ...] = ROWS) -> Any:
    """(the model, its adapters, of which none is active)"""
    model = make(family)
    adapters = attach(model, {})
    for kind in dict.fromkeys(kinds):
        if kind is not None:
            adapters.add(kind, folder(family, kind))
    return model, adapters


def batch(rows: int, padding: str = "", length: int = 8) -> dict[str, Tensor]:
    """Random tokens; every second row has some padding on that side."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(0, rows, 2) if padding else ():
        n = 1 + row % 3
        part = slice(0, n) if padding == "left" else slice(length - n, length)
        mask[row, part], ids[row, part] = 0, PAD
    return {"input_ids": ids, "attention_mask": mask}


def row_of(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    return {name: value[row : row + 1] for name, value in inputs.items()}


def forward(model: Any, **more: Any) -> Any:
    if model.config.is_encoder_decoder and "labels" not in more:
        more["decoder_input_ids"] = more["input_ids"][:, :5]
    with torch.inference_mode():
        return model(**more)


def generate(model: Any, inputs: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(3)
    settings = {"max_new_tokens": 6, "do_sample": False, **more}
    return model.generate(**inputs, **settings)


def active(adapters: Any, kind: str | None) -> None:
    adapters.activate([] if kind is None else [kind])


def close(found: Tensor, expected: Tensor, inputs: dict[str, Any]) -> None:
    """At positions that are not padding."""
    mask = inputs["attention_mask"].bool()
    if found.ndim == 3 and found.shape[1] == mask.shape[1]:
        found, expected = found[mask], expected[mask]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


DECODERS = ("llama", "gpt2", "opt", "bloom", "falcon")
PADDED = [
    (family, padding)
    for family in (*DECODERS, *PAIRS, *ENCODERS)
    for padding in ("", "left", "right")
    if padding != "left" or family not in ENCODERS
]


@pytest.mark.parametrize(("family", "padding"), PADDED)
def test_each_row_is_what_it_is_alone(family: str, padding: str, folder: Folder) -> None:
    model, adapters = attached(family, folder)
    inputs = batch(len(ROWS), padding)
    base = forward(model, **inputs).logits
    with adapters.routed(list(ROWS)):
        found = forward(model, **inputs).logits
    for row, kind in enumerate(ROWS):
        active(adapters, kind)
        alone = row_of(inputs, row)
        close(found[row : row + 1], forward(model, **alone).logits, alone)
    differs = (found - base).abs().flatten(1) if found.ndim == 2 else (found - base).abs().amax(2)
    if differs.shape == inputs["attention_mask"].shape:
        differs = differs * inputs["attention_mask"]
    changed = (differs.amax(1) > 1e-3).tolist()
    assert changed == [kind is not None for kind in ROWS]


MODES = [
    {}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False},
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(("family", "padding"), [
    ("llama", "left"), ("llama", "right"), ("gpt2", "left"), ("opt", "left"), ("bloom", "left"),
    ("falcon", "left"), ("causal bert", ""), ("t5", "right"), ("bart", "right"),
])  # fmt: skip
def test_each_row_generates_what_it_generates_alone(
    family: str, padding: str, mode: dict[str, Any], folder: Folder
) -> None:
    rows = ROWS[:4] if family == "causal bert" else ROWS
    model, adapters = attached(family, folder, rows)
    inputs = batch(len(rows), padding)
    with adapters.routed(list(rows)):
        found = generate(model, inputs, **mode)
    each = mode.get("num_return_sequences", 1)
    for row, kind in enumerate(rows):
        active(adapters, kind)
        expected = generate(model, row_of(inputs, row), **mode)
        assert torch.equal(found[row * each : (row + 1) * each], expected), kind


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_sampled_tokens_come_from_what_each_row_gives_alone(family: str, folder: Folder) -> None:
    """Two sequences of each row: their logits, step by step, are those of the row alone."""
    model, adapters = attached(family, folder)
    inputs = batch(len(ROWS), "left" if family == "llama" else "right")
    more = {"do_sample": True, "top_k": 20, "num_return_sequences": 2}
    with adapters.routed(list(ROWS)):
        found = generate(model, inputs, **more, output_logits=True, return_dict_in_generate=True)
    logits = torch.stack(found.logits, dim=1)
    for number, tokens in enumerate(found.sequences):
        active(adapters, ROWS[number // 2])
        alone = row_of(inputs, number // 2)
        if family == "t5":
            made = model(**alone, decoder_input_ids=tokens[None, :-1]).logits
        else:
            mask = torch.cat([alone["attention_mask"], torch.ones(1, 6).long()], dim=1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            made = model(tokens[None], attention_mask=mask, position_ids=positions).logits[:, 7:-1]
        torch.testing.assert_close(logits[number], made[0], atol=1e-5, rtol=1e-5)

"""Rows of one batch behind prefixes and prompts of their own: each is what it is alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
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
    Qwen2MoeConfig,
    RobertaConfig,
    T5Config,
)

from adapterkit.hub import attach
from adapterkit.registry.errors import InvalidError

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
    "moe": lambda: transformers.Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **GROUPED, moe_intermediate_size=16, shared_expert_intermediate_size=48, num_experts=4,
            num_experts_per_tok=2,
        )
    ),
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
    "moe": (["shared_expert.up_proj"], "shared_expert.down_proj"),
    "t5": (["q", "v"], "wo"),
    "bart": (["q_proj", "v_proj"], "fc2"),
}
BERT = (["query", "value"], "attention.output.dense")
LLAMA = TARGETS["llama"]
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
    targets, last = TARGETS.get(
        family, LLAMA if family[:5] in ("llama", "mistr", "gemma") else BERT
    )
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


DECODERS = ("llama", "gpt2", "opt", "bloom", "falcon", "moe")
PADDED = [
    (family, padding)
    for family in (*DECODERS, "llama whole", *PAIRS, *ENCODERS)
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


def labels_of(family: str, inputs: dict[str, Any]) -> Tensor:
    """Each row another number of labels that count."""
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    if family == "bert":
        return inputs["input_ids"][:, 0] % 3
    return labels.clamp(max=2) if "tokens" in family else labels


@pytest.mark.parametrize("virtual", [False, True])
@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "t5", "bart", "bert", "tokens", "masked", "llama tokens"]
)
def test_a_loss_is_the_mean_of_what_counts_in_each_row(
    family: str, virtual: bool, folder: Folder
) -> None:
    rows = ROWS[:4]
    model = make(family)
    adapters = attach(model, {}, virtual_outputs=virtual)
    for kind in rows[1:]:
        adapters.add(str(kind), folder(family, str(kind)))
    inputs = batch(len(rows), "right")
    labels = labels_of(family, inputs)
    with adapters.routed(list(rows)):
        found = forward(model, **inputs, labels=labels).loss
    total, counts = 0.0, 0
    shifted = family in ("llama", "gpt2")
    for row, kind in enumerate(rows):
        active(adapters, kind)
        alone = row_of({**inputs, "labels": labels}, row)
        n = int((alone["labels"] != -100).sum())
        n -= int(shifted and kind != "prompt 3")  # only a virtual token foretells the first
        total, counts = total + n * float(forward(model, **alone).loss), counts + n
    assert float(found) == pytest.approx(total / counts, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt", "tokens", "masked"])
def test_virtual_outputs_stand_before_those_of_the_callers_tokens(
    family: str, folder: Folder
) -> None:
    """As many as the row has, at the end of those that the longest has."""
    rows = (None, "prompt 3", "prefix 4", "prompt 5")
    model = make(family)
    adapters = attach(model, {}, virtual_outputs=True)
    for kind in rows[1:]:
        adapters.add(str(kind), folder(family, str(kind)))
    inputs = batch(len(rows))
    with adapters.routed(list(rows)):
        found = forward(model, **inputs, output_hidden_states=True)
    assert found.logits.shape[1] == 5 + 8
    for row, (kind, n) in enumerate(zip(rows, (0, 3, 0, 5), strict=True)):
        active(adapters, kind)
        expected = forward(model, **row_of(inputs, row), output_hidden_states=True)
        pairs = [(found.logits, expected.logits)]
        pairs += zip(found.hidden_states, expected.hidden_states, strict=True)
        for mixed, alone in pairs:
            assert alone.shape[1] == n + 8
            torch.testing.assert_close(mixed[row, 5 - n :], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_vectors_positions_no_mask_and_hidden_states(family: str, folder: Folder) -> None:
    """What the caller may give and ask for otherwise."""
    rows = ROWS[:5]
    model, adapters = attached(family, folder, rows)
    ids = batch(len(rows))["input_ids"]
    more: dict[str, Any] = {"output_hidden_states": True, "return_dict": True}
    if family == "t5":
        more["decoder_input_ids"] = ids[:, :5]
    calls = [
        {"input_ids": ids},
        {"inputs_embeds": model.get_input_embeddings()(ids)},
        {"input_ids": ids, "position_ids": torch.arange(8)[None].expand(5, -1) + 2},
    ]
    for call in calls[: 2 if family == "t5" else 3]:
        with torch.inference_mode(), adapters.routed(list(rows)):
            found = model(**call, **more)
        for row, kind in enumerate(rows):
            active(adapters, kind)
            alone = {k: v[row : row + 1] for k, v in (call | more).items() if torch.is_tensor(v)}
            expected = model(**alone, output_hidden_states=True)
            torch.testing.assert_close(
                found.logits[row : row + 1], expected.logits, atol=1e-5, rtol=1e-5
            )
            name = "decoder_hidden_states" if family == "t5" else "hidden_states"
            for one, other in zip(found[name], expected[name], strict=True):
                assert one.shape[1:] == other.shape[1:]
                torch.testing.assert_close(one[row : row + 1], other, atol=1e-5, rtol=1e-5)


def test_a_row_may_have_several_and_what_is_active_otherwise_does_not_count(
    folder: Folder,
) -> None:
    model, adapters = attached("llama", folder)
    rows: list[Any] = [
        {"prefix 4": 1, "prompt 3": 1, "lora": 0.5}, {"prompt 3": 1, "prefix 9": 1, "prefix 4": 1},
        "ia3", None,
    ]  # fmt: skip
    inputs = batch(len(rows), "left")
    adapters.activate(["prefix 9"])
    with adapters.routed(rows):
        found = forward(model, **inputs).logits
        tokens = generate(model, inputs, num_beams=2)
    for row, kind in enumerate(rows):
        adapters.activate(kind if isinstance(kind, dict) else [kind] if kind else [])
        alone = row_of(inputs, row)
        close(found[row : row + 1], forward(model, **alone).logits, alone)
        assert torch.equal(tokens[row : row + 1], generate(model, alone, num_beams=2))


def test_a_sequence_goes_on_under_the_routing_that_began_it(folder: Folder) -> None:
    model, adapters = attached("llama", folder)
    inputs, rows = batch(len(ROWS)), list(ROWS)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with adapters.routed(rows):
        whole = forward(model, **inputs).logits
        cache = forward(model, input_ids=ids[:, :5], use_cache=True).past_key_values
        rest = forward(model, input_ids=ids[:, 5:], attention_mask=mask, past_key_values=cache)
    torch.testing.assert_close(rest.logits, whole[:, 5:], atol=1e-4, rtol=1e-4)
    step = {"input_ids": ids[:, :1], "past_key_values": cache}
    with adapters.routed(rows[::-1]), pytest.raises(InvalidError, match="from before the active"):
        forward(model, **step)
    with pytest.raises(InvalidError, match="from before the active"):
        forward(model, **step)
    with adapters.routed(rows[:2]), pytest.raises(InvalidError, match="2 rows are routed.* has 7"):
        forward(model, **inputs)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_sliding_window_leaves_prefixes_behind_as_it_does_alone(
    family: str, folder: Folder
) -> None:
    """Prefixes share a batch with rows that have none, and prompts do; both together only as long
    as all positions are within the window."""
    model, adapters = attached(family, folder, ROWS)
    for rows in (
        (None, "prefix 4", "prefix 9", "lora"), (None, "prompt 3", "prompt 5"),
    ):  # fmt: skip
        if "prompt 5" in rows:
            adapters.add("prompt 5", folder(family, "prompt 5"))
        inputs = batch(len(rows), "right")
        with adapters.routed(list(rows)):
            found = forward(model, **inputs).logits
            tokens = generate(model, batch(len(rows)))
        for row, kind in enumerate(rows):
            active(adapters, kind)
            alone = row_of(inputs, row)
            close(found[row : row + 1], forward(model, **alone).logits, alone)
            expected = generate(model, row_of(batch(len(rows)), row))
            assert torch.equal(tokens[row : row + 1], expected)
    far = pytest.raises(InvalidError, match=r"15 positions, but a window of 6: .*prefix")
    with adapters.routed(["prefix 4", "prompt 3"]), far:
        forward(model, **batch(2))


def test_a_gap_within_the_window_is_no_matter(folder: Folder) -> None:
    FAMILIES["wide"] = lambda: transformers.MistralForCausalLM(
        MistralConfig(**GROUPED, sliding_window=32)
    )
    rows = ("prefix 4", "prompt 3", None)
    model = make("wide")
    adapters = attach(model, {})
    for kind in rows[:2]:
        adapters.add(str(kind), folder("mistral", str(kind)))
    inputs = batch(len(rows), "left")
    with adapters.routed(list(rows)):
        found = forward(model, **inputs).logits
    for row, kind in enumerate(rows):
        active(adapters, kind)
        alone = row_of(inputs, row)
        close(found[row : row + 1], forward(model, **alone).logits, alone)


def test_distances_alone_tell_positions_too(folder: Folder) -> None:
    rows = (None, "prompt 3", "prompt 5")
    model = make("mpt")
    adapters = attach(model, {})
    for kind in rows[1:]:
        adapters.add(str(kind), folder("llama", str(kind)))
    inputs = batch(len(rows), "right")
    with adapters.routed(list(rows)):
        found = forward(model, **inputs).logits
        with pytest.raises(InvalidError, match="mpt takes no position_ids"):
            forward(model, **batch(len(rows), "left"))
    for row, kind in enumerate(rows):
        active(adapters, kind)
        alone = row_of(inputs, row)
        close(found[row : row + 1], forward(model, **alone).logits, alone)


def test_rows_of_other_lengths_are_refused_where_padding_would_count(folder: Folder) -> None:
    """Convolutions see what a mask hides; prompts of one length go together."""
    config = transformers.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"])
    model = transformers.Lfm2ForCausalLM(config).eval()
    inputs = {"input_ids": batch(2)["input_ids"], "use_cache": False}
    with attach(model, {"a": folder("llama", "prompt 3")}) as adapters:
        with adapters.routed(["a", "a"]):
            together = forward(model, **inputs).logits
        torch.testing.assert_close(together, forward(model, **inputs).logits)
        refused = pytest.raises(InvalidError, match="Lfm2Model does more than attend.*cannot share")
        with refused, adapters.routed(["a", None]):
            pass


def write_adapterhub_prefix(path: Path, places: tuple[str, ...], n: int) -> Path:
    """A prefix of AdapterHub's library for T5: n keys in every attention of these places."""
    path.mkdir()
    generator = torch.Generator().manual_seed(n)
    state = {
        f"prefix_tuning.prefix_tunings.task.{place}_prefix.control_trans": torch.randn(
            n * 2 * 2 * 32, generator=generator
        )
        for place in places
    }
    torch.save(state, path / "pytorch_adapter.bin")
    method = {
        "architecture": "prefix_tuning", "prefix_length": n, "flat": True,
        "encoder_prefix": "encoder" in places, "cross_prefix": "cross" in places,
    }  # fmt: skip
    config = {
        "config": method, "hidden_size": 32, "model_class": "T5ForConditionalGeneration",
        "model_name": "t5", "model_type": "t5", "name": "task", "version": "adapters.1.3.0",
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_prefixes_of_every_attention_of_an_encoder_decoder(
    attention: str, folder: Folder, tmp_path: Path
) -> None:
    """Those that shift positions beside those that do not, before other attentions each."""
    model = make("t5")
    model.set_attn_implementation(attention)
    adapters = attach(model, {})
    for n, places in ((3, ("self",)), (5, ("self", "encoder")), (6, ("self", "encoder", "cross"))):
        adapters.add(str(n), write_adapterhub_prefix(tmp_path / str(n), places, n))
    for kind in ROWS[1:5]:
        adapters.add(str(kind), folder("t5", str(kind)))
    rows = ("3", None, "5", "6", *ROWS[1:5])
    for padding in ("", "right"):
        inputs = batch(len(rows), padding)
        unmasked = {} if padding else {"input_ids": inputs["input_ids"]}
        call = unmasked or inputs
        with adapters.routed(list(rows)):
            found = forward(model, **call).logits
            tokens = [generate(model, inputs, **m) for m in MODES[:2] + MODES[3:]]
        for row, kind in enumerate(rows):
            active(adapters, kind)
            expected = forward(model, **row_of(call, row)).logits
            torch.testing.assert_close(found[row : row + 1], expected, atol=1e-5, rtol=1e-5)
            for mode, made in zip(MODES[:2] + MODES[3:], tokens, strict=True):
                alone = generate(model, row_of(inputs, row), **mode)
                assert torch.equal(made[row : row + 1], alone)


PROMPTS = {"prompt_tuning", "p_tuning", "p_tuning_v1"}
KINDS = {"prefix_tuning", "p_tuning_v2", "union", "reft", *PROMPTS}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("base", ["bert", "llama", "gpt2", "t5"])
def test_whatever_any_format_puts_in_front_shares_a_batch(
    base: str, gated: bool, index: dict[str, Any], fixtures: Path
) -> None:
    """Every fixture for a base, and ReFTs, which count real tokens. Gates, which are means over all
    positions, see no rows with virtual tokens."""
    cases = {
        case["id"]: case
        for case in index["cases"]
        if case["id"].startswith(f"{base}.") and case["kind"] in KINDS
        and case["operation"]["op"] == "forward"
        and not (case["kind"] in PROMPTS if gated else case["id"].endswith("unipelt"))
    }  # fmt: skip
    if not cases:
        pytest.skip(f"no fixture for {base}")
    first = next(iter(cases.values()))
    load = getattr(transformers, first["base_load"]["class"]).from_pretrained
    model = load(fixtures / first["base_path"]).eval()
    adapters = attach(model, {})
    for name, case in cases.items():
        adapters.add(name, fixtures / case["adapters"][0]["path"])
    rows = [None, *cases]
    inputs: dict[str, Any] = batch(len(rows), "right")
    for row, name in enumerate(rows):
        if name and cases[name]["kind"] == "p_tuning_v1":
            n = int(load_file(fixtures / cases[name]["inputs"]["file"])["block_flag"][0].sum())
            flags = inputs.setdefault("block_flag", torch.ones_like(inputs["input_ids"]))
            flags[row] = 0
            flags[row, :n] = 1
            with adapters.routed(rows), pytest.raises(InvalidError, match="where block_flag is 1"):
                forward(model, **batch(len(rows)))
    with adapters.routed(rows):
        found = forward(model, **inputs).logits
    for row, name in enumerate(rows):
        active(adapters, name)
        alone = row_of(inputs, row)
        close(found[row : row + 1], forward(model, **alone).logits, alone)


def test_a_gate_is_refused_beside_virtual_tokens_that_its_rows_do_not_have(
    fixtures: Path, index: dict[str, Any]
) -> None:
    gates = ("bert.ah_bn_gating", "bert.ah_lora_gating", "bert.ah_unipelt")
    paths = {c["id"]: c["adapters"][0]["path"] for c in index["cases"] if c["adapters"]}
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    adapters = attach(load(fixtures / "bases/bert").eval(), {})
    for name in (*gates, "bert.prompt_cls"):
        if name in paths:
            adapters.add(name, fixtures / paths[name])
    for name in {*adapters.names} & {*gates}:
        refused = pytest.raises(InvalidError, match=f"{name} has a gate, which is a mean")
        with refused, adapters.routed([name, "bert.prompt_cls"]):
            pass
        with adapters.routed([name, None]):
            pass
    if not {*adapters.names} & {*gates}:
        pytest.skip("no fixture has a gate")

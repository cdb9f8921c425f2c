"""Prefixes and virtual tokens on live models, against PEFT where PEFT is right."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BartConfig,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    RobertaConfig,
    T5Config,
)

from adapterkit.hub import attach
from adapterkit.registry.errors import InvalidError, MismatchError

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "mistral": lambda: transformers.MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=6)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        Gemma3TextConfig(
            **GROUPED,
            head_dim=8,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4,
            decoder_start_token_id=0,
        )
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        BartConfig(
            vocab_size=64, d_model=32, encoder_layers=3, decoder_layers=3, encoder_ffn_dim=48,
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
}  # fmt: skip
TASKS = {
    "t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS", "roberta": "SEQ_CLS",
    "tokens": "TOKEN_CLS",
}  # fmt: skip
DECODERS = ("llama", "mistral", "gemma3", "gpt2", "opt")
KINDS = ("prefix", "prompt", "p_tuning")
N = 5
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


def trained(family: str, kind: str, folder: Path, n: int = N, seed: int = 1) -> Any:
    """PEFT's model with an adapter of n virtual tokens, which is saved to the folder."""
    task = TASKS.get(family, "CAUSAL_LM")
    torch.manual_seed(seed)
    config = {
        "prefix": lambda: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=n),
        "prompt": lambda: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=n),
        "p_tuning": lambda: peft.PromptEncoderConfig(
            task_type=task, num_virtual_tokens=n, encoder_hidden_size=8
        ),
    }[kind]()
    wrapped = peft.get_peft_model(make(family), config).eval()
    wrapped.save_pretrained(folder)
    return wrapped


def batch(padding: str = "") -> dict[str, Any]:
    """Two rows of ten tokens; of the first, three are padding on that side."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 60, (2, 10), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        part = slice(0, 3) if padding == "left" else slice(7, 10)
        mask[0, part], ids[0, part] = 0, PAD
    return {"input_ids": ids, "attention_mask": mask}


def forward(model: Any, **more: Any) -> Any:
    """Inputs of an encoder-decoder need some for the decoder as well."""
    if model.config.is_encoder_decoder and "labels" not in more:
        more["decoder_input_ids"] = more["input_ids"][:, :6]
    with torch.inference_mode():
        return model(**more)


def generate(model: Any, inputs: dict[str, Any], **more: Any) -> Tensor:
    torch.manual_seed(3)
    settings = {"max_new_tokens": 8, "do_sample": False, **more}
    return model.generate(**inputs, **settings)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Any, Path]]:
    """(PEFT's model, the folder of its adapter) of a family and a kind, made once."""
    made: dict[tuple[str, str], tuple[Any, Path]] = {}

    def get(family: str, kind: str) -> tuple[Any, Path]:
        if (family, kind) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{kind}")
            made[family, kind] = trained(family, kind, folder), folder
        return made[family, kind]

    return get


Pair = Callable[[str, str], tuple[Any, Path]]


def counted(found: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Outputs at positions that are not padding; virtual ones never are."""
    mask = inputs["attention_mask"].bool()
    if found.ndim < 3 or found.shape[1] < mask.shape[1]:
        return found
    n = found.shape[1] - mask.shape[1]
    return found[torch.cat([mask.new_ones((len(mask), n)), mask], dim=1)]


# Encoders are padded on the right alone.
PADDED = [
    (family, padding)
    for family in FAMILIES
    for padding in ("", "left", "right")
    if padding != "left" or family not in ("bert", "roberta", "tokens")
]


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize(("family", "padding"), PADDED)
def test_outputs_are_those_of_peft(family: str, kind: str, padding: str, pair: Pair) -> None:
    reference, folder = pair(family, kind)
    inputs = batch(padding)
    expected = forward(reference, **inputs).logits
    model = make(family)
    with attach(model, [folder], virtual_outputs=True):
        found = forward(model, **inputs).logits
    torch.testing.assert_close(counted(found, inputs), counted(expected, inputs))
    with attach(model, [folder]):
        cut = forward(model, **inputs).logits
    torch.testing.assert_close(cut, found[:, -cut.shape[1] :])


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}], ids=str)
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", [*DECODERS, "t5", "bart"])
def test_generated_tokens_are_those_of_peft(
    family: str, kind: str, mode: dict[str, Any], pair: Pair
) -> None:
    """Longer than the sliding windows, which prefixes leave behind in PEFT as well."""
    reference, folder = pair(family, kind)
    expected = generate(reference, batch(), **mode)
    model = make(family)
    with attach(model, [folder]):
        assert torch.equal(generate(model, batch(), **mode), expected)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_row_padded_on_the_left_generates_what_it_generates_alone(
    family: str, kind: str, mode: dict[str, Any], pair: Pair
) -> None:
    """PEFT drops the positions that `generate` gives with virtual tokens, so that there it does
    not."""
    _, folder = pair(family, kind)
    inputs = batch("left")
    alone = {name: value[:1, 3:] for name, value in inputs.items()}
    model = make(family)
    with attach(model, [folder]):
        together = generate(model, inputs, **mode)[0, 10:]
        assert torch.equal(together, generate(model, alone, **mode)[0, 7:])


@pytest.mark.parametrize("padding", ["", "left"])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", [*DECODERS, "t5"])
def test_without_a_cache_the_tokens_are_the_same(
    family: str, kind: str, padding: str, pair: Pair
) -> None:
    """PEFT raises for a prefix on Llama."""
    _, folder = pair(family, kind)
    model = make(family)
    with attach(model, [folder]):
        expected = generate(model, batch(padding))
        assert torch.equal(generate(model, batch(padding), use_cache=False), expected)
        if family in ("llama", "gpt2"):
            looked_up = generate(model, one_row(batch()), prompt_lookup_num_tokens=3)
            assert torch.equal(looked_up, generate(model, one_row(batch())))


def one_row(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value[:1] for name, value in inputs.items()}


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", DECODERS)
def test_a_sequence_in_two_steps_is_the_sequence_in_one(
    family: str, kind: str, pair: Pair
) -> None:
    _, folder = pair(family, kind)
    inputs = batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    model = make(family)
    with attach(model, [folder]):
        whole = forward(model, **inputs)
        first = forward(model, input_ids=ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
        cache = copy.deepcopy(first.past_key_values)
        rest = forward(model, input_ids=ids[:, 6:], attention_mask=mask, past_key_values=cache)
    both = torch.cat([first.logits, rest.logits], dim=1)
    torch.testing.assert_close(both, whole.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert", "tokens"])
def test_the_loss_is_that_of_peft_and_of_real_positions(
    family: str, kind: str, pair: Pair
) -> None:
    reference, folder = pair(family, kind)
    inputs = batch("right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = {"bert": labels[:, 0] % 3, "tokens": labels.clamp(max=2)}.get(family, labels)
    model = make(family)
    losses = []
    for virtual in (False, True):
        with attach(model, [folder], virtual_outputs=virtual):
            losses.append(forward(model, **inputs, labels=labels).loss)
    torch.testing.assert_close(losses[0], losses[1])
    if family != "tokens" or kind == "prefix":  # PEFT has one label less than positions
        torch.testing.assert_close(losses[0], forward(reference, **inputs, labels=labels).loss)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_tokens_may_come_as_vectors_and_outputs_as_tuples(
    family: str, kind: str, pair: Pair
) -> None:
    _, folder = pair(family, kind)
    inputs = batch("right")
    model = make(family)
    with attach(model, [folder]), torch.inference_mode():
        expected = forward(model, **inputs)
        more = {"decoder_input_ids": inputs["input_ids"][:, :6]} if family == "t5" else {}
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        mask = inputs["attention_mask"]
        found = model(inputs_embeds=embeds, attention_mask=mask, return_dict=False, **more)
        assert isinstance(found, tuple)
        torch.testing.assert_close(found[0], expected.logits)
        every = model(**inputs, **more, output_hidden_states=True, output_attentions=True)
    if family == "llama":
        assert {state.shape[1] for state in every.hidden_states} == {10}
        assert {part.shape[-2] for part in every.attentions or ()} <= {10}


def test_a_model_without_a_head_returns_the_callers_positions(tmp_path: Path) -> None:
    trained("llama", "prompt", tmp_path)
    body = make("llama").model
    with attach(body, [tmp_path]), torch.inference_mode():
        assert body(**batch()).last_hidden_state.shape == (2, 10, 32)
        assert isinstance(body(**batch(), return_dict=False), tuple)


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_detach_gives_back_the_model_bit_for_bit(family: str, pair: Pair) -> None:
    model = make(family)
    expected, state = forward(model, **batch()).logits, list(model.state_dict())
    for kind in ("prefix", "prompt"):
        _, folder = pair(family, kind)
        adapters = attach(model, [folder])
        assert list(model.state_dict()) == state
        assert not torch.equal(forward(model, **batch()).logits[:, 0], expected[:, 0])
        adapters.activate({})
        assert torch.equal(forward(model, **batch()).logits, expected)
        adapters.detach()
        assert torch.equal(forward(model, **batch()).logits, expected)
    assert not [m for m in model.modules() if {"forward", "compute_bias"} & vars(m).keys()]


def test_prompts_stand_in_the_order_given(tmp_path: Path) -> None:
    """Two prompts are one prompt with the rows of both."""
    rows = []
    for name, n, seed in (("a", 3, 1), ("b", 4, 2)):
        trained("llama", "prompt", tmp_path / name, n, seed)
        rows.append(load_file(tmp_path / name / "adapter_model.safetensors")["prompt_embeddings"])
    trained("llama", "prompt", tmp_path / "both", 7)
    joined = {"prompt_embeddings": torch.cat(rows[::-1])}
    save_file(joined, tmp_path / "both" / "adapter_model.safetensors")
    model = make("llama")
    with attach(model, [tmp_path / "both"]):
        expected = forward(model, **batch()).logits
    with attach(model, {"a": tmp_path / "a", "b": tmp_path / "b"}) as adapters:
        other = forward(model, **batch()).logits
        adapters.activate(["b", "a"])
        torch.testing.assert_close(forward(model, **batch()).logits, expected)
    assert (other - expected).abs().max() > 1e-3


def test_a_prefix_a_prompt_and_a_lora_act_together(tmp_path: Path, pair: Pair) -> None:
    """As the prompt behind the prefix on a model into which the LoRA is merged."""
    torch.manual_seed(4)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    lora = peft.get_peft_model(make("llama"), config)
    lora.save_pretrained(tmp_path)
    merged = lora.merge_and_unload().eval()
    sources = [pair("llama", "prefix")[1], pair("llama", "prompt")[1]]
    with attach(merged, sources):
        expected = forward(merged, **batch()).logits
        tokens = generate(merged, batch("left"), num_beams=2)
    model = make("llama")
    with attach(model, [tmp_path, *sources]):
        torch.testing.assert_close(forward(model, **batch()).logits, expected)
        assert torch.equal(generate(model, batch("left"), num_beams=2), tokens)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_base_in_bfloat16_computes_in_bfloat16(kind: str, pair: Pair) -> None:
    _, folder = pair("llama", kind)
    model = make("llama").to(torch.bfloat16)
    wrapped = peft.PeftModel.from_pretrained(make("llama").to(torch.bfloat16), folder).eval()
    with attach(model, [folder], virtual_outputs=True):
        found = forward(model, **batch()).logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, forward(wrapped, **batch()).logits)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
def test_a_quantized_base_takes_them_too(
    bits: dict[str, bool], kind: str, pair: Pair, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    _, folder = pair("llama", kind)
    make("llama").save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(**bits)
    load = transformers.AutoModelForCausalLM.from_pretrained
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bitsandbytes, about its casts
        for wrap in (False, True):
            model = load(tmp_path, quantization_config=config, device_map="cpu").eval()
            if wrap:
                model = peft.PeftModel.from_pretrained(model, folder).eval()
                found.append(forward(model, **batch()).logits)
                continue
            with attach(model, [folder], virtual_outputs=True):
                found.append(forward(model, **batch()).logits)
    torch.testing.assert_close(found[0], found[1], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_between_none_and_all_is_refused_with_the_reason(kind: str, pair: Pair) -> None:
    _, folder = pair("llama", kind)
    model = make("llama")
    base = forward(model, **batch()).logits
    with attach(model, {"a": folder}) as adapters:
        for weight in (0.5, -1, 2):
            with pytest.raises(InvalidError, match="no weight but 0 and 1: a=.*not linear"):
                adapters.activate({"a": weight})
        adapters.activate({"a": 0})
        assert torch.equal(forward(model, **batch()).logits, base)


def test_what_cannot_be_done_is_refused_by_name(pair: Pair) -> None:
    _, folder = pair("llama", "prefix")
    model = make("llama")
    inputs = batch()
    before = forward(model, **inputs, use_cache=True).past_key_values
    with attach(model, {"a": folder}) as adapters:
        with pytest.raises(InvalidError, match="cache that grows.*found StaticLayer"):
            generate(model, inputs, cache_implementation="static")
        with pytest.raises(InvalidError, match="from before the active"):
            forward(model, **one_step(inputs), past_key_values=before)
        with pytest.raises(InvalidError, match=r"69 positions.*max_position_embeddings is 64"):
            forward(model, input_ids=torch.ones((1, 64), dtype=torch.long))
        with pytest.raises(InvalidError, match="attention_mask has 4 dimensions"):
            mask = torch.ones((2, 1, 10, 10))
            forward(model, input_ids=inputs["input_ids"], attention_mask=mask)
        with pytest.raises(InvalidError, match="attention_mask has 9 positions, expected 10"):
            forward(model, input_ids=inputs["input_ids"], attention_mask=torch.ones((2, 9)))
        after = forward(model, **inputs, use_cache=True).past_key_values
        adapters.activate({})
        with pytest.raises(InvalidError, match="from before the active"):
            forward(model, **one_step(inputs), past_key_values=after)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_prefix_is_not_lost_where_layers_leave_out_the_cache(family: str, pair: Pair) -> None:
    (_, folder), model, inputs = pair(family, "prefix"), make(family), batch("")
    with attach(model, [folder]) as adapters, torch.no_grad():
        expected = forward(model, **inputs).logits
        model.gradient_checkpointing_enable()
        assert torch.equal(forward(model, **inputs).logits, expected)
        model.train()
        with pytest.raises(InvalidError, match="gradient checkpointing leaves out the cache"):
            forward(model, **inputs)
        adapters.activate([])
        forward(model, **inputs)


def one_step(inputs: dict[str, Any]) -> dict[str, Any]:
    mask = inputs["attention_mask"]
    longer = torch.cat([mask, mask[:, :1]], dim=1)
    return {"input_ids": inputs["input_ids"][:, :1], "attention_mask": longer}


def test_rows_padded_on_the_left_are_refused_where_nothing_says_where_they_start(
    tmp_path: Path,
) -> None:
    config = transformers.MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4)
    model = transformers.MptForCausalLM(config).eval()
    trained("llama", "prompt", tmp_path)
    with attach(model, [tmp_path]):
        assert forward(model, **batch("right")).logits.shape == (2, 10, 64)
        with pytest.raises(InvalidError, match="mpt takes no position_ids"):
            forward(model, **batch("left"))


def test_an_attention_that_is_not_known_takes_no_prefix(tmp_path: Path) -> None:
    trained("llama", "prefix", tmp_path)
    config = transformers.DistilBertConfig(
        vocab_size=64, dim=32, hidden_dim=48, n_layers=3, n_heads=4
    )
    model = transformers.DistilBertForSequenceClassification(config).eval()
    with pytest.raises(MismatchError, match="the prefix: .* none that is known in this family"):
        attach(model, [tmp_path])


def test_a_prefix_for_other_heads_or_layers_is_refused(tmp_path: Path, pair: Pair) -> None:
    _, folder = pair("llama", "prefix")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "num_attention_heads": 4}))
    with pytest.raises(MismatchError, match="4 heads of keys, but the model has 2"):
        attach(make("llama"), [tmp_path])
    with pytest.raises(MismatchError, match=r"prompt_embeddings: expected shape"):
        attach(make("gpt2"), [folder])


def write_adapterhub_prefix(folder: Path, places: tuple[str, ...]) -> Path:
    """A prefix of AdapterHub's library for T5: 4 keys in every attention of these places."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    start = "prefix_tuning.prefix_tunings.task"
    state = {
        f"{start}.{place}_prefix.control_trans": torch.randn(4 * 3 * 2 * 32, generator=generator)
        for place in places
    }
    torch.save(state, folder / "pytorch_adapter.bin")
    method = {
        "architecture": "prefix_tuning", "prefix_length": 4, "flat": True,
        "encoder_prefix": "encoder" in places, "cross_prefix": "cross" in places,
    }  # fmt: skip
    config = {
        "config": method, "hidden_size": 32, "model_class": "T5ForConditionalGeneration",
        "model_name": "t5", "model_type": "t5", "name": "task", "version": "adapters.1.3.0",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_adapterhub_prefix_stands_before_all_attentions_of_t5(tmp_path: Path) -> None:
    """Each place counts, steps with a cache are those without, and beams keep their own."""
    model = make("t5")
    base = forward(model, **batch("right")).logits
    found = []
    for places in (("self",), ("self", "encoder"), ("self", "encoder", "cross")):
        folder = write_adapterhub_prefix(tmp_path / "-".join(places), places)
        with attach(model, [folder]):
            found.append(forward(model, **batch("right")).logits)
            for beams in (1, 3):
                tokens = generate(model, batch("right"), num_beams=beams)
                again = generate(model, batch("right"), num_beams=beams, use_cache=False)
                assert torch.equal(tokens, again)
    for one, other in zip([base, *found], found, strict=False):
        assert (one - other).abs().max() > 1e-3
    assert torch.equal(forward(model, **batch("right")).logits, base)
    assert not [m for m in model.modules() if {"forward", "compute_bias"} & vars(m).keys()]


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_arguments_that_the_model_would_refuse_are_refused(kind: str, pair: Pair) -> None:
    """None is dropped: too many of them, or one that is given twice."""
    _, folder = pair("llama", kind)
    model, ids = make("llama"), batch("")["input_ids"]
    with attach(model, [folder]):
        with pytest.raises(TypeError, match="positional arguments"):
            model(ids, *[None] * 30)
        with pytest.raises(TypeError, match="multiple values"):
            model(ids, input_ids=ids)

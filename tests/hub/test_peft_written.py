"""Adapters that PEFT itself writes for small models of many families: attached here, they give the
logits PEFT gives, `check` agrees from the headers, and the base comes back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from adapterkit.hub import attach, check, load
from adapterkit.registry.errors import AdapterWarning, InvalidError, MismatchError

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
VOCABULARY = 64
SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = SMALL | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ENCODER = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**DECODER),
    "llama-tied": lambda: transformers.LlamaConfig(**DECODER, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**DECODER),
    "gemma": lambda: transformers.GemmaConfig(**DECODER, head_dim=8),
    "gpt2": lambda: transformers.GPT2Config(
        **SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64
    ),
    "opt": lambda: transformers.OPTConfig(
        **SMALL, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    ),
    "roberta": lambda: transformers.RobertaConfig(**ENCODER),
}  # fmt: skip
AUTO = {
    "lm": transformers.AutoModelForCausalLM,
    "cls": transformers.AutoModelForSequenceClassification,
}
TOKENS = torch.tensor([[3, 5, 7, 9, 11, 20, 33], [40, 41, 3, 5, 60, 8, 9]])
ATTENTION = {
    "gpt2": ["c_attn"],
    "roberta": ["query", "value"],
}
TABLE = {"gpt2": "wte", "roberta": "word_embeddings"}


def attention(family: str) -> list[str]:
    return ATTENTION.get(family, ["q_proj", "v_proj"])


def lora(family: str, **settings: Any) -> Any:
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": attention(family)} | settings
    )


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, task: str) -> Path:
        if (family, task) not in made:
            torch.manual_seed(0)
            model = AUTO[task].from_config(CONFIGS[family]())
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
            model.tie_weights()
            made[family, task] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family, task])
        return made[family, task]

    return make


def model_of(base: Path, task: str, rows: int = 0) -> Any:
    model = AUTO[task].from_pretrained(base, dtype=torch.float32).eval()
    if rows:
        torch.manual_seed(1)
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def write(base: Path, task: str, config: Any, folder: Path, rows: int = 0) -> Tensor:
    """Saves an adapter of random values; the logits of the model it was saved from."""
    model = peft.get_peft_model(model_of(base, task, rows), copy.deepcopy(config)).eval()
    draw = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    found = logits(model)
    model.save_pretrained(folder)
    return found


def tokens(family: str, **settings: Any) -> Any:
    return peft.TrainableTokensConfig(
        token_indices=[3, 5, 9], target_modules=[TABLE.get(family, "embed_tokens")], **settings
    )


CASES: dict[str, tuple[Any, ...]] = {
    "all linear layers": (lora("llama", target_modules="all-linear"), "llama", "qwen2", "opt"),
    "rank by pattern": (
        lora("llama", rank_pattern={"v_proj": 2}, use_rslora=True), "llama", "gemma",
    ),
    "dora on all": (lora("llama", target_modules="all-linear", use_dora=True), "llama", "opt"),
    "dora on conv1d": (lora("gpt2", use_dora=True), "gpt2"),
    "dora on the table": (
        lora("llama", target_modules=["embed_tokens", "q_proj"], use_dora=True), "llama", "gemma",
    ),
    "head of a tied pair": (lora("llama", target_modules=["lm_head", "q_proj"]), "llama-tied"),
    "both ends tied": (
        lora("llama", target_modules=["embed_tokens"], ensure_weight_tying=True),
        "llama-tied", "gemma", "opt",
    ),
    "a norm and the head saved": (
        lora("llama", modules_to_save=["norm", "lm_head"]), "llama", "llama-tied", "qwen2",
    ),
    "a tied table saved": (
        lora("llama", modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        "llama-tied", "gemma", "opt",
    ),
    "token rows": (tokens("llama"), "llama", "llama-tied", "gemma", "opt"),
    "token rows of wte": (tokens("gpt2"), "gpt2"),
    "lora and token rows": (
        lora("llama", trainable_token_indices=[3, 5, 9]), "llama", "llama-tied", "qwen2",
    ),
    "other rows at each end": (
        lora("llama", trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [9]}),
        "llama-tied",
    ),
    "the same rows at each end": (
        lora("llama", trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [3, 5]}),
        "llama-tied",
    ),
    "all biases": (lora("llama", bias="all"), "qwen2", "opt"),
    "biases of a base without": (lora("llama", bias="lora_only"), "llama", "gemma"),
    "a bias for B": (lora("llama", lora_bias=True), "llama", "qwen2"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "family"), [(name, family) for name, row in CASES.items() for family in row[1:]]
)
def test_a_written_adapter_gives_pefts_logits(
    base_of: Callable[[str, str], Path], tmp_path: Path, case: str, family: str
) -> None:
    base = base_of(family, "lm")
    expected = write(base, "lm", CASES[case][0], tmp_path)
    model = model_of(base, "lm")
    before = logits(model)
    with attach(model, [tmp_path]):
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(model), before)
    assert check(tmp_path, base=base).verdict == "fits"


@pytest.mark.parametrize("family", ["llama", "roberta", "gpt2"])
def test_a_classifier_with_all_biases_is_that_of_peft(
    base_of: Callable[[str, str], Path], tmp_path: Path, family: str
) -> None:
    """With bias="all" PEFT also writes the insides of its wrapper around the head."""
    base = base_of(family, "cls")
    config = lora(family, task_type="SEQ_CLS", bias="all")
    expected = write(base, "cls", config, tmp_path)
    model = model_of(base, "cls")
    with attach(model, [tmp_path]) as adapters:
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
        assert {row.primitive for row in adapters.report[str(tmp_path)]} <= {
            "LowRank", "Replace", "Replace+LowRank", "copy", "unused",
        }  # fmt: skip


RESIZED: dict[str, Any] = {
    "new token rows": lora("llama", trainable_token_indices=[66, 69]),
    "tables saved": lora("llama", modules_to_save=["embed_tokens", "lm_head"]),
    "tables as they are": lora("llama"),
}


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("case", RESIZED)
def test_a_grown_vocabulary_is_loaded_with_resize(
    base_of: Callable[[str, str], Path], tmp_path: Path, case: str, family: str
) -> None:
    base = base_of(family, "lm")
    expected = write(base, "lm", RESIZED[case], tmp_path, rows=70)
    with pytest.raises(MismatchError, match="resize=True"):
        load(base, [tmp_path])
    model = load(base, [tmp_path], resize=True)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_new_rows_that_nobody_brings_are_not_left_random(
    base_of: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """PEFT saves the targeted table only: the rows of the untied head are lost without a word."""
    base = base_of("llama", "lm")
    write(base, "lm", lora("llama", target_modules=["embed_tokens"]), tmp_path, rows=70)
    with pytest.raises(MismatchError, match="lm_head would get random rows"):
        load(base, [tmp_path], resize=True)


def test_a_head_of_ones_own_is_not_mixed_with_random_values(
    base_of: Callable[[str, str], Path], tmp_path: Path
) -> None:
    base = base_of("llama", "lm")
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        write(base, "cls", lora("llama", task_type="SEQ_CLS"), folder)
    with pytest.raises(InvalidError, match=r"score .*weight 1 from one adapter"):
        load(base, {a: 0.7})
    with pytest.raises(InvalidError, match=r"score .*weight 1 from one adapter"):
        load(base, [a, b])
    torch.testing.assert_close(logits(load(base, {a: 1, b: 0})), logits(load(base, [a])))


def test_a_head_that_nobody_trained_is_mentioned_by_load(
    base_of: Callable[[str, str], Path], tmp_path: Path
) -> None:
    base = base_of("llama", "lm")
    write(base, "lm", lora("llama", task_type="CAUSAL_LM"), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"CAUSAL_LM"', '"SEQ_CLS"'))
    with pytest.warns(AdapterWarning, match="untrained-head"):
        load(base, [tmp_path])

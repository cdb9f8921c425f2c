"""The module table against the models transformers really builds, saves and loads."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapterkit.hub.bases.base import (
    CONV,
    CONV1D,
    EMBEDDING,
    EXPERTS,
    LINEAR,
    NORM,
    OTHER,
    Base,
)
from adapterkit.hub.bases.families import FAMILIES
from adapterkit.hub.bases.folder import read_base
from adapterkit.hub.bases.modules import module_table, unclaimed
from adapterkit.hub.bases.names import architectures
from adapterkit.registry.errors import MismatchError

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 40, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 4}
MOE = HEADS | {"num_experts": 3, "moe_intermediate_size": 8, "num_experts_per_tok": 1}
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 8, "patch_size": 4,
    "projection_dim": 8,
}  # fmt: skip
SEQ = {"vocab_size": 40, "d_model": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROPE = {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 0]}}
TINY: dict[str, dict[str, Any]] = {
    "llama": GROUPED, "mistral": GROUPED, "qwen2": GROUPED, "qwen3": HEADS, "gemma": HEADS,
    "gemma2": HEADS, "gemma3_text": HEADS, "phi3": GROUPED, "gpt_neox": SIZES, "bert": SIZES,
    "roberta": SIZES, "electra": SIZES | {"embedding_size": 8},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 40,
             "bos_token_id": 1, "eos_token_id": 2},
    "opt": SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 8},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40},
    "falcon": SIZES,
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "vocab_size": 40,
                   "max_position_embeddings": 32},
    "deberta-v2": SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                           "position_buckets": 4, "norm_rel_ebd": "layer_norm",
                           "share_att_key": False, "conv_kernel_size": 3},
    "t5": SEQ | {"d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4,
                 "feed_forward_proj": "gated-gelu"},
    "bart": SEQ | {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
                   "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
                   "max_position_embeddings": 32},
    "mixtral": GROUPED | {"num_local_experts": 3},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 12},
    "qwen3_moe": MOE,
    "llava": {"text_config": {"model_type": "llama"} | GROUPED, "vision_config": CLIP},
    "gemma3": {"text_config": HEADS, "mm_tokens_per_image": 4,
               "vision_config": CLIP | {"model_type": "siglip_vision_model"}},
    "qwen2_vl": {"text_config": GROUPED | ROPE, "vision_config": {
        "depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 4, "mlp_ratio": 2,
        "patch_size": 4}},
    "qwen2_5_vl": {"text_config": GROUPED | ROPE, "vision_config": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 16,
        "num_heads": 4, "patch_size": 4}},
}  # fmt: skip
CASES = [(kind, suffix) for kind in FAMILIES for suffix in architectures(kind)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder a class, made when first asked for."""
    folder = tmp_path_factory.mktemp("models")
    return _Folders(folder)


class _Folders(dict[str, Path]):
    def __init__(self, root: Path) -> None:
        self.root = root

    def __missing__(self, name: str) -> Path:
        kind, suffix = name.split()
        place = self.root / name.replace(" ", "_")
        build(kind, suffix).save_pretrained(place)
        self[name] = place
        return place


def build(kind: str, suffix: str, **changes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **(TINY[kind] | changes))
    model: PreTrainedModel = getattr(transformers, architectures(kind)[suffix])(config)
    return model


def rows_of(model: PreTrainedModel) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    """Name -> type, logical shape and whether it has a bias, of every leaf module with weights."""
    rows = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        weight = own.pop("weight", None)
        bias = own.pop("bias", None)
        if weight is not None:
            shape = tuple(weight.shape)
            kind = kind_of(module)
            shape = shape[::-1] if kind == CONV1D else shape
            rows[name] = (kind, shape, bias is not None)
        for leaf, parameter in own.items():
            kind = EXPERTS if name.endswith(".experts") else OTHER
            rows[f"{name}.{leaf}"] = (kind, tuple(parameter.shape), False)
    return rows


def kind_of(module: torch.nn.Module) -> str:
    known = (
        (torch.nn.Linear, LINEAR), (Conv1D, CONV1D), (torch.nn.Embedding, EMBEDDING),
        ((torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d), CONV),
    )  # fmt: skip
    for types, kind in known:
        if isinstance(module, types):
            return kind
    return NORM if "Norm" in type(module).__name__ else OTHER


def described(base: Base) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    return {row.name: (row.type, row.shape, row.bias is not None) for row in base.modules.values()}


def ties_of(model: PreTrainedModel) -> dict[str, str]:
    pairs = model.all_tied_weights_keys.items()
    return {a[: -len(".weight")]: b[: -len(".weight")] for a, b in pairs if a.endswith(".weight")}


@pytest.mark.parametrize(("kind", "suffix"), CASES)
def test_the_table_is_the_model_that_wrote_the_files(
    kind: str, suffix: str, saved: dict[str, Path]
) -> None:
    base = read_base(saved[f"{kind} {suffix}"])
    model = build(kind, suffix)
    assert described(base) == rows_of(model)
    assert {r.name: r.tied_to for r in base.modules.values() if r.tied_to} == ties_of(model)


@pytest.mark.parametrize(("kind", "suffix"), CASES)
def test_every_tensor_of_the_files_has_one_owner(
    kind: str, suffix: str, saved: dict[str, Path]
) -> None:
    base = read_base(saved[f"{kind} {suffix}"])
    used = [name for row in base.modules.values() for name in (*row.weight, row.bias) if name]
    assert len(used) == len(set(used))
    assert set(used) <= base.tensors.keys()
    assert unclaimed(base.config, base.tensors, base.modules) == ()


# Llama's question answering class names its body otherwise and loads none of the weights.
LOADABLE = [(k, s) for k, s in CASES if FAMILIES[k].tasks[s].prefix != "transformer"]


@pytest.mark.parametrize(("kind", "suffix"), LOADABLE)
def test_another_class_on_the_same_files_is_what_transformers_loads(
    kind: str, suffix: str, saved: dict[str, Path]
) -> None:
    main = next(iter(architectures(kind)))
    folder = saved[f"{kind} {main}"]
    compare_with_loaded(folder, kind, suffix)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_head_on_the_files_of_a_bare_model_is_what_transformers_loads(
    kind: str, saved: dict[str, Path]
) -> None:
    compare_with_loaded(saved[f"{kind} Model"], kind, next(iter(architectures(kind))))


# How files on the Hub differ from what is saved today.
OLD = [
    ("gpt2", "ForCausalLM", r"^transformer\.", "", ["h.0.attn.bias", "h.1.attn.masked_bias"]),
    ("gpt2", "Model", r"^", "transformer.", ["transformer.h.0.attn.bias"]),
    ("bert", "ForMaskedLM", r"LayerNorm\.weight", "LayerNorm.gamma", ["bert.pooler.dense.bias"]),
    ("bert", "ForMaskedLM", r"LayerNorm\.bias", "LayerNorm.beta", ["cls.seq_relationship.bias"]),
    ("bert", "ForSequenceClassification", r"^bert\.", "", ["embeddings.position_ids"]),
    ("opt", "ForCausalLM", r"^model\.", "", []),
    ("llama", "ForCausalLM", r"$", "", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
    ("llama", "ForCausalLM", r"^model\.", "", []),
    ("gpt_neox", "ForCausalLM", r"^lm_head\.", "embed_out.", ["gpt_neox.layers.0.attention.bias"]),
    ("t5", "ForConditionalGeneration", r"$", "", ["encoder.embed_tokens.weight"]),
    ("llava", "ForConditionalGeneration", r"^vision_tower\.", "vision_tower.vision_model.", []),
    ("gemma3", "ForConditionalGeneration", r"^vision_tower\.", "vision_tower.vision_model.", []),
    ("qwen2_vl", "ForConditionalGeneration", r"^model\.language_model\.", "model.", []),
    ("qwen2_5_vl", "ForConditionalGeneration", r"^model\.(?=layers)", "model.language_model.", []),
]


@pytest.mark.parametrize(("kind", "suffix", "pattern", "old", "more"), OLD)
def test_older_names_are_read_as_transformers_reads_them(
    kind: str, suffix: str, pattern: str, old: str, more: list[str], saved: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(saved[f"{kind} {suffix}"], tmp_path / "old"))
    tensors = load_file(folder / "model.safetensors")
    renamed = {re.sub(pattern, old, name): tensor for name, tensor in tensors.items()}
    shapes = {"encoder.embed_tokens.weight": tensors.get("shared.weight")}
    added = {n: torch.ones(16) if (t := shapes.get(n)) is None else t.clone() for n in more}
    save_file(renamed | added, folder / "model.safetensors", metadata={"format": "pt"})
    base = compare_with_loaded(folder, kind, suffix)
    assert set(unclaimed(base.config, base.tensors, base.modules)) <= set(more)


def test_experts_that_are_fused_on_disk_are_the_same_modules(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved["qwen3_moe ForCausalLM"], tmp_path / "fused"))
    model = build("qwen3_moe", "ForCausalLM")
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    base = compare_with_loaded(folder, "qwen3_moe", "ForCausalLM")
    assert base.modules["model.layers.1.mlp.experts.down_proj"].weight == (
        "model.layers.1.mlp.experts.down_proj",
    )


@pytest.mark.parametrize("same", [True, False])
def test_a_stored_head_is_tied_only_if_it_equals_the_embedding(
    same: bool, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved["gemma ForCausalLM"], tmp_path / "both"))
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += 0 if same else 1
    save_file(
        tensors | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    row = read_base(folder).modules["lm_head"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == same
    assert row.tied_to == ("model.embed_tokens" if tied else None)
    assert row.weight == ("lm_head.weight",)


def test_a_head_alone_is_the_source_of_its_embedding(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved["gemma ForCausalLM"], tmp_path / "head"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    base = compare_with_loaded(folder, "gemma", "ForCausalLM")
    assert base.modules["model.embed_tokens"].tied_to == "lm_head"
    assert base.modules["lm_head"].weight == ("lm_head.weight",)


def compare_with_loaded(folder: Path, kind: str, suffix: str) -> Base:
    base = read_base(folder, architecture=architectures(kind)[suffix])
    loader = getattr(transformers, architectures(kind)[suffix])
    model, info = loader.from_pretrained(folder, output_loading_info=True)
    assert described(base) == rows_of(model)
    # What it leaves uninitialised: the rows and biases without a tensor.
    absent = {
        name
        for row in base.modules.values()
        for name, key in ((f"{row.name}.weight", row.weight), (f"{row.name}.bias", row.bias))
        if not key and key is not None and not (row.tied_to and name.endswith(".weight"))
    }
    # The bias of a masked-language head is registered twice; the decoder's row stands for both.
    second = {name for name in model.all_tied_weights_keys.values() if name.endswith(".bias")}
    assert absent == set(info["missing_keys"]) - second
    return base


def test_a_class_that_would_find_none_of_its_weights_is_refused(saved: dict[str, Path]) -> None:
    """transformers starts it from random weights and only logs it."""
    with pytest.raises(MismatchError, match="LlamaForQuestionAnswering.*transformer.*model"):
        read_base(saved["llama ForCausalLM"], architecture="LlamaForQuestionAnswering")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "acme_llama", "architectures": ["AcmeLlamaForCausalLM"]}, "acme_llama"),
        ({"model_type": "llama", "architectures": ["AcmeForCausalLM"]}, "AcmeForCausalLM"),
        ({"model_type": "llama", "architectures": ["BertModel"]}, "BertModel"),
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"model_type": ["llama"]}, "llama"),
    ],
)
def test_an_unknown_family_or_class_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(MismatchError, match=named):
        module_table(config, {})


def test_every_family_is_tested() -> None:
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_config_silent_on_ties_means_what_transformers_means(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    assert FAMILIES[kind].tied == config.tie_word_embeddings

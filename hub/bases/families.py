"""What transformers builds for each `model_type`: one row a family. Names as in transformers 5.

A row says how checkpoint names become run-time names and what the header cannot tell; shapes come
from the header. A model type without a row is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adapterkit.hub.bases.tasks import (
    BART,
    BERT,
    CLASSIC,
    DEBERTA,
    DECODER,
    DISTILBERT,
    ELECTRA,
    LLAMA,
    MISTRAL,
    OPT,
    ROBERTA,
    T5,
    VISION,
    Task,
)


@dataclass(frozen=True)
class Fuse:
    """Checkpoint tensors, one or more per expert, that are one parameter at run time.
    pattern: groups 1, 2, 3 are the stem, the expert's number, the part; order: of the parts."""

    pattern: str
    target: str
    order: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """name: what class names start with. embedding: the input embedding, relative to the body.
    tied: `tie_word_embeddings` where the config is silent; always_tied: whatever the config says.
    renames: (pattern, replacement) applied in order to checkpoint names.
    ties: (module, source) inside the body that share a weight where embeddings are tied.
    layers: pattern of body names whose group 1 counts to the config's number of layers.
    older: (pattern, replacement) from run-time names to those of earlier versions of transformers.
    """

    name: str
    prefix: str
    embedding: str
    tasks: Mapping[str, Task]
    tied: bool = False
    always_tied: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    conv1d: str = ""
    routers: str = ""
    experts: tuple[Fuse, ...] = ()
    ties: tuple[tuple[str, str], ...] = ()
    layers: str = r"^(?:(?:de|en)coder\.|transformer\.)?(?:layers|layer|h)\.([0-9]{1,6})\."
    buffers: str = ""
    older: tuple[tuple[str, str], ...] = ()
    classes: Mapping[str, str] = field(default_factory=dict)


# Written by TensorFlow-era BERT conversions; transformers renames them for every model.
LEGACY = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
# Registered as parameters twice; the file keeps the shorter name.
_LM_BIAS = ((r"^cls\.predictions\.bias$", "cls.predictions.decoder.bias"),)
_SHORTER = ((r"^cls\.predictions\.decoder$", "cls.predictions"),)
_LLAVA = (
    (r"^(?:model\.)?language_model\.lm_head\.", "lm_head."),
    (r"^(?:model\.)?language_model\.model\.", "model.language_model."),
    (r"^language_model\.", "model.language_model."),
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
)
_QWEN_VL = (
    (r"^(?:model\.)?visual\.", "model.visual."),
    (r"^(?:model\.)?(?=(?:layers|embed_tokens|norm)\.)", "model.language_model."),
    (r"^language_model\.", "model.language_model."),
)


def _experts(stem: str, gate: str, up: str, down: str) -> tuple[Fuse, ...]:
    start = rf"^(.*\.{stem}\.experts)\.([0-9]{{1,6}})\."
    return (
        Fuse(rf"{start}({gate}|{up})\.weight$", "gate_up_proj", (gate, up)),
        Fuse(rf"{start}({down})\.weight$", "down_proj", (down,)),
    )


_ROUTER = r"\.mlp\.gate$"
_QWEN_EXPERTS = _experts("mlp", "gate_proj", "up_proj", "down_proj")
_WORDS = "embeddings.word_embeddings"
_SEQ_TIES = (("encoder.embed_tokens", "shared"), ("decoder.embed_tokens", "shared"))

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", "model", "embed_tokens", LLAMA),
    "mistral": Family("Mistral", "model", "embed_tokens", MISTRAL),
    "qwen2": Family("Qwen2", "model", "embed_tokens", LLAMA),
    "qwen3": Family("Qwen3", "model", "embed_tokens", LLAMA),
    "gemma": Family("Gemma", "model", "embed_tokens", DECODER, tied=True),
    "gemma2": Family("Gemma2", "model", "embed_tokens", DECODER, tied=True),
    "gemma3_text": Family(
        "Gemma3", "model", "embed_tokens", DECODER, tied=True,
        classes={
            "Model": "Gemma3TextModel",
            "ForSequenceClassification": "Gemma3TextForSequenceClassification",
            "ForTokenClassification": "",
        },
    ),
    "phi3": Family("Phi3", "model", "embed_tokens", DECODER),
    "gpt2": Family(
        "GPT2", "transformer", "wte", CLASSIC, tied=True,
        conv1d=r"\.(?:c_attn|q_attn|c_proj|c_fc)$", classes={"ForCausalLM": "GPT2LMHeadModel"},
    ),
    "gpt_neox": Family(
        "GPTNeoX", "gpt_neox", "embed_in", CLASSIC, renames=((r"^embed_out\.", "lm_head."),)
    ),
    "opt": Family(
        "OPT", "model", "decoder.embed_tokens", OPT, tied=True,
        renames=((r"^decoder\.", "model.decoder."),),
    ),
    "bloom": Family("Bloom", "transformer", "word_embeddings", CLASSIC, tied=True),
    "falcon": Family("Falcon", "transformer", "word_embeddings", CLASSIC, tied=True),
    "bert": Family("Bert", "bert", _WORDS, BERT, tied=True, renames=_LM_BIAS, older=_SHORTER),
    "roberta": Family(
        "Roberta", "roberta", _WORDS, ROBERTA, tied=True,
        renames=((r"^lm_head\.bias$", "lm_head.decoder.bias"),),
        older=((r"^lm_head\.decoder$", "lm_head"),),
    ),
    "distilbert": Family("DistilBert", "distilbert", _WORDS, DISTILBERT, tied=True),
    "electra": Family("Electra", "electra", _WORDS, ELECTRA, tied=True),
    "deberta-v2": Family(
        "DebertaV2", "deberta", _WORDS, DEBERTA, tied=True, renames=_LM_BIAS, older=_SHORTER
    ),
    "t5": Family(
        "T5", "transformer", "shared", T5, tied=True, always_tied=True, ties=_SEQ_TIES, layers=""
    ),
    "bart": Family(
        "Bart", "model", "shared", BART, tied=True, ties=_SEQ_TIES, layers="",
        buffers=r"^final_logits_bias$",
    ),
    "mixtral": Family(
        "Mixtral", "model", "embed_tokens", MISTRAL, routers=_ROUTER,
        renames=((r"\.block_sparse_moe\.", ".mlp."),), experts=_experts("mlp", "w1", "w3", "w2"),
        older=((r"\.mlp\.", ".block_sparse_moe."),),
    ),
    "qwen2_moe": Family(
        "Qwen2Moe", "model", "embed_tokens", MISTRAL, routers=_ROUTER, experts=_QWEN_EXPERTS
    ),
    "qwen3_moe": Family(
        "Qwen3Moe", "model", "embed_tokens", LLAMA, routers=_ROUTER, experts=_QWEN_EXPERTS
    ),
    "llava": Family(
        "Llava", "model", "language_model.embed_tokens", VISION, renames=_LLAVA, layers=""
    ),
    "gemma3": Family(
        "Gemma3", "model", "language_model.embed_tokens", VISION, tied=True, renames=_LLAVA,
        layers="",
    ),
    "qwen2_vl": Family(
        "Qwen2VL", "model", "language_model.embed_tokens", VISION, renames=_QWEN_VL, layers=""
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VL", "model", "language_model.embed_tokens", VISION, renames=_QWEN_VL, layers=""
    ),
}  # fmt: skip

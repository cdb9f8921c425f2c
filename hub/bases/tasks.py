"""The classes transformers has for each family, by task: which heads, named how, of which sizes."""

from __future__ import annotations

from dataclasses import dataclass

from adapterkit.hub.bases.base import LINEAR, NORM


@dataclass(frozen=True)
class Head:
    """A module that only some tasks have, with the shape it gets when the checkpoint lacks it.

    rows, cols: a number, or "labels", "vocab", "hidden", "embed" (width of the input embedding).
    inside: it lies in the body (a pooler), so it carries the body's prefix.
    tied: it shares the input embedding's weight where the config ties embeddings.
    """

    name: str
    rows: str | int
    cols: str | int = "hidden"
    bias: bool = False
    type: str = LINEAR
    inside: bool = False
    tied: bool = False


@dataclass(frozen=True)
class Task:
    """One model class of a family. prefix: of the body, None for the family's own.
    drop: pattern of body names this class does not have."""

    heads: tuple[Head, ...] = ()
    prefix: str | None = None
    drop: str = ""


BARE = Task(prefix="")
LM_HEAD = Head("lm_head", "vocab", "embed", tied=True)
SCORE = Head("score", "labels")
CLASSIFIER = Head("classifier", "labels", bias=True)
ANSWERS = Head("qa_outputs", 2, bias=True)
POOLER = Head("pooler.dense", "hidden", bias=True, inside=True)
NO_POOLER = r"^pooler\."

DECODER = {
    "ForCausalLM": Task((LM_HEAD,)),
    "Model": BARE,
    "ForSequenceClassification": Task((SCORE,)),
    "ForTokenClassification": Task((Head("score", "labels", bias=True),)),
}
# Llama's generic question answering model calls its body `transformer`.
LLAMA = DECODER | {"ForQuestionAnswering": Task((ANSWERS,), prefix="transformer")}
MISTRAL = DECODER | {"ForQuestionAnswering": Task((ANSWERS,))}
CLASSIC = DECODER | {
    "ForTokenClassification": Task((CLASSIFIER,)),
    "ForQuestionAnswering": Task((ANSWERS,)),
}
OPT = {
    "ForCausalLM": Task((LM_HEAD,)),
    "Model": BARE,
    "ForSequenceClassification": Task((Head("score", "labels", "embed"),)),
    "ForQuestionAnswering": Task((Head("qa_outputs", 2, "embed", bias=True),)),
}

_PREDICTIONS = (
    Head("cls.predictions.transform.dense", "hidden", bias=True),
    Head("cls.predictions.transform.LayerNorm", "hidden", bias=True, type=NORM),
    Head("cls.predictions.decoder", "vocab", "embed", bias=True, tied=True),
)
_ROBERTA_LM = (
    Head("lm_head.dense", "hidden", bias=True),
    Head("lm_head.layer_norm", "hidden", bias=True, type=NORM),
    Head("lm_head.decoder", "vocab", "embed", bias=True, tied=True),
)
_TWO_LAYERS = (
    Head("classifier.dense", "hidden", bias=True),
    Head("classifier.out_proj", "labels", bias=True),
)
BERT = {
    "ForMaskedLM": Task(_PREDICTIONS, drop=NO_POOLER),
    "LMHeadModel": Task(_PREDICTIONS, drop=NO_POOLER),
    "ForPreTraining": Task(
        (POOLER, *_PREDICTIONS, Head("cls.seq_relationship", 2, bias=True)),
    ),
    "Model": Task((POOLER,), prefix=""),
    "ForSequenceClassification": Task((POOLER, CLASSIFIER)),
    "ForTokenClassification": Task((CLASSIFIER,), drop=NO_POOLER),
    "ForQuestionAnswering": Task((ANSWERS,), drop=NO_POOLER),
    "ForMultipleChoice": Task((POOLER, Head("classifier", 1, bias=True))),
}
ROBERTA = {
    "ForMaskedLM": Task(_ROBERTA_LM, drop=NO_POOLER),
    "ForCausalLM": Task(_ROBERTA_LM, drop=NO_POOLER),
    "Model": Task((POOLER,), prefix=""),
    "ForSequenceClassification": Task(_TWO_LAYERS, drop=NO_POOLER),
    "ForTokenClassification": Task((CLASSIFIER,), drop=NO_POOLER),
    "ForQuestionAnswering": Task((ANSWERS,), drop=NO_POOLER),
    "ForMultipleChoice": Task((POOLER, Head("classifier", 1, bias=True))),
}
DISTILBERT = {
    "ForMaskedLM": Task(
        (
            Head("vocab_transform", "hidden", bias=True),
            Head("vocab_layer_norm", "hidden", bias=True, type=NORM),
            Head("vocab_projector", "vocab", "embed", bias=True, tied=True),
        )
    ),
    "Model": BARE,
    "ForSequenceClassification": Task((Head("pre_classifier", "hidden", bias=True), CLASSIFIER)),
    "ForTokenClassification": Task((CLASSIFIER,)),
    "ForQuestionAnswering": Task((ANSWERS,)),
}
_GENERATOR = (
    Head("generator_predictions.LayerNorm", "embed", bias=True, type=NORM),
    Head("generator_predictions.dense", "embed", "hidden", bias=True),
    Head("generator_lm_head", "vocab", "embed", bias=True, tied=True),
)
ELECTRA = {
    "ForPreTraining": Task(
        (
            Head("discriminator_predictions.dense", "hidden", bias=True),
            Head("discriminator_predictions.dense_prediction", 1, bias=True),
        )
    ),
    "ForMaskedLM": Task(_GENERATOR),
    "ForCausalLM": Task(_GENERATOR),
    "Model": BARE,
    "ForSequenceClassification": Task(_TWO_LAYERS),
    "ForTokenClassification": Task((CLASSIFIER,)),
    "ForQuestionAnswering": Task((ANSWERS,)),
}
DEBERTA = {
    "ForMaskedLM": Task(_PREDICTIONS),
    "Model": BARE,
    "ForSequenceClassification": Task((Head("pooler.dense", "hidden", bias=True), CLASSIFIER)),
    "ForTokenClassification": Task((CLASSIFIER,)),
    "ForQuestionAnswering": Task((ANSWERS,)),
}
_SEQ_HEAD = (
    Head("classification_head.dense", "hidden", bias=True),
    Head("classification_head.out_proj", "labels", bias=True),
)
NO_DECODER = r"^decoder\."
T5 = {
    "ForConditionalGeneration": Task((LM_HEAD,), prefix=""),
    "Model": BARE,
    "EncoderModel": Task(prefix="", drop=NO_DECODER),
    "ForSequenceClassification": Task(_SEQ_HEAD),
    "ForTokenClassification": Task((CLASSIFIER,), drop=NO_DECODER),
    "ForQuestionAnswering": Task((ANSWERS,), prefix=""),
}
BART = {
    "ForConditionalGeneration": Task((LM_HEAD,)),
    "Model": BARE,
    "ForSequenceClassification": Task(_SEQ_HEAD),
    "ForQuestionAnswering": Task((ANSWERS,)),
}
VISION = {"ForConditionalGeneration": Task((LM_HEAD,)), "Model": BARE}

"""Where a head of several layers can stand: one row for each family and task, names as in
transformers 5. What has no row is refused, never guessed."""

from __future__ import annotations

from adapterkit.hub.fields import Seat

SEQUENCE, TOKENS, ANSWERS = "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"
_EACH = Seat("classifier", "classifier")
_TWO_LAYERS = Seat("classifier.out_proj", "classifier", first=True)
_QA = Seat("qa_outputs", "qa_outputs")
_ENCODER = {SEQUENCE: _TWO_LAYERS, TOKENS: _EACH, ANSWERS: _QA}
# A decoder's head sees every token; its class then takes the last one.
_DECODER = {SEQUENCE: Seat("score", "score")}
SEATS: dict[str, dict[str, Seat]] = {
    "bert": _ENCODER | {SEQUENCE: Seat("classifier", "classifier", pooler="bert.pooler")},
    "roberta": _ENCODER,
    "xlm-roberta": _ENCODER,
    "electra": _ENCODER,
    "distilbert": {TOKENS: _EACH, ANSWERS: _QA},
    "gpt2": _DECODER,
    "llama": _DECODER,
    "mistral": _DECODER,
}


def seat(model_type: str, task: str) -> Seat | None:
    return SEATS.get(model_type, {}).get(task)

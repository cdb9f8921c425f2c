"""The heads of AdapterHub's classes with flexible heads: `heads.NAME.i`, a list of layers.
adapters 1.3 `heads/base.py` (PredictionHead)."""

from __future__ import annotations

from collections.abc import Mapping

from adapterkit.hub.bases.outputs import ANSWERS, SEQUENCE, TOKENS, seat
from adapterkit.hub.fields import HEAD, HeadFields
from adapterkit.hub.findings import ERROR, Finding
from adapterkit.hub.formats.adapterhub_bottleneck import activation
from adapterkit.hub.formats.adapterhub_keys import Keys
from adapterkit.hub.formats.adapterhub_type import Outer
from adapterkit.hub.formats.config import ConfigReader, unknown_fields, unsupported
from adapterkit.hub.headers import Stored

TYPES = {
    "classification": SEQUENCE,
    "multilabel_classification": SEQUENCE,
    "tagging": TOKENS,
    "question_answering": ANSWERS,
}
KNOWN = frozenset(
    ["head_type", "num_labels", "layers", "activation_function", "use_pooler", "bias"]
)
INERT = frozenset(["label2id", "dropout_prob"])
MAX_LAYERS, MAX_LABELS = 16, 1 << 20


def task_of(reader: ConfigReader) -> str | None:
    kind = reader.config.get("head_type")
    return TYPES.get(kind) if isinstance(kind, str) else None


def read_flexible(
    tensors: Mapping[str, Stored], reader: ConfigReader, outer: Outer, name: str
) -> tuple[Keys, HeadFields | None]:
    """Its tensors, and what is made of them; None where there is no place for such a head."""
    found, task = Keys(), task_of(reader)
    place = seat(outer.model_type, task) if task is not None else None
    if task is None or place is None:
        why = f"a head of type {reader.config.get('head_type')!r} on {outer.model_type}"
        found.strays += list(tensors)
        found.findings += [unsupported(key, why) for key in tensors]
        return found, None
    layers = reader.count("layers", 1, MAX_LAYERS)
    given = reader.config.get("activation_function") is not None
    act = activation(reader, "activation_function", None) if given else None
    bias = reader.config.get("bias") is None or reader.flag("bias")
    pools = reader.flag("use_pooler")
    labels = reader.count("num_labels", 2, MAX_LABELS)
    found.findings += unknown_fields(reader.config, KNOWN | INERT, ())[1]
    if pools and task == SEQUENCE and place.first:
        about = f"the pooler, which {outer.model_type} has none of for this task"
        found.findings.append(unsupported("use_pooler", about))
    _place(tensors, found, name, place.leaf, (layers, 3 if given else 2))
    fields = HeadFields(place, labels, layers, act, bias, pools or not place.pooler)
    return found, fields


def _place(
    tensors: Mapping[str, Stored], found: Keys, name: str, leaf: str, layout: tuple[int, int]
) -> None:
    """layout: number of layers, and of modules that each is: dropout, linear, activation."""
    layers, step = layout
    numbers = {str(1 + layer * step): layer for layer in range(layers)}
    for key, stored in tensors.items():
        head, own, number, part = (*key.split("."), "", "", "", "")[:4]
        right = head == "heads" and own == name and key.count(".") == 3
        if right and number in numbers and part in ("weight", "bias"):
            found.put((leaf, f"{HEAD}{numbers[number]}.{part}"), stored, repeated=False)
        else:
            found.strays.append(key)
            want = f"a layer of the head {name}"
            found.findings.append(Finding(ERROR, "unexpected-tensor", key, want, "another name"))

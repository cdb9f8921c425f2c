"""The head that AdapterHub saves beside an adapter: `head_config.json` and a file of weights.

A model class with one fixed head writes it under the names of its modules; the classes with
flexible heads (`...AdapterModel`) as a list of layers, `heads.NAME.0.weight`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterkit.hub.fields import HEAD, HeadFields
from adapterkit.hub.findings import ERROR, INFO, Finding, clean
from adapterkit.hub.formats.adapterhub_flexible import read_flexible
from adapterkit.hub.formats.adapterhub_flexible import task_of as flexible_task
from adapterkit.hub.formats.adapterhub_keys import Keys
from adapterkit.hub.formats.adapterhub_type import Outer, Place, split
from adapterkit.hub.formats.config import ConfigReader, unknown_fields
from adapterkit.hub.formats.files import weights_of
from adapterkit.hub.headers import Stored
from adapterkit.hub.sources import Folder, read_object
from adapterkit.hub.task import ENDS
from adapterkit.registry.errors import DamagedError

CONFIG = "head_config.json"
WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")
FLEXIBLE = "heads."
KNOWN = frozenset(
    ["config", "hidden_size", "label2id", "model_class", "model_name", "model_type", "name",
     "num_labels", "version"]
)  # fmt: skip
# A buffer of BART's, which nobody trains.
LOGITS_BIAS = "final_logits_bias"
# A language model's bias is a parameter of the head and of the last layer in it.
SHARED_BIAS = {
    "cls.predictions.bias": "cls.predictions.decoder.bias",
    "lm_head.bias": "lm_head.decoder.bias",
}


@dataclass(frozen=True)
class Head:
    """tensors: places in the base. modules: those it replaces. files: path -> role of those it was
    read from. task: what models of its class do. fields: what is made of a flexible one.
    others: tensors of the adapter among those of the head."""

    tensors: Mapping[Place, Stored] = field(default_factory=dict)
    strays: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    task: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    fields: HeadFields | None = None
    others: Mapping[str, Stored] = field(default_factory=dict)

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(sorted({m for m, role in self.tensors if not role.startswith(HEAD)}))


def read_head(folder: Folder, outer: Outer, allowed: Collection[str]) -> Head:
    """Raises DamagedError if there is one half of it, or what it says is malformed."""
    if not any(name in folder.files for name in (CONFIG, *WEIGHTS)):
        return Head(task=task_of(outer.model_class))
    weights = weights_of(folder, WEIGHTS)
    model_class, findings = outer.model_class, list(weights.findings)
    config: Mapping[str, Any] = {}
    files = {weights.path: "head"}
    if CONFIG in folder.files:
        where = f"{folder.name}/{CONFIG}"
        config = read_object(folder.files[CONFIG], where)
        model_class, said = _described(config, where, outer)
        findings += unknown_fields(config, KNOWN, allowed)[1]
        findings += said
        files[CONFIG] = "head-config"
    tensors = dict(weights.header.tensors)
    # of a family whose body has no name, the library takes parts of the adapter for its head's
    mine = {key: tensors.pop(key) for key in list(tensors) if split(key, outer.name)}
    flexible = {key: t for key, t in tensors.items() if key.startswith(FLEXIBLE)}
    keys = _keys({key: t for key, t in tensors.items() if key not in flexible})
    own, fields, task = _flexible(flexible, config, folder.name, outer)
    return Head(
        {**keys.tensors, **own.tensors},
        (*own.strays, *keys.strays),
        (*findings, *own.findings, *keys.findings),
        task or task_of(model_class),
        files,
        fields,
        mine,
    )


def _flexible(
    tensors: Mapping[str, Stored], config: Mapping[str, Any], name: str, outer: Outer
) -> tuple[Keys, HeadFields | None, str | None]:
    """Its tensors, what is made of them, and the task it is for."""
    if not tensors:
        return Keys(), None, None
    inner = config.get("config")
    reader = ConfigReader(inner if isinstance(inner, dict) else {}, f"{name}/{CONFIG}")
    own = config.get("name")
    found, fields = read_flexible(tensors, reader, outer, own if isinstance(own, str) else "")
    reader.done()
    return found, fields, flexible_task(reader)


def task_of(model_class: str | None) -> str | None:
    """What models of this class do, in the words of PEFT's `task_type`."""
    for task, ends in ENDS.items():
        if model_class is not None and model_class.endswith(ends) and task != "FEATURE_EXTRACTION":
            return task
    return None


def _described(
    config: Mapping[str, Any], where: str, outer: Outer
) -> tuple[str | None, list[Finding]]:
    """The class of the model it is of, and what there is to say about it."""
    reader = ConfigReader(config, where)
    model_class, family = reader.text("model_class"), reader.text("model_type")
    labels = config.get("label2id")
    reader.done()
    if labels is not None and not isinstance(labels, dict):
        raise DamagedError(f"{clean(where)}: label2id is not an object of names to numbers")
    n_labels = f", {len(labels)} labels" if labels else ""
    about = f"a head of {clean(str(model_class))}{n_labels}, which takes the place of the base's"
    found = [Finding(INFO, "head", CONFIG, "", about)]
    if family is not None and family != outer.model_type:
        want = f"model_type {outer.model_type}, as the adapter's"
        found.append(Finding(ERROR, "other-model-type", CONFIG, want, family))
    width = config.get("hidden_size")
    if None not in (width, outer.width) and width != outer.width:
        want = f"hidden_size {outer.width}, as the adapter's"
        found.append(Finding(ERROR, "other-hidden-size", CONFIG, want, clean(repr(width), 60)))
    return model_class, found


def _keys(tensors: Mapping[str, Stored]) -> Keys:
    found = Keys()
    for key, stored in tensors.items():
        if key == LOGITS_BIAS and not any(stored.read()):
            found.findings.append(Finding(INFO, "zeros", key, "", "a buffer that changes nothing"))
            continue
        twin = SHARED_BIAS.get(key)
        shared = twin is not None and twin in tensors
        module, _, parameter = (twin if shared and twin else key).rpartition(".")
        if module and parameter in ("weight", "bias"):
            repeated = shared or key in SHARED_BIAS.values()
            found.put((module, f"replace.{parameter}"), stored, repeated)
        else:
            found.strays.append(key)
            found.findings.append(
                Finding(ERROR, "unexpected-tensor", key, "a weight or bias of a head", "neither")
            )
    return found

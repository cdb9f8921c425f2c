"""BitFit as a plain state dict: tensors under the base's own names, and no config.

What it leaves out is asked for, or recorded when it is added: `HINTS`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.fields import BitfitFields
from adapterkit.hub.findings import ERROR, Finding, clean
from adapterkit.hub.formats.files import (
    POSSIBLE,
    Claim,
    bare_weights,
    required_weights,
    rest_of_file,
    without_root,
)
from adapterkit.hub.formats.safetensors_write import Part, dump
from adapterkit.hub.headers import Stored
from adapterkit.hub.matching import Targets
from adapterkit.hub.sources import Folder
from adapterkit.registry.errors import InvalidError

ABSOLUTE, DELTA = "absolute", "delta"
VALUES, TENSORS = "values", "tensors"
HINTS = {
    VALUES: f"{ABSOLUTE}: the new biases (unless said otherwise); {DELTA}: what is added to them",
    TENSORS: "the names of all tensors, as they were when it was added",
}
WEIGHTS = "model.safetensors"
ROOTS = ("model_state_dict.", "state_dict.")
Places = dict[tuple[str, str], Stored]


def claims(folder: Folder, config: Mapping[str, Any] | None) -> Claim | None:
    """By names that all end in bias, but for a head: nothing inside a layer has its weight."""
    weights = bare_weights(folder) if config is None else None
    keys = [] if weights is None else list(without_root(weights.header.tensors, *ROOTS))
    others = [key for key in keys if not _is_bias(key)]
    if weights is None or len(others) == len(keys) or any(map(_is_in_layer, others)):
        return None
    return Claim(POSSIBLE, f"names of biases in {weights.path}, and no config")


def read(
    folder: Folder, config: Mapping[str, Any] | None, allow_fields: Collection[str]
) -> Adapter:
    """Raises InvalidError for a hint that means nothing."""
    weights = required_weights(folder)
    values = folder.hints.get(VALUES, ABSOLUTE)
    if values not in (ABSOLUTE, DELTA):
        shown = clean(repr(values), 80)
        raise InvalidError(f"the hint {VALUES} is {shown}, expected {ABSOLUTE} or {DELTA}")
    held = without_root(weights.header.tensors, *ROOTS)
    tensors, findings = placed(held, is_delta=values == DELTA)
    return Adapter(
        name=folder.name,
        kind="bitfit",
        format="state_dict",
        fields=BitfitFields(),
        targets=Targets(),
        tensors=tensors,
        config={},
        unconsumed=strays(findings),
        findings=(*weights.findings, *findings, *_lost(folder, held), *rest_of_file(weights)),
        files={weights.path: "weights"},
        hints={VALUES: values, TENSORS: folder.hints.get(TENSORS, sorted(held))},
    )


def placed(held: Mapping[str, Stored], *, is_delta: bool = False) -> tuple[Places, list[Finding]]:
    """(module, role) of each tensor; one of a module whose weight is there too is never a delta."""
    whole = {key.removesuffix(".weight") for key in held if key.endswith(".weight")}
    places: Places = {}
    findings = []
    for key, stored in held.items():
        module, _, parameter = key.rpartition(".")
        if not module or parameter not in ("weight", "bias"):
            want = "weight or bias of a module"
            findings.append(Finding(ERROR, "unexpected-tensor", stored.key, want, "another name"))
        elif is_delta and module not in whole:
            places[module, "shift"] = stored
        else:
            places[module, f"replace.{parameter}"] = stored
    return places, findings


def written(parts: Mapping[tuple[str, str], Part]) -> dict[str, bytes]:
    """Path -> content, of new values under the base's own names."""
    named = {f"{m}.{role.removeprefix('replace.')}": part for (m, role), part in parts.items()}
    return {WEIGHTS: dump(named)}


def strays(findings: Iterable[Finding]) -> tuple[str, ...]:
    return tuple(f.tensor for f in findings if f.code == "unexpected-tensor")


def _lost(folder: Folder, held: Mapping[str, Stored]) -> list[Finding]:
    """Tensors that were there when it was added: nothing else says what a dump has to hold."""
    recorded = folder.hints.get(TENSORS, [])
    if not isinstance(recorded, list) or not all(isinstance(name, str) for name in recorded):
        raise InvalidError(f"the hint {TENSORS} is {clean(repr(recorded), 80)}, expected names")
    found = [
        Finding(ERROR, "missing-tensor", name, "a tensor, as when it was added", "none")
        for name in recorded
        if name not in held
    ]
    added = sorted(held.keys() - set(recorded)) if recorded else []
    want = "none, as when it was added"
    return found + [
        Finding(ERROR, "unexpected-tensor", held[name].key, want, "a tensor") for name in added
    ]


def _is_bias(key: str) -> bool:
    """T5 calls an embedding relative_attention_bias."""
    module, _, parameter = key.rpartition(".")
    return parameter.endswith("bias") or (parameter == "weight" and module.endswith("_bias"))


def _is_in_layer(key: str) -> bool:
    return any(part.isdecimal() for part in key.split(".")) or not key.endswith(".weight")

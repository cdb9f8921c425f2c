"""microsoft/loralib: the state dict of `lora.lora_state_dict(model)`, and no config.

Source: loralib 0.1.2 `utils.py`, `layers.py`. What it leaves out is asked for: `HINTS`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.fields import FusedLoraFields, ReplacedFields
from adapterkit.hub.findings import ERROR, Finding, clean
from adapterkit.hub.formats.config import is_number
from adapterkit.hub.formats.files import (
    LIKELY,
    Claim,
    Weights,
    bare_weights,
    required_weights,
    rest_of_file,
    without_root,
)
from adapterkit.hub.headers import Stored
from adapterkit.hub.matching import Targets
from adapterkit.hub.sources import Folder
from adapterkit.registry.errors import DamagedError, InvalidError

HINTS = {
    "alpha": "lora_alpha of the training",
    "r": "its rank, which the tensors show as well",
    "enable_lora": "for fused layers: which of their matrices were adapted, [true, false, true]",
}
ROLES = {".lora_A": "A", ".lora_B": "B"}
ROOT = "model_state_dict."
Tensors = Mapping[tuple[str, str], Stored]


def claims(folder: Folder, config: Mapping[str, Any] | None) -> Claim | None:
    weights = bare_weights(folder) if config is None else None
    if weights is None or not any(key.endswith(tuple(ROLES)) for key in weights.header.tensors):
        return None
    return Claim(LIKELY, f"tensors in {weights.path} that end in .lora_A, and no config")


def read(
    folder: Folder, config: Mapping[str, Any] | None, allow_fields: Collection[str]
) -> Adapter:
    """Raises InvalidError for what the user has to say and did not."""
    weights = required_weights(folder)
    tensors, findings = _placed(weights)
    modules = sorted({module for module, role in tensors if role in ROLES.values()})
    biases = {module for module, role in tensors if role == "replace.bias"}
    bias = "none" if not biases else "lora_only" if biases <= set(modules) else "all"
    fields, hints = _fields(folder, tensors, modules)
    return Adapter(
        name=folder.name,
        kind="fused_lora",
        format="loralib",
        fields=replace(fields, replaced=ReplacedFields(bias=bias)),
        targets=Targets(modules=tuple(modules)),
        tensors=tensors,
        config={},
        unconsumed=tuple(f.tensor for f in findings if f.code == "unexpected-tensor"),
        findings=(*weights.findings, *findings, *rest_of_file(weights)),
        files={weights.path: "weights"},
        hints=hints,
    )


def _placed(weights: Weights) -> tuple[dict[tuple[str, str], Stored], list[Finding]]:
    places: dict[tuple[str, str], Stored] = {}
    findings = []
    for key, stored in without_root(weights.header.tensors, ROOT).items():
        module, _, parameter = key.rpartition(".")
        role = ROLES.get(f".{parameter}", "replace.bias" if parameter == "bias" else None)
        if not module or role is None:
            want = "lora_A, lora_B or bias of a module"
            findings.append(Finding(ERROR, "unexpected-tensor", stored.key, want, "another name"))
        else:
            places[module, role] = stored
    return places, findings


def _fields(
    folder: Folder, tensors: Tensors, modules: list[str]
) -> tuple[FusedLoraFields, dict[str, Any]]:
    """The kind's fields, and the hints they took."""
    ranks, counts = {}, {}
    for module in modules:
        a, b = tensors.get((module, "A")), tensors.get((module, "B"))
        if a is not None and b is not None and len(a.shape) == len(b.shape) == 2 and b.shape[1]:
            ranks[module] = b.shape[1]
            counts[module] = a.shape[0] // b.shape[1]
    if not ranks:
        raise DamagedError(f"{clean(folder.name)} has no pair of factors lora_A and lora_B")
    rank = _rank(folder, ranks)
    enabled = _enabled(folder, counts)
    several = [module for module, n in counts.items() if enabled and n == sum(enabled)]
    fused = {module.rpartition(".")[2]: enabled for module in several}
    hints = {name: folder.hints[name] for name in HINTS if name in folder.hints}
    return FusedLoraFields(rank=rank, alpha=_alpha(folder), ranks=ranks, fused=fused), hints


def _rank(folder: Folder, ranks: Mapping[str, int]) -> int:
    largest = max(ranks.values())
    said = folder.hints.get("r", largest)
    if said != largest:
        raise InvalidError(f"the hint r is {clean(repr(said))}, the tensors have rank {largest}")
    return largest


def _alpha(folder: Folder) -> float:
    value = folder.hints.get("alpha")
    if value is None:
        raise InvalidError(
            f"{clean(folder.name)} does not say alpha, {HINTS['alpha']}",
            hint="give --hint alpha=NUMBER",
        )
    if not is_number(value):
        raise InvalidError(f"the hint alpha is {clean(repr(value))}, expected a number")
    return float(value)


def _enabled(folder: Folder, counts: Mapping[str, int]) -> tuple[bool, ...]:
    """Which matrices of the fused modules have factors; () if there are none."""
    value = folder.hints.get("enable_lora")
    several = {module: count for module, count in counts.items() if count > 1}
    if value is None and several:
        module, count = next(iter(several.items()))
        raise InvalidError(
            f"{clean(folder.name)} does not say enable_lora, {HINTS['enable_lora']}:"
            f" {clean(module)} has factors for {count} matrices",
            hint="give --hint 'enable_lora=[true, false, true]'",
        )
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(on, bool) for on in value):
        raise InvalidError(
            f"the hint enable_lora is {clean(repr(value), 80)}, expected a list of true and false"
        )
    if sum(value) not in counts.values() or any(n != sum(value) for n in several.values()):
        shown = ", ".join(map(str, sorted(set(counts.values()))))
        raise InvalidError(
            f"the hint enable_lora has {sum(value)} true, the file has factors for {shown}"
        )
    return tuple(value)

"""Tensor keys of a PEFT file -> (module, role).  peft 0.21 `utils/save_and_load.py`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from adapterkit.hub.fields import ReplacedFields
from adapterkit.hub.findings import ERROR, INFO, WARNING, Finding
from adapterkit.hub.matching import Targets

PREFIX = "base_model.model."
ENDINGS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "B_bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".token_adapter.trainable_tokens_delta": "tokens",
    ".trainable_tokens_delta": "tokens",
    ".base_layer.bias": "replace.bias",
    ".base_layer.weight": "table",
}
# With bias="all", PEFT also writes the insides of its wrapper around a saved module.
WRAPPED = re.compile(r"(.+)\.(modules_to_save|original_module)\.(weight|bias)")
# `model.state_dict()` keeps the adapter's name where `save_pretrained` removes it.
NAMED = re.compile(
    r"(.+\.(?:lora_A|lora_B|lora_magnitude_vector|lora_embedding_A|lora_embedding_B"
    r"|trainable_tokens_delta))\.(?!weight$|bias$)([^.]+)((?:\.weight|\.bias)?)"
)
TABLES = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out")
# What other tools leave in front of the path: compiled, distributed, doubly wrapped models.
STRAYS = ("_orig_mod.", "module.", PREFIX)
IN_FRONT = re.compile("(?:" + "|".join(map(re.escape, STRAYS)) + ")*")


@dataclass
class Keys:
    """places: file key -> (module, role). strays: keys nothing could be made of."""

    places: dict[str, tuple[str, str]] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def read_keys(keys: Iterable[str], replaced: ReplacedFields, targets: Targets) -> Keys:
    """Every key placed, or in `strays` with a finding that says what is wrong with it."""
    found = Keys()
    taken: dict[tuple[str, str], str] = {}
    names = set()
    for key in keys:
        plain, name = _without_adapter_name(key)
        names.update([name] if name else [])
        place = _place(plain, replaced, targets)
        if place is None:
            found.strays.append(key)
            found.findings.append(_stray(key))
        elif place in taken:
            found.strays.append(key)
            found.findings.append(
                Finding(ERROR, "duplicate-tensor", key, "one tensor", f"also {taken[place]}")
            )
        else:
            taken[place] = key
            found.places[key] = place
            found.findings.extend(_remarks(key, place))
    if names:
        found.findings.append(_named(names))
    return found


def _without_adapter_name(key: str) -> tuple[str, str | None]:
    match = NAMED.fullmatch(key)
    return (match[1] + match[3], match[2]) if match else (key, None)


def _place(key: str, replaced: ReplacedFields, targets: Targets) -> tuple[str, str] | None:
    if not key.startswith(PREFIX) or key.startswith(PREFIX * 2):
        return None
    path = key.removeprefix(PREFIX)
    if path.startswith(STRAYS):
        return None
    for ending, role in ENDINGS.items():
        if path.endswith(ending) and len(path) > len(ending):
            return path.removesuffix(ending), role
    return _replacement(path, replaced, targets)


def _replacement(path: str, replaced: ReplacedFields, targets: Targets) -> tuple[str, str] | None:
    """A key under the base's own name: a saved module, a bias, or a table of the vocabulary."""
    if (match := WRAPPED.fullmatch(path)) and targets.is_saved(match[1]):
        return match[1], f"wrapper.{match[2]}.{match[3]}"
    module, _, parameter = path.rpartition(".")
    if module and targets.is_saved(module):
        return module, f"replace.{parameter}"
    if module and parameter == "bias" and replaced.bias == "all":
        return module, "replace.bias"
    if parameter == "weight" and module.rpartition(".")[2] in TABLES:
        return module, "table"
    return None


def _remarks(key: str, place: tuple[str, str]) -> list[Finding]:
    if place[1].startswith("wrapper."):
        return [
            Finding(INFO, "wrapper-copy", key, "", "a copy PEFT writes beside the saved module")
        ]
    return []


def _named(names: set[str]) -> Finding:
    if len(names) > 1:
        shown = ", ".join(sorted(names))
        return Finding(ERROR, "several-adapters", "tensor names", "one adapter", shown)
    (name,) = names
    return Finding(
        WARNING, "adapter-name-in-keys", "tensor names", "names as save_pretrained writes them",
        f"the adapter name {name!r} inside, left out", "save it again with save_pretrained",
    )  # fmt: skip


def _stray(key: str) -> Finding:
    path = IN_FRONT.sub("", key, count=1)
    recognised = any(path.endswith(ending) for ending in ENDINGS)
    if recognised and (PREFIX + path) != key:
        hint = "rename the tensors, or save the adapter again with save_pretrained"
        return Finding(ERROR, "wrong-prefix", key, PREFIX + path, "another prefix", hint)
    known = "a tensor of this adapter's config"
    return Finding(
        ERROR, "unexpected-tensor", key, known, "an extra tensor that belongs to nothing"
    )

"""Tensor keys of a PEFT file -> (module, role).  peft 0.21 `utils/save_and_load.py`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from adapterkit.hub.fields import ReplacedFields
from adapterkit.hub.findings import ERROR, INFO, WARNING, Finding
from adapterkit.hub.formats.peft_type import PeftType
from adapterkit.hub.matching import Targets

ROOT = "base_model."
PREFIX = ROOT + "model."
# Beside the endings of each type: parts of the base that any of them may replace.
ENDINGS = {
    ".token_adapter.trainable_tokens_delta": "tokens",
    ".trainable_tokens_delta": "tokens",
    ".token_adapter.base_layer.weight": "table",
    ".base_layer.bias": "replace.bias",
    ".base_layer.weight": "table",
}
# With bias="all", PEFT also writes the insides of its wrapper around a saved module.
# Inside a module of several layers the adapter's name stays in front of the layer's.
WRAPPED = re.compile(r"(.+?)\.(modules_to_save|original_module)\.(?:(.+)\.)?(weight|bias)")
TABLES = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out")
# A masked language model registers the bias of its last layer in the head as well.
LAST = ".decoder"
# What other tools leave in front of the path: compiled, distributed, doubly wrapped models.
STRAYS = ("_orig_mod.", "module.", PREFIX)
IN_FRONT = re.compile("(?:" + "|".join(map(re.escape, STRAYS)) + ")*")
Places = Mapping[str, str]


@dataclass
class Keys:
    """places: file key -> (module, role). strays: keys nothing could be made of."""

    places: dict[str, tuple[str, str]] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def read_keys(
    keys: Iterable[str], row: PeftType, replaced: ReplacedFields, targets: Targets
) -> Keys:
    """Every key placed, or in `strays` with a finding that says what is wrong with it."""
    found = Keys()
    endings = {**row.endings, **ENDINGS}
    named = _named_keys(endings)
    taken: dict[tuple[str, str], str] = {}
    matches = {key: named.fullmatch(key) for key in keys}
    names = {match[2] for match in matches.values() if match}
    plain = {key: match[1] + match[3] if match else key for key, match in matches.items()}
    own = row.places(plain.values(), targets)
    for key, short in plain.items():
        place = _whole(short, row) or own.get(short) or _place(short, endings, replaced, targets)
        if place is None:
            found.strays.append(key)
            found.findings.append(_stray(key, endings))
        elif place in taken:
            found.strays.append(key)
            found.findings.append(
                Finding(ERROR, "duplicate-tensor", key, "one tensor", f"also {taken[place]}")
            )
        else:
            taken[place] = key
            found.places[key] = place
            found.findings.extend(_remarks(key, place))
    _join_copies(found)
    if names:
        found.findings.append(_named(names))
    return found


def _join_copies(found: Keys) -> None:
    """A bias with two names is one, and its copy."""
    held = set(found.places.values())
    for key, (module, role) in found.places.items():
        if role == "replace.bias" and (module + LAST, role) in held:
            found.places[key] = module + LAST, "wrapper.modules_to_save.bias"
            found.findings.extend(_remarks(key, found.places[key]))


def _named_keys(endings: Places) -> re.Pattern[str]:
    """Keys as `model.state_dict()` has them, with the adapter's name that `save_pretrained` takes
    out: groups before it, it, and behind it."""
    stems = {re.sub(r"\.(weight|bias)$", "", ending) for ending in endings}
    own = "|".join(re.escape(stem) for stem in sorted(stems) if stem != ".base_layer")
    return re.compile(rf"(.+(?:{own}))\.(?!weight$|bias$)([^.]+)((?:\.weight|\.bias)?)")


def _whole(key: str, row: PeftType) -> tuple[str, str] | None:
    """The place of a tensor that belongs to no module: module ""."""
    role = row.whole.get(key.removeprefix(ROOT)) if key.startswith(ROOT) else None
    return None if role is None else ("", role)


def _place(
    key: str, endings: Places, replaced: ReplacedFields, targets: Targets
) -> tuple[str, str] | None:
    if not key.startswith(PREFIX) or key.startswith(PREFIX * 2):
        return None
    path = key.removeprefix(PREFIX)
    if path.startswith(STRAYS):
        return None
    for ending, role in endings.items():
        if path.endswith(ending) and len(path) > len(ending):
            return path.removesuffix(ending), role
    return _replacement(path, replaced, targets)


def _replacement(path: str, replaced: ReplacedFields, targets: Targets) -> tuple[str, str] | None:
    """A key under the base's own name: a saved module, a bias, or a table of the vocabulary."""
    if (match := WRAPPED.fullmatch(path)) and targets.is_saved(match[1]):
        inner = match[3] or ""
        inner = inner.partition(".")[2] if match[2] == "modules_to_save" else inner
        return f"{match[1]}.{inner}".rstrip("."), f"wrapper.{match[2]}.{match[4]}"
    module, _, parameter = path.rpartition(".")
    if module and targets.is_saved(module):
        # a parameter of another name is a row of the base of its own
        own = parameter in ("weight", "bias")
        return (module, f"replace.{parameter}") if own else (path, "replace.weight")
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


def _stray(key: str, endings: Places) -> Finding:
    path = IN_FRONT.sub("", key, count=1)
    recognised = any(path.endswith(ending) for ending in endings)
    if recognised and (PREFIX + path) != key:
        hint = "rename the tensors, or save the adapter again with save_pretrained"
        return Finding(ERROR, "wrong-prefix", key, PREFIX + path, "another prefix", hint)
    known = "a tensor of this adapter's config"
    return Finding(
        ERROR, "unexpected-tensor", key, known, "an extra tensor that belongs to nothing"
    )

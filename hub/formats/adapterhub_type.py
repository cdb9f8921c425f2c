"""What an architecture of AdapterHub is: one row here and one object that says how its config and
keys are read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, NamedTuple

from packaging.version import Version

from adapterkit.hub.findings import Finding
from adapterkit.hub.formats.config import ConfigReader
from adapterkit.hub.matching import Targets


@dataclass(frozen=True)
class Outer:
    """What stands around the config of the method.

    name: the adapter's, which is inside every key. width: `hidden_size`, None where the model has
    none of its own. version: of the library `adapters`; None in files of its predecessor. hints:
    what the user says beside the files.
    """

    name: str
    model_type: str
    model_class: str | None = None
    width: int | None = None
    version: Version | None = None
    hints: Mapping[str, Any] = field(default_factory=dict)


class Key(NamedTuple):
    """A key without the adapter's name: `path.holder.NAME.rest`."""

    path: str
    holder: str
    rest: str


Place = tuple[str, str]


Paths = Collection[str]


def _no_targets(reader: ConfigReader, outer: Outer, paths: Paths) -> Targets:
    return Targets()


def _alone(config: Mapping[str, Any]) -> list[Any]:
    return []


def _none(config: Mapping[str, Any], outer: Outer) -> list[Finding]:
    return []


@dataclass(frozen=True)
class Architecture:
    """kind: its row in `kinds.KINDS`, or what names it for a config and a base.

    place: key -> (path, role), None for one that does not belong to it. The path is the module's,
    or that of a place in a layer; "" for what belongs to the model as a whole.
    fields: (config, what stands around it, paths of the file) -> the kind's fields.
    targets: the modules that the config implies, for kinds that act on modules with a weight.
    What the head brings comes to them as `replace.weight` and `replace.bias` of its modules, which
    `kinds.replaced` checks and lowers.
    known: fields it reads; inert: fields that change nothing in a saved adapter; refused: those
    that change the result and are not applied -> why. refusals: what else the config asks for in
    vain. repeated: roles of tensors that the library writes again under every layer. hints: what
    the user may say beside the config. placing: the method's config -> what stands for `place`,
    where keys mean what the config says; repeating, likewise, for `repeated`. parts: the configs
    inside its own, each with its row.
    """

    kind: str | Callable[[Mapping[str, Any], Outer], str]
    place: Callable[[Key], Place | None]
    fields: Callable[[ConfigReader, Outer, Paths], Any]
    known: frozenset[str]
    inert: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    refusals: Callable[[Mapping[str, Any], Outer], list[Finding]] = _none
    targets: Callable[[ConfigReader, Outer, Paths], Targets] = _no_targets
    repeated: frozenset[str] = frozenset()
    hints: frozenset[str] = frozenset()
    placing: Callable[[Mapping[str, Any]], Callable[[Key], Place | None]] | None = None
    repeating: Callable[[Mapping[str, Any]], frozenset[str]] | None = None
    parts: Callable[[Mapping[str, Any]], list[tuple[Mapping[str, Any], Architecture]]] = _alone

    def placed(self, config: Mapping[str, Any]) -> Architecture:
        """With the `place` and `repeated` that this config asks for."""
        place = self.place if self.placing is None else self.placing(config)
        repeated = self.repeated if self.repeating is None else self.repeating(config)
        return replace(self, place=place, repeated=repeated)

    def kind_of(self, config: Mapping[str, Any], outer: Outer) -> str:
        return self.kind if isinstance(self.kind, str) else self.kind(config, outer)


# `config.architecture` -> its row; a missing or null one means a bottleneck.
BOTTLENECK = "bottleneck"
ARCHITECTURES = {
    BOTTLENECK: "adapterkit.hub.formats.adapterhub_bottleneck:BOTTLENECK",
    "prefix_tuning": "adapterkit.hub.formats.adapterhub_prefix:PREFIX",
    "prompt_tuning": "adapterkit.hub.formats.adapterhub_prompt:PROMPT",
    "union": "adapterkit.hub.formats.adapterhub_union:UNION",
    "reft": "adapterkit.hub.formats.adapterhub_reft:REFT",
    "lora": "adapterkit.hub.formats.adapterhub_lora:LORA",
}
# Those that the library writes; the ones without a row above are refused by name.
OTHER_ARCHITECTURES = frozenset(
    [BOTTLENECK, "lora", "prefix_tuning", "prompt_tuning", "reft", "union", "mtl_lora"]
)
# What stands in front of the adapter's name, and what adapter-transformers called it.
HOLDERS = frozenset(
    [
        "adapters",
        "loras",
        "prefix_tunings",
        "prefix_gates",
        "prompt_tunings",
        "invertible_adapters",
        "shared_parameters",
        "refts",
    ]
)
OLD_HOLDERS = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}


def architecture(name: str) -> Architecture:
    module, _, attribute = ARCHITECTURES[name].partition(":")
    found: Architecture = getattr(import_module(module), attribute)
    return found


def by_ending(holder: str, endings: Mapping[str, str]) -> Callable[[Key], Place | None]:
    """The place of keys whose path is their module: what stands behind the name -> role."""

    def place(key: Key) -> Place | None:
        role = endings.get(key.rest) if key.holder == holder else None
        return None if role is None else (key.path, role)

    return place


def split(key: str, name: str) -> Key | None:
    """The parts of a key, None where no holder or another adapter's name is in it."""
    parts = key.split(".")
    at = _named_at(parts, name)
    if at is None:
        return None
    holder = OLD_HOLDERS.get(parts[at - 1], parts[at - 1])
    return Key(".".join(parts[: at - 1]), holder, ".".join(parts[at + 1 :]))


def renamed(key: str, name: str, other: str) -> str:
    """The key with another adapter's name in it."""
    parts = key.split(".")
    at = _named_at(parts, name)
    return key if at is None else ".".join([*parts[:at], other, *parts[at + 1 :]])


def _named_at(parts: list[str], name: str) -> int | None:
    """Where the adapter's name is: behind the first holder that has it."""
    every = (
        at
        for at, part in enumerate(parts[:-1], start=1)
        if OLD_HOLDERS.get(part, part) in HOLDERS and parts[at] == name
    )
    return next(every, None)

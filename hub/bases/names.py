"""Checkpoint names and the names transformers gives the same parameters at run time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from adapterkit.hub.bases.families import FAMILIES, LEGACY, Family
from adapterkit.hub.bases.tasks import Head, Task
from adapterkit.hub.findings import clean
from adapterkit.registry.errors import MismatchError

# Buffers that older versions of transformers wrote and current ones compute.
BUFFERS = re.compile(
    r"(?:^|\.)(?:inv_freq|position_ids|token_type_ids|(?:attn|attention)\.(?:masked_)?bias)$"
)
NEVER = r"(?!)"
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def architectures(model_type: str) -> dict[str, str]:
    """Task suffix (`ForCausalLM`, `Model`, ...) -> class name, the main task first."""
    family = family_of({"model_type": model_type})
    names = {suffix: family.classes.get(suffix, family.name + suffix) for suffix in family.tasks}
    return {suffix: name for suffix, name in names.items() if name}


def family_of(config: Mapping[str, Any]) -> Family:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        shown = clean(repr(model_type))
        named = clean(repr(config.get("architectures")))
        raise MismatchError(
            f"model_type {shown} (architecture {named}) is not a known model family",
            hint=f"known: {', '.join(sorted(FAMILIES))}",
        )
    return FAMILIES[model_type]


def task_of(config: Mapping[str, Any], architecture: str | None) -> tuple[str, str]:
    """Task suffix and class name; the family's main task where neither side names a class."""
    known = architectures(str(config["model_type"]))
    named = config.get("architectures")
    if architecture is None and isinstance(named, list) and named:
        architecture = str(named[0])
    for suffix, name in known.items():
        if architecture in (None, name):
            return suffix, name
    raise MismatchError(
        f"architecture {clean(str(architecture))} is not one of the known classes of model_type"
        f" {config['model_type']}",
        hint=f"known: {', '.join(known.values())}",
    )


def number(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """The first of `keys` that is a number, in the config or in that of its language model."""
    text = config.get("text_config")
    for source in (config, text if isinstance(text, dict) else {}):
        for key in keys:
            value = source.get(key)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


@dataclass(frozen=True)
class Names:
    """One class of one family: how it names what the files hold."""

    family: Family
    task: Task
    architecture: str
    depth: int | None

    @classmethod
    def of(cls, config: Mapping[str, Any], architecture: str | None = None) -> Names:
        family = family_of(config)
        suffix, name = task_of(config, architecture)
        return cls(family, family.tasks[suffix], name, number(config, DEPTH_KEYS))

    @cached_property
    def prefix(self) -> str:
        return self.family.prefix if self.task.prefix is None else self.task.prefix

    @cached_property
    def heads(self) -> list[tuple[str, Head]]:
        """Heads of this class by their run-time names."""
        return [(self.join(h.name) if h.inside else h.name, h) for h in self.task.heads]

    @cached_property
    def _outside(self) -> set[str]:
        return {head.name for head in self.task.heads if not head.inside}

    @cached_property
    def _roots(self) -> set[str]:
        """Heads of every class of the family: no such name lies in the body."""
        return {h.name for task in self.family.tasks.values() for h in task.heads if not h.inside}

    def join(self, body: str) -> str:
        return f"{self.prefix}.{body}" if self.prefix else body

    def body(self, name: str) -> str:
        """A run-time name relative to the body."""
        return _strip(name, (self.prefix,)) or name

    def is_buffer(self, key: str) -> bool:
        return bool(BUFFERS.search(key) or re.search(self.family.buffers or NEVER, key))

    def drops(self, body: str) -> bool:
        """Whether this class has no such module although others of the family do."""
        return bool(re.search(self.task.drop or NEVER, body))

    def layer(self, body: str) -> int | None:
        found = re.search(self.family.layers or NEVER, body)
        return int(found[1]) if found else None

    def runtime(self, key: str) -> str | None:
        """Run-time parameter name of a checkpoint tensor; None if this class has no such one."""
        if self.is_buffer(key):
            return None
        name = key
        for pattern, replacement in (*LEGACY, *self.family.renames):
            name = re.sub(pattern, replacement, name)
        body = _strip(name, (self.family.prefix, self.prefix))
        if body is None and any(name == r or name.startswith(r + ".") for r in self._roots):
            return name if name.rpartition(".")[0] in self._outside else None
        body = body or name
        layer = self.layer(body)
        # transformers builds as many layers as the config says and ignores the rest.
        beyond = layer is not None and self.depth is not None and layer >= self.depth
        return None if beyond or self.drops(body) else self.join(body)


def _strip(name: str, prefixes: tuple[str, ...]) -> str | None:
    """`name` without the first of `prefixes` it starts with; None if it starts with none."""
    for prefix in prefixes:
        if prefix and name.startswith(prefix + "."):
            return name[len(prefix) + 1 :]
    return None

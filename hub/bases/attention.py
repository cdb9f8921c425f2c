"""Where a model attends, seen from the names of the layers that make its keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from adapterkit.hub.bases.base import Module

SELF, CROSS, ENCODER = "self", "cross", "encoder"
# Last names of what makes the keys -> where it makes queries and values as well, the projection
# behind the attention, which has as many inputs as there are queries. Of a family that calls it
# otherwise nothing is known here, and prefixes for it are refused.
KEYS = {
    "self_attn.k_proj": "",
    "attn.k_proj": "",
    "attention.self.key": "",
    "SelfAttention.k": "",
    "attn.c_attn": "c_proj",
    "attention.query_key_value": "dense",
    "self_attention.query_key_value": "dense",
    "self_attn.qkv_proj": "o_proj",
}
CROSS_KEYS = {"encoder_attn.k_proj": "", "crossattention.self.key": "", "EncDecAttention.k": ""}
NUMBER = re.compile(r"\.(\d{1,9})\.")
# Ends of what the first table is called that turns token ids into vectors.
TABLES = ("embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings")


@dataclass(frozen=True)
class Attention:
    """path: of the module. width: of its keys, heads times head size; those that groups of query
    heads share count once. n_in: of what they are made of."""

    path: str
    width: int
    n_in: int


def attentions(modules: Mapping[str, Module], place: str) -> list[Attention]:
    """All of one place, in the order of their layers: SELF in a model of one stack, or in the
    decoder; ENCODER, and CROSS, only where there are two stacks."""
    keys = {name: end for name in modules if (end := _end(name)) is not None}
    stacks = {stack for name in keys for stack in ("encoder", "decoder") if _is_in(stack, name)}
    found: dict[int, Attention] = {}
    for name, end in keys.items():
        number = NUMBER.search(f".{name}")
        if end in CROSS_KEYS:
            here = CROSS
        else:
            here = ENCODER if len(stacks) == 2 and _is_in("encoder", name) else SELF
        if number is not None and here == place:
            path = name.rpartition(".")[0]
            width = _width(modules, name, f"{path}.{(KEYS | CROSS_KEYS)[end]}")
            found[int(number[1])] = Attention(path, width, modules[name].n_in)
    return [found[layer] for layer in sorted(found)]


def _width(modules: Mapping[str, Module], keys: str, behind: str) -> int:
    """Of the keys: all outputs, or half of those that are not queries."""
    if behind.endswith("."):
        return modules[keys].n_out
    queries = modules[behind].n_in if behind in modules else 0
    return (modules[keys].n_out - queries) // 2


def _end(name: str) -> str | None:
    """The row of a table that a module's name ends with."""
    parts = name.split(".")
    ends = (".".join(parts[-n:]) for n in (3, 2))
    return next((end for end in ends if end in KEYS or end in CROSS_KEYS), None)


def _is_in(stack: str, name: str) -> bool:
    return stack in name.split(".")


def token_width(modules: Mapping[str, Module]) -> int | None:
    """Of an embedded token; None where no table has a name that is known."""
    widths = (m.shape[-1] for n, m in modules.items() if n.rpartition(".")[2] in TABLES)
    return next(widths, None)

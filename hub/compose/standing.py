"""All prefixes and virtual tokens that are active, folded once at activation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.hub.bases.attention import CROSS, ENCODER, attentions
from adapterkit.hub.bases.base import Base
from adapterkit.hub.compose.caches import Held, joined
from adapterkit.hub.compose.lowering import Lowered
from adapterkit.hub.findings import clean
from adapterkit.hub.primitives import PrefixKV, VirtualTokens
from adapterkit.registry.errors import MismatchError

NUMBERS = itertools.count(1)
LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Gate:
    """Where in the prefix of one layer a gated part [start, stop) lies, and what scales it."""

    part: Held
    start: int
    stop: int
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Side:
    """An attention of an encoder beside a decoder, or (cross) of the decoder to it. layer: its own
    in a cache."""

    held: Held
    gates: tuple[Gate, ...]
    layer: int
    cross: bool

    @property
    def n(self) -> int:
        return self.held.k.shape[1]


@dataclass(frozen=True)
class Standing:
    """activation: a number of its own. prefixes: layer of the cache -> keys and values in front of
    the attention that generates; layers: its path -> that layer. n_keys: in front of each;
    n_shifting: those behind which real tokens stand. front, flagged (n, width); embedded: rows, and
    whether they stand behind the first token."""

    activation: int
    prefixes: Mapping[int, Held] = field(default_factory=dict)
    layers: Mapping[str, int] = field(default_factory=dict)
    gates: Mapping[str, tuple[Gate, ...]] = field(default_factory=dict)
    sides: Mapping[str, Side] = field(default_factory=dict)
    n_keys: int = 0
    n_shifting: int = 0
    front: Tensor | None = None
    flagged: Tensor | None = None
    embedded: tuple[tuple[Tensor, bool], ...] = ()

    @property
    def n_front(self) -> int:
        return 0 if self.front is None else len(self.front)

    @property
    def n_embedded(self) -> int:
        return sum(len(rows) for rows, _ in self.embedded)

    @property
    def shift(self) -> int:
        """Positions in front of the first real one."""
        return self.n_shifting + self.n_front

    @property
    def held(self) -> int:
        """What the cache and the mask have more than real tokens."""
        return self.n_keys + self.n_front + self.n_embedded


def standing(
    model: nn.Module, base: Base, active: Iterable[str], lowered: Mapping[str, Lowered]
) -> Standing | None:
    """None if no active adapter has any. Raises MismatchError for a model they cannot stand on."""
    tokens = [(n, p) for n, _, p in _all(active, lowered) if isinstance(p, VirtualTokens)]
    prefixes = [(n, path, p) for n, path, p in _all(active, lowered) if isinstance(p, PrefixKV)]
    if not tokens and not prefixes:
        return None
    rows = {
        place: [p.e for _, p in tokens if p.place == place] for place in ("front", "flagged")
    }
    embedded = [(p.e, p.place.endswith("first")) for _, p in tokens if p.place.startswith("embed")]
    by_layer: dict[str, list[tuple[str, PrefixKV]]] = {}
    for name, path, prefix in prefixes:
        by_layer.setdefault(path, []).append((name, prefix))
    attended = _attended(model, base, by_layer)
    sides = {path: side for path, side in attended.items() if path in _aside(base)}
    own = {path: one for path, one in attended.items() if path not in sides}
    first = next((parts for path, parts in by_layer.items() if path in own), [])
    return Standing(
        next(NUMBERS),
        {one.layer: one.held for one in own.values()},
        {path: one.layer for path, one in own.items()},
        {path: one.gates for path, one in own.items() if one.gates},
        sides,
        sum(len(prefix.k) for _, prefix in first),
        sum(len(prefix.k) for _, prefix in first if prefix.shifts),
        torch.cat(rows["front"]) if rows["front"] else None,
        torch.cat(rows["flagged"]) if rows["flagged"] else None,
        tuple(embedded),
    )


def _all(
    active: Iterable[str], lowered: Mapping[str, Lowered]
) -> Iterator[tuple[str, str, object]]:
    """(adapter, module, primitive), adapters in the order given."""
    for name in active:
        for path, primitives in lowered[name].updates.items():
            for primitive in primitives:
                yield name, path, primitive


def _aside(base: Base) -> set[str]:
    return {one.path for place in (CROSS, ENCODER) for one in attentions(base.modules, place)}


def _attended(
    model: nn.Module, base: Base, by_layer: Mapping[str, list[tuple[str, PrefixKV]]]
) -> dict[str, Side]:
    """Path of each attention -> what stands in front of it."""
    if not by_layer:
        return {}
    heads = _key_heads(model)
    cross = {one.path for one in attentions(base.modules, CROSS)}
    found: dict[str, Side] = {}
    for path, parts in by_layer.items():
        layer = getattr(model.get_submodule(path), "layer_idx", None)
        if not isinstance(layer, int):
            raise MismatchError(f"{path} does not say which layer of a cache is its own")
        split = [_by_head(name, prefix, heads) for name, prefix in parts]
        gates = tuple(_gates([prefix for _, prefix in parts], split))
        found[path] = Side(joined(split), gates, layer, path in cross)
    return found


def _by_head(name: str, prefix: PrefixKV, heads: int) -> Held:
    n, width = prefix.k.shape
    if width % heads or prefix.heads not in (None, heads):
        made = prefix.heads or f"a width of {width}"
        raise MismatchError(
            f"{clean(name)} was made for {made} heads of keys, but the model has {heads}"
        )
    k, v = (t.reshape(n, heads, -1).transpose(0, 1).contiguous() for t in (prefix.k, prefix.v))
    return Held(k, v)


def _gates(prefixes: list[PrefixKV], split: list[Held]) -> Iterator[Gate]:
    start = 0
    for prefix, part in zip(prefixes, split, strict=True):
        stop = start + len(prefix.k)
        if prefix.gate is not None and prefix.gate_bias is not None:
            yield Gate(part, start, stop, prefix.gate, prefix.gate_bias)
        start = stop


def _key_heads(model: Any) -> int:
    """Heads of keys in every layer. Raises MismatchError where layers are not alike."""
    pair = bool(model.config.is_encoder_decoder)
    config = model.config if pair else model.config.get_text_config(decoder=True)
    odd = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if odd:
        shown = ", ".join(sorted(odd))
        raise MismatchError(f"{config.model_type} has layers of {shown}, which take no prefix")
    if getattr(config, "num_kv_shared_layers", 0):
        raise MismatchError(f"{config.model_type} has layers that share keys, which take no prefix")
    names = ("num_key_value_heads", "decoder_attention_heads", "num_attention_heads")
    counts = (getattr(config, name, None) for name in names)
    heads = next((count for count in counts if isinstance(count, int) and count > 0), None)
    if heads is None:
        raise MismatchError(f"{config.model_type} does not say how many heads of keys it has")
    return heads

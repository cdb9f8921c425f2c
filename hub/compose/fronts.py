"""What stands in front, folded from the prefixes and virtual tokens of adapters."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapterkit.hub.bases.attention import CROSS, ENCODER, attentions
from adapterkit.hub.bases.base import Base
from adapterkit.hub.compose.caches import Held, joined
from adapterkit.hub.compose.lowering import Lowered
from adapterkit.hub.compose.rows import Rows
from adapterkit.hub.compose.standing import Attended, Gate, Mix, Standing
from adapterkit.hub.findings import clean
from adapterkit.hub.primitives import PrefixKV, VirtualTokens
from adapterkit.registry.errors import MismatchError

NUMBERS = itertools.count(1)
LAYER_TYPES = {"full_attention", "sliding_attention"}


def standing(
    model: nn.Module, base: Base, active: Iterable[str], lowered: Mapping[str, Lowered]
) -> Standing | None:
    """None if no active adapter has any. Raises MismatchError for a model they cannot stand on."""
    tokens = [p for _, _, p in _all(active, lowered) if isinstance(p, VirtualTokens)]
    prefixes = [(n, path, p) for n, path, p in _all(active, lowered) if isinstance(p, PrefixKV)]
    if not tokens and not prefixes:
        return None
    rows = {place: [p.e for p in tokens if p.place == place] for place in ("front", "flagged")}
    by_layer: dict[str, list[tuple[str, PrefixKV]]] = {}
    for name, path, prefix in prefixes:
        by_layer.setdefault(path, []).append((name, prefix))
    attended = _attended(model, base, by_layer)
    sides = {path: side for path, side in attended.items() if path in _aside(base)}
    own = {path: one for path, one in attended.items() if path not in sides}
    first = next((parts for path, parts in by_layer.items() if path in own), [])
    mix = Mix(
        sum(len(prefix.k) for _, prefix in first),
        sum(len(prefix.k) for _, prefix in first if prefix.shifts),
        torch.cat(rows["front"]) if rows["front"] else None,
        torch.cat(rows["flagged"]) if rows["flagged"] else None,
        tuple((p.e, p.place.endswith("first")) for p in tokens if p.place.startswith("embed")),
    )
    return Standing(next(NUMBERS), (mix,), None, own, sides)


def by_rows(found: Sequence[Standing | None], rows: Rows) -> Standing | None:
    """One of these for each row; None stands for nothing in front."""
    if not any(found):
        return None
    mixes = tuple(Mix() if each is None else each.mixes[0] for each in found)
    own = _side_by_side([{} if each is None else each.own for each in found])
    sides = _side_by_side([{} if each is None else each.sides for each in found])
    made = Standing(next(NUMBERS), mixes, rows, own, sides)
    rows.padded.update(n for n, mix in enumerate(mixes) if mix.n_rows < made.n_rows)
    return made


def _side_by_side(mixes: Sequence[Mapping[str, Attended]]) -> dict[str, Attended]:
    """By path, the keys of all mixes, padded in front to the longest."""
    found: dict[str, Attended] = {}
    for path, first in ((path, one) for mix in mixes for path, one in mix.items()):
        if path not in found:
            found[path] = _padded([mix.get(path) for mix in mixes], first)
    return found


def _padded(mixes: Sequence[Attended | None], like: Attended) -> Attended:
    n = max(0 if one is None else one.n for one in mixes)
    empty = Held(like.held.k[:, :, :0], like.held.v[:, :, :0])
    held = [empty if one is None else one.held for one in mixes]
    k, v = ([_longer(t, n) for t in each] for each in zip(*((h.k, h.v) for h in held), strict=True))
    gates = tuple(
        replace(gate, start=gate.start + n - one.n, stop=gate.stop + n - one.n, mix=number)
        for number, one in enumerate(mixes)
        if one is not None
        for gate in one.gates
    )
    counts = tuple(0 if one is None else one.n for one in mixes)
    return replace(like, held=Held(torch.cat(k), torch.cat(v)), counts=counts, gates=gates)


def _longer(t: Tensor, n: int) -> Tensor:
    """(1, heads, n, size)"""
    return functional.pad(t, (0, 0, n - t.shape[2], 0))


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
) -> dict[str, Attended]:
    """Path of each attention -> what stands in front of it."""
    if not by_layer:
        return {}
    heads = _key_heads(model)
    cross = {one.path for one in attentions(base.modules, CROSS)}
    found: dict[str, Attended] = {}
    for path, parts in by_layer.items():
        layer = getattr(model.get_submodule(path), "layer_idx", None)
        if not isinstance(layer, int):
            raise MismatchError(f"{path} does not say which layer of a cache is its own")
        split = [_by_head(name, prefix, heads) for name, prefix in parts]
        gates = tuple(_gates([prefix for _, prefix in parts], split))
        held = joined(split)
        found[path] = Attended(held, (held.k.shape[2],), gates, layer, path in cross)
    return found


def _by_head(name: str, prefix: PrefixKV, heads: int) -> Held:
    n, width = prefix.k.shape
    if width % heads or prefix.heads not in (None, heads):
        made = prefix.heads or f"a width of {width}"
        raise MismatchError(
            f"{clean(name)} was made for {made} heads of keys, but the model has {heads}"
        )
    k, v = (t.reshape(n, heads, -1).transpose(0, 1).contiguous() for t in (prefix.k, prefix.v))
    return Held(k[None], v[None])


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

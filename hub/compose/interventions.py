"""Interventions on single tokens behind the layers of a live model.

Which tokens are real is in the mask that the body of the model gets: a hook keeps it for the
layers. Where a cache continues a sequence, tokens count from its start; those at the end are of
the input that started it, and are not looked for again.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers.activations import ACT2FN

from adapterkit.hub.bases.base import Base
from adapterkit.hub.compose.admit import Options
from adapterkit.hub.compose.blocks import Setup, Stack
from adapterkit.hub.compose.here import Current, Here, recompile
from adapterkit.hub.compose.inputs import rolled
from adapterkit.hub.compose.lowering import Lowered
from adapterkit.hub.compose.rows import Batch, Rows
from adapterkit.hub.findings import clean
from adapterkit.hub.primitives import Intervention
from adapterkit.registry.errors import InvalidError

# The interventions of one adapter on one layer, and its weight.
Group = tuple[float, tuple[Intervention, ...]]
# layer -> what acts on it
State = Mapping[str, Sequence[Group]]


@dataclass(frozen=True)
class Routed:
    """One state for each mix of the rows."""

    states: Sequence[State]
    rows: Rows


class Interventions:
    """Hooks on the layers, and on the body, of what is active."""

    def __init__(self, model: nn.Module, base: Base, options: Options) -> None:
        self._modules = dict(model.named_modules())
        self._body: Any = getattr(model, "base_model", model)
        self._names = list(inspect.signature(self._body.forward).parameters)
        self._handles: dict[str, RemovableHandle] = {}
        self._here = Here()
        self.current: Current[State | Routed] = Current({})

    def plan(self, active: Setup, lowered: Mapping[str, Lowered]) -> State:
        found: dict[str, list[Group]] = {}
        for name, weight in active.items():
            for layer, made in lowered[name].updates.items():
                mine = tuple(p for p in made if isinstance(p, Intervention))
                if mine:
                    found.setdefault(layer, []).append((weight, mine))
                    require_stacked(active, name, "is a ReFT")
        self._install(found)
        return found

    def route(self, states: Sequence[State], rows: Rows) -> Routed | State:
        return Routed(states, rows) if any(states) else {}

    def remove(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _install(self, found: State) -> None:
        missing = found.keys() - self._handles.keys()
        if missing:
            recompile()
        if found and "" not in self._handles:
            before = self._body.register_forward_pre_hook(self._enter, with_kwargs=True)
            self._handles[""] = before
        for layer in missing:
            hook = partial(self._after, layer)
            self._handles[layer] = self._modules[layer].register_forward_hook(hook)

    def _enter(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.current.now:
            return
        given = dict(zip(self._names, args, strict=False)) | kwargs
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim != 2:
            raise InvalidError(
                f"attention_mask has {mask.ndim} dimensions: the active ReFT needs one of two, to"
                " know which tokens are real"
            )
        cache = given.get("past_key_values")
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        tokens: Any = embeds if ids is None else ids
        self._here.mask, self._here.seen = mask, cache.get_seq_length() if cache is not None else 0
        self._here.given = tokens.shape[1]

    def _after(self, layer: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        state = self.current.now
        h = output[0] if isinstance(output, tuple) else output
        if isinstance(state, Routed):
            h = self._by_rows(layer, state, h)
        elif layer in state:
            h = _all(h, state[layer], self._numbers(h))
        else:
            return None
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def _by_rows(self, layer: str, state: Routed, h: Tensor) -> Tensor:
        groups = [each.get(layer, ()) for each in state.states]
        if not any(groups):
            return h
        start, end = self._numbers(h, state.rows.batch)
        changed = h.clone()
        layout = state.rows.within(h.shape, layer)
        for mix, index in state.rows.members(layout, h.device):
            changed[index] = _all(h[index], groups[mix], (start[index], end[index]))
        return changed

    def _numbers(self, h: Tensor, rows: Batch | None = None) -> tuple[Tensor, Tensor]:
        """Of every token of h (batch, tokens): how many real ones stand before it, and behind it.
        Negative for one that is none, and behind for all once a cache continues."""
        mask, seen = self._here.mask, self._here.seen
        batch, length = h.shape[:2]
        if mask is None:
            past = seen if rows is None else max(seen - rows.held, 0)
            mask = torch.ones(batch, past + self._here.given)
        real = (mask == 1).long().to(h.device)
        # what stands in front of the input without being in the mask is none of its tokens
        real = functional.pad(real, (max(seen + length - real.shape[1], 0), 0))
        if rows is not None and rows.ends is not None:
            real = rolled(real, rows.ends)
        before, total = real.cumsum(1) - real, real.sum(1, keepdim=True)
        none = real == 0
        start = before.masked_fill(none, -1)[:, -length:]
        end = (total - 1 - before).masked_fill(none, -1)[:, -length:]
        return start, end if seen == 0 else end.fill_(-1)


def _all(h: Tensor, groups: Sequence[Group], numbers: tuple[Tensor, Tensor]) -> Tensor:
    for weight, mine in groups:
        h = _intervened(h, mine, numbers, weight)
    return h


def _intervened(
    h: Tensor, mine: tuple[Intervention, ...], numbers: tuple[Tensor, Tensor], weight: float
) -> Tensor:
    """All see the same h; of two on one token, the one at the end counts."""
    start, end = numbers
    changed = h
    for one in mine:
        x = h.to(one.source.dtype)
        low = functional.linear(x, one.source, one.source_bias)
        low = low if one.act is None else ACT2FN[one.act](low)
        low = low - functional.linear(x, one.projection) if one.subtracts else low
        new = (x + weight * (low @ one.projection)).to(h.dtype)
        here = ((start >= 0) & (start < one.first)) | ((end >= 0) & (end < one.last))
        changed = torch.where(here[..., None], new, changed)
    return changed


def require_stacked(active: Setup, name: str, what: str) -> None:
    """For what acts on whole batches, one adapter after the other."""
    block = active.block
    other = [each for each in block.blocks() if not isinstance(each, Stack)] if block else []
    if any(name in list(each) for each in other):
        raise InvalidError(
            f"{clean(name)} {what}, which composes with others by Stack alone",
            hint=f"found in {clean(repr(other[0]))}",
        )

"""What small networks do to the state of a place.

Formulas: adapters 1.3 `methods/modeling.py` (Adapter, ParallelAdapter, BertFusion). Products are in
the dtype of their matrices; norms, gates and trained scales in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from transformers.activations import ACT2FN

from adapterkit.hub.fields import Wiring
from adapterkit.hub.primitives import Bottleneck, Coupling, Fusion

EPS = 1e-5


@dataclass(frozen=True)
class State:
    """h: what the place gives so far (batch, tokens, width). x0: what the layer adds to it.
    norm: what follows that, if anything. up: what the last network made, before it was added.
    last: how that network is wired, which says what follows; None before the first."""

    h: Tensor
    x0: Tensor
    norm: Callable[[Tensor], Tensor] | None = None
    up: Tensor | None = None
    last: Wiring | None = None


def single(state: State, net: Bottleneck, weight: float) -> State:
    z, residual = enter(state, net.wiring)
    up = made(net, z)
    return replace(state, h=joined(net, z, up, residual, weight), up=up, last=net.wiring)


def enter(state: State, wiring: Wiring) -> tuple[Tensor, Tensor]:
    """(z, what is added to the network's output)."""
    if wiring.parallel:
        return state.x0, state.h
    if not wiring.ln_before:
        return state.h, state.h
    total = state.h + state.x0
    z = total if state.norm is None else state.norm(total)
    return z, {"before": state.h, "post_add": total, "after": z}[wiring.residual]


def made(net: Bottleneck, z: Tensor) -> Tensor:
    """scale (up act(down z + b) + b), without gate."""
    inner = _norm(net.norm_before, z)
    hidden = _act(net.act)(_linear(inner, net.down, net.down_bias))
    up = _linear(hidden, net.up, net.up_bias)
    return up if isinstance(net.scale, float) and net.scale == 1 else up * net.scale


def joined(net: Bottleneck, z: Tensor, up: Tensor, residual: Tensor, weight: float) -> Tensor:
    if net.gate is not None:
        scores = torch.sigmoid(_linear(z, net.gate[None, :-1], net.gate[-1:]))
        up = up * scores.mean(dim=1, keepdim=True)  # over all positions, padding too
    if net.norm_after is not None and net.wiring.residual_inside and not net.wiring.parallel:
        return _norm(net.norm_after, up + residual)
    term = _norm(net.norm_after, up)
    return residual + (term if weight == 1 else weight * term)


def coupled(x: Tensor, net: Coupling) -> Tensor:
    half = x.shape[-1] // 2
    first = x[..., :half] + _subnet(x[..., half:], net.F, net.act)
    second = x[..., half:] + _subnet(first, net.G, net.act)
    return torch.cat([first, second], dim=-1).to(x.dtype)


def fused(ups: Sequence[Tensor], fusion: Fusion, query: Tensor, residual: Tensor) -> Tensor:
    """ups: what each joined adapter made of z."""
    values = torch.stack(list(ups), dim=2)
    if fusion.mixing.residual_before:  # of the keys as well: there both are one tensor
        values = values + residual[:, :, None]
    q, k = _affine(query, fusion.query), _affine(values, fusion.key)
    shares = torch.softmax((q[:, :, None] * k).sum(-1).float(), dim=-1).to(k.dtype)
    early = fusion.value is not None and fusion.mixing.before_softmax
    mixed = _linear(values, fusion.value) if early and fusion.value is not None else values
    total = (shares[..., None] * mixed).sum(2)
    if fusion.value is not None and not early:
        total = _linear(total, fusion.value)
    return total if fusion.mixing.residual_before else total + residual


def _affine(x: Tensor, matrix: Tensor | None) -> Tensor:
    return x if matrix is None else _linear(x, matrix[:, :-1], matrix[:, -1])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(x.to(weight.dtype), weight, bias)


def _norm(norm: Tensor | None, x: Tensor) -> Tensor:
    if norm is None:
        return x
    return functional.layer_norm(x.float(), x.shape[-1:], norm[0], norm[1], EPS)


def _subnet(x: Tensor, net: tuple[Tensor, Tensor, Tensor, Tensor], act: str) -> Tensor:
    down, down_bias, up, up_bias = net
    return _linear(_act(act)(_linear(x, down, down_bias)), up, up_bias)


def _act(name: str) -> Callable[[Tensor], Tensor]:
    found: Callable[[Tensor], Tensor] = ACT2FN[name]
    return found

"""What factors make of an input, by the type of module: `project(x, A)` and `expand(z, B)`.

A convolution counts as its matrix (out, in k): k, the size of its kernel, runs fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapterkit.hub.conv1d import is_conv1d

CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}
CONVS = tuple(CONVOLUTIONS)


def is_product(module: nn.Module) -> bool:
    """Whether its output is W x + b, so that what is added to W can be added to the output."""
    return isinstance(module, (nn.Linear, nn.Embedding, *CONVS)) or is_conv1d(module)


def low_rank(module: nn.Module, x: Tensor, a: Tensor, gate: Tensor | None, b: Tensor) -> Tensor:
    """expand(project(x, A) gate, B), shaped like the module's output."""
    if type(module) is nn.Linear:  # most are: no more questions
        z = functional.linear(x.to(a.dtype), a)
        return functional.linear(z if gate is None else z.mul_(gate), b)
    z = project(module, x, a)
    return expand(module, z if gate is None else z.mul_(along(module, gate)), b)


def project(module: nn.Module, x: Tensor, a: Tensor) -> Tensor:
    """A x, (..., r).  x (..., in); token ids (...) for an embedding; for a convolution channels
    stand before the places, and A is as wide as all input channels, whatever its groups."""
    if isinstance(module, nn.Embedding):
        return functional.embedding(x, a.mT)
    if isinstance(module, CONVS):
        layer: Any = module
        kernel = a.reshape(len(a), -1, *layer.kernel_size)
        return _convolution(module)(x.to(a.dtype), kernel, None, layer.stride, layer.padding)
    return functional.linear(x.to(a.dtype), a)


def expand(module: nn.Module, z: Tensor, b: Tensor) -> Tensor:
    """B z, (..., out).  z (..., r)."""
    if isinstance(module, CONVS):
        return _convolution(module)(z, b.reshape(*b.shape, *_ones(module)))
    return _embedded(module, functional.linear(z, b))


def dense(module: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
    """D x, (..., out).  D (out, in)."""
    if isinstance(module, nn.Embedding):
        return _embedded(module, functional.embedding(x, delta.mT))
    if isinstance(module, CONVS):
        layer: Any = module
        settings = layer.stride, layer.padding, layer.dilation, layer.groups
        kernel = delta.reshape(layer.weight.shape)
        return _convolution(module)(x.to(delta.dtype), kernel, None, *settings)
    return functional.linear(x.to(delta.dtype), delta)


def along(module: nn.Module, values: Tensor) -> Tensor:
    """One value for each output, shaped to multiply the module's output."""
    return values.reshape(-1, *_ones(module)) if isinstance(module, CONVS) else values


def embed_scale(module: nn.Module) -> Tensor | None:
    """The factor some families multiply embeddings with (Gemma), or None."""
    scale = getattr(module, "embed_scale", None) if isinstance(module, nn.Embedding) else None
    return torch.as_tensor(scale) if scale is not None else None


def _embedded(module: nn.Module, y: Tensor) -> Tensor:
    return y * scale.to(y.dtype) if (scale := embed_scale(module)) is not None else y


def _convolution(module: nn.Module) -> Callable[..., Tensor]:
    return next(apply for kind, apply in CONVOLUTIONS.items() if isinstance(module, kind))


def _ones(module: nn.Module) -> tuple[int, ...]:
    layer: Any = module
    return (1,) * len(layer.kernel_size)

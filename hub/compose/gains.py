"""Gains, y = rho * (W+ P x + b+), folded once at activation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.hub.primitives import Gain, InputRotation, OutputGain

Fold = Callable[[Tensor | None, float, Tensor], Tensor]


@dataclass(frozen=True)
class Gains:
    """rho (out); steps: what P does to x, in order, each a diagonal (in) or blocks (n, b, b)."""

    rho: Tensor | None = None
    steps: tuple[Tensor, ...] = ()

    @property
    def is_empty(self) -> bool:
        return self.rho is None and not self.steps

    def enter(self, x: Tensor) -> Tensor:
        """P x, in the dtype of x. x (..., in)."""
        turned = x
        for step in self.steps:
            turned = turned * step if step.ndim == 1 else rotate(turned, step)
        return turned.to(x.dtype)

    def leave(self, y: Tensor) -> Tensor:
        return y if self.rho is None else y * self.rho


def rotate(x: Tensor, blocks: Tensor) -> Tensor:
    """Each run of b inputs times its block. x (..., n b), blocks (n or 1, b, b)."""
    runs = x.to(blocks.dtype).reshape(*x.shape[:-1], -1, blocks.shape[-1])
    if len(blocks) == 1:
        return torch.matmul(runs, blocks[0]).flatten(-2)
    return torch.einsum("...nb,nbc->...nc", runs, blocks).flatten(-2)


def fold(gains: Iterable[tuple[float, Gain]], *, summed: bool = False) -> Gains:
    """The product of all gains, each at its weight: 1 + w (l - 1).

    summed: sum w l instead, which PEFT calls a weighted IA3 (peft 0.21 `tuners/ia3/model.py`).
    """
    combine: Fold = _add if summed else _multiply
    rho: Tensor | None = None
    steps: list[Tensor] = []
    for weight, gain in gains:
        if isinstance(gain, OutputGain):
            rho = combine(rho, weight, gain.l)
        elif isinstance(gain, InputRotation):
            _append(steps, gain.R)
        elif steps and steps[-1].ndim == 1:
            steps[-1] = combine(steps[-1], weight, gain.l)
        else:
            steps.append(combine(None, weight, gain.l))
    return Gains(rho, tuple(steps))


def _multiply(total: Tensor | None, weight: float, factor: Tensor) -> Tensor:
    scaled = factor if weight == 1 else 1 + weight * (factor - 1)
    return scaled if total is None else total * scaled


def _add(total: Tensor | None, weight: float, factor: Tensor) -> Tensor:
    return weight * factor if total is None else total + weight * factor


def _append(steps: list[Tensor], blocks: Tensor) -> None:
    """Two rotations in a row are one where their blocks cover the same inputs."""
    if steps and steps[-1].ndim == 3 and steps[-1].shape == blocks.shape:
        steps[-1] = torch.matmul(steps[-1], blocks)
    else:
        steps.append(blocks)

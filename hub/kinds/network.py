"""The small network whose output some kinds store unfinished: linear layers with an activation
between them, evaluated once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapterkit.hub.headers import Stored

if TYPE_CHECKING:
    from torch import Tensor

# what a network of this kind has at least
LAYERS = (0, 2)
Sizes = dict[str, tuple[int | None, ...]]
ACTIVATIONS = ("tanh", "relu", "gelu", "gelu_new", "silu", "sigmoid", "leaky_relu")


def forms(held: Mapping[str, Stored], n_in: int | None, n_out: int | None) -> Sizes:
    """role -> shape of the layers `mlp.0`, `mlp.2`, ..., as far as one follows from the other."""
    found: Sizes = {}
    numbers = range(0, max([*LAYERS, *_numbers(held)]) + 1, 2)
    for number in numbers:
        weight = held.get(f"mlp.{number}.weight")
        shape = weight.shape if weight is not None else ()
        rows = n_out if number == numbers[-1] else shape[0] if len(shape) == 2 else None
        found[f"mlp.{number}.weight"] = (rows, n_in)
        found[f"mlp.{number}.bias"] = (rows,)
        n_in = rows
    return found


def _numbers(held: Mapping[str, object]) -> list[int]:
    parts = (role.split(".") for role in held if role.startswith("mlp."))
    return [int(part[1]) for part in parts if len(part) == 3 and part[1] in ("0", "2", "4")]


def evaluate(x: Tensor, p: Mapping[str, Tensor], activation: str) -> Tensor:
    """x (n, in) through all layers of p, the activation between them, (n, out)."""
    numbers = sorted(set(_numbers(p)))
    for number in numbers:
        x = x @ p[f"mlp.{number}.weight"].mT + p[f"mlp.{number}.bias"]
        if number != numbers[-1]:
            x = _activate(x, activation)
    return x


def _activate(x: Tensor, name: str) -> Tensor:
    from torch.nn import functional

    if name == "gelu_new":
        return functional.gelu(x, approximate="tanh")
    activated: Tensor = getattr(functional, name)(x)
    return activated

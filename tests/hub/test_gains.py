"""y = rho * (W+ P x + b+) on one module, against dense float64 maths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapterkit.hub.compose.here import Current
from adapterkit.hub.compose.patch import Patch
from adapterkit.hub.compose.plan import Weighted
from adapterkit.hub.primitives import (
    BiasShift,
    DenseDelta,
    InputGain,
    InputRotation,
    LowRank,
    OutputGain,
    Primitive,
    Replace,
    RowScale,
)

N_IN, N_OUT, BLOCK = 12, 8, 4
GAINS = (OutputGain, InputGain, InputRotation)
KINDS = (LowRank, RowScale, BiasShift, DenseDelta, Replace, *GAINS)
WEIGHTS = st.floats(-2, 2).map(lambda w: round(w, 3))
QUICK = settings(max_examples=60, deadline=None)


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(N_IN, N_OUT, bias=bias).requires_grad_(False)


def conv1d() -> Conv1D:
    """transformers' transposed linear."""
    torch.manual_seed(0)
    module = Conv1D(N_OUT, N_IN).requires_grad_(False)
    module.weight.normal_()
    module.bias.normal_()
    return module


def draw(kind: type, seed: int) -> Primitive:
    """A random primitive for a module of N_IN inputs and N_OUT outputs."""
    torch.manual_seed(seed)
    match kind.__name__:
        case "LowRank":
            return LowRank(torch.randn(N_OUT, 3), torch.randn(3, N_IN), 0.5)
        case "RowScale" | "BiasShift":
            return kind(torch.randn(N_OUT))
        case "DenseDelta":
            return DenseDelta(torch.randn(N_OUT, N_IN))
        case "Replace":
            return Replace(torch.randn(N_OUT, N_IN))
        case "OutputGain":
            return OutputGain(1 + torch.randn(N_OUT) / 2)
        case "InputGain":
            return InputGain(1 + torch.randn(N_IN) / 2)
        case _:
            n_blocks = 1 if seed % 2 else N_IN // BLOCK
            return InputRotation(torch.linalg.qr(torch.randn(n_blocks, BLOCK, BLOCK)).Q)


# kind -> what it changes the weight w (out, in) by, at weight 1
CHANGES: dict[type, Callable[[Any, Tensor], Tensor]] = {
    LowRank: lambda u, w: u.scale * u.B.double() @ u.A.double(),
    RowScale: lambda u, w: u.g.double()[:, None] * w,
    DenseDelta: lambda u, w: u.D.double(),
    Replace: lambda u, w: u.T.double() - w,
}
# kind -> the matrix (in, in) it multiplies the input with, at its weight
TURNS: dict[type, Callable[[Any, float], Tensor]] = {
    InputGain: lambda u, weight: torch.diag(1 + weight * (u.l.double() - 1)),
    InputRotation: lambda u, _: torch.block_diag(*u.R.double().expand(N_IN // BLOCK, -1, -1)).mT,
}


def dense(w: Tensor, b: Tensor, updates: Sequence[tuple[float, Any]], x: Tensor) -> Tensor:
    """The formula, term by term: w (out, in), b (out), x (..., in), all float64."""
    change, shift = torch.zeros_like(w), torch.zeros_like(b)
    rho, p = torch.ones_like(b), torch.eye(N_IN, dtype=torch.float64)
    for weight, update in updates:
        kind = type(update)
        if kind in CHANGES:
            change += weight * CHANGES[kind](update, w)
        elif kind in TURNS:
            p = TURNS[kind](update, weight) @ p
        elif kind is OutputGain:
            rho *= 1 + weight * (update.l.double() - 1)
        else:
            shift += weight * update.d.double()
    return rho * (x @ p.mT @ (w + change).mT + b + shift)


class Only:
    """A state in which one module has what is given."""

    def __init__(self, plan: Any) -> None:
        self.ready = {"": plan}


def patched(module: nn.Module, updates: Sequence[tuple[float, Primitive]], **rule: bool) -> Patch:
    current: Current[Only | None] = Current(None)
    patch = Patch("", module, current)
    plan = patch.fold([Weighted(w, p) for w, p in updates], **{"sequential": False, **rule})
    current.switch(Only(plan))
    return patch


def run(module: nn.Module, updates: Sequence[tuple[float, Primitive]], x: Tensor) -> Tensor:
    patch = patched(module, updates)
    found: Tensor = module(x)
    patch.remove()
    return found


def close(found: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().clamp(min=1)
    torch.testing.assert_close(found.double() / scale, expected / scale, atol=2e-5, rtol=0)


def as_stored(layer: nn.Module, update: Primitive) -> Primitive:
    """A replaced parameter is given as the module keeps it; all else is (out, in)."""
    turned = isinstance(update, Replace) and isinstance(layer, Conv1D)
    return Replace(update.T.mT) if turned and isinstance(update, Replace) else update


drawn_updates = st.lists(
    st.tuples(WEIGHTS, st.sampled_from(KINDS), st.integers(0, 999)), min_size=1, max_size=6
)


def made(drawn: Sequence[tuple[float, type, int]]) -> list[tuple[float, Primitive]]:
    return [(1.0 if k is InputRotation else w, draw(k, seed)) for w, k, seed in drawn]


@QUICK
@given(drawn=drawn_updates, module=st.sampled_from([linear, conv1d]))
def test_gains_act_outside_the_sum_of_any_mix_of_updates(drawn: Any, module: Any) -> None:
    layer, updates = module(), made(drawn)
    x = torch.randn(2, 3, N_IN, generator=torch.Generator().manual_seed(1))
    w = layer.weight.double() if isinstance(layer, nn.Linear) else layer.weight.double().mT
    stored = [(weight, as_stored(layer, update)) for weight, update in updates]
    close(run(layer, stored, x), dense(w, layer.bias.double(), updates, x.double()))


@QUICK
@given(drawn=drawn_updates, order=st.randoms(use_true_random=False))
def test_all_but_rotations_commute(drawn: Any, order: Any) -> None:
    updates = [(w, p) for w, p in made(drawn) if not isinstance(p, InputRotation)]
    shuffled = order.sample(updates, len(updates))
    x = torch.randn(3, N_IN, generator=torch.Generator().manual_seed(1))
    close(run(linear(), updates, x), run(linear(), shuffled, x).double())


def test_rotations_turn_the_input_in_the_order_given() -> None:
    torch.manual_seed(0)
    a = InputRotation(torch.linalg.qr(torch.randn(3, 4, 4)).Q)
    b = InputRotation(torch.linalg.qr(torch.randn(2, 6, 6)).Q)
    layer, x = linear(), torch.randn(5, N_IN)
    ra, rb = torch.block_diag(*a.R), torch.block_diag(*b.R)
    close(run(layer, [(1, a), (1, b)], x), layer(x @ ra @ rb).double())
    close(run(layer, [(1, b), (1, a)], x), layer(x @ rb @ ra).double())
    assert (run(layer, [(1, a), (1, b)], x) - run(layer, [(1, b), (1, a)], x)).abs().max() > 0.1


def test_a_gain_covers_the_bias_and_what_other_adapters_add_to_it() -> None:
    layer, x = linear(), torch.zeros(1, N_IN)
    half, shift = OutputGain(torch.full((N_OUT,), 0.5)), BiasShift(torch.ones(N_OUT))
    torch.testing.assert_close(run(layer, [(1, half), (1, shift)], x)[0], (layer.bias + 1) / 2)


def test_a_module_without_bias_gets_none() -> None:
    layer, x = linear(bias=False), torch.randn(2, N_IN)
    gain = OutputGain(torch.randn(N_OUT))
    torch.testing.assert_close(run(layer, [(1, gain)], x), layer(x) * gain.l)


def test_an_embedding_is_scaled_and_shifted_by_column() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(20, N_OUT).requires_grad_(False)
    gain, delta = OutputGain(torch.randn(N_OUT)), DenseDelta(torch.randn(N_OUT, 20))
    rows = Replace(torch.randn(2, N_OUT), rows=(3, 7))
    ids = torch.tensor([[3, 4, 7, 0]])
    new = table.weight.clone()
    new[[3, 7]] = rows.T
    expected = (new + 0.5 * delta.D.mT)[ids] * (1 - 2 * (gain.l - 1))
    torch.testing.assert_close(run(table, [(-2, gain), (0.5, delta), (1, rows)], ids), expected)


def test_the_base_is_multiplied_once_whatever_the_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = linear(), []
    product = nn.functional.linear
    monkeypatch.setattr(
        nn.functional,
        "linear",
        lambda x, w, b=None: calls.append(w is layer.weight) or product(x, w, b),
    )
    updates = [(1.0, draw(kind, 2)) for kind in (*GAINS, LowRank, RowScale, BiasShift)]
    run(layer, updates, torch.randn(2, N_IN))
    assert sum(calls) == 1


def test_half_precision_is_rounded_once_at_the_end() -> None:
    layer = linear().bfloat16()
    x = torch.randn(4, N_IN).bfloat16()
    gain = OutputGain(1 + torch.randn(N_OUT))
    found = run(layer, [(1, gain)], x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (layer(x).float() * gain.l).bfloat16())


def test_pefts_weighted_gains_are_sums_of_vectors() -> None:
    """`add_weighted_adapter` of its IA3: l = sum w l, not a product."""
    layer, x = linear(), torch.randn(2, N_IN)
    a, b = (OutputGain(torch.randn(N_OUT)) for _ in "ab")
    expected = layer(x) * (0.6 * a.l + 0.4 * b.l)
    patched(layer, [(0.6, a), (0.4, b)], sequential=True, sum_gains=True)
    torch.testing.assert_close(layer(x), expected)

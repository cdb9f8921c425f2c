"""Rows sorted by their adapters, and multiplied in groups: what each gets with its own factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adapterkit.hub.compose import grouped
from adapterkit.hub.compose.fixed import MAX_ROWS, Board
from adapterkit.hub.compose.grouped import Groups
from adapterkit.hub.compose.routes import ByGates, Gates
from adapterkit.hub.compose.rows import Batch, Layout, Rows
from adapterkit.registry.errors import InvalidError

N_IN, N_OUT, RANK = 16, 24, 8
CPU = torch.device("cpu")


def expected(x: Tensor, y: Tensor, factors: tuple[Tensor, Tensor], slots: list[int | None],
             scales: list[float]) -> Tensor:  # fmt: skip
    """One row after the other, in float64."""
    a, b = (each.double() for each in factors)
    made = [
        y[row].double()
        if slot is None
        else y[row].double() + scales[slot] * (x[row].double() @ a[slot].mT) @ b[slot]
        for row, slot in enumerate(slots)
    ]
    return torch.stack(made)


@settings(deadline=None, max_examples=40)
@given(
    slots=st.lists(st.none() | st.integers(0, 3), min_size=1, max_size=9).filter(
        lambda slots: any(slot is not None for slot in slots)
    ),
    tokens=st.sampled_from([(), (1,), (5,), (2, 3)]),
)
def test_each_row_gets_what_its_own_factors_make(
    slots: list[int | None], tokens: tuple[int, ...]
) -> None:
    draw = torch.Generator().manual_seed(len(slots))
    x = torch.randn(len(slots), *tokens, N_IN, generator=draw)
    y = torch.randn(len(slots), *tokens, N_OUT, generator=draw)
    a, b = (torch.randn(4, RANK, size, generator=draw) for size in (N_IN, N_OUT))
    scales = [1.0, -0.5, 2.0, 0.25]
    groups = Groups.of(slots, torch.tensor(scales)[:, None, None])
    assert groups is not None
    before = y.clone()
    found = groups.added(x, y, a, b)
    wanted = expected(x, y, (a, b), slots, scales).float()
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)
    base = [row for row, slot in enumerate(slots) if slot is None]
    assert torch.equal(found[base], before[base])
    assert torch.equal(y, before)


def test_rows_are_sorted_by_slot_and_those_of_the_base_left_out() -> None:
    groups = Groups.of([2, None, 0, 2, 0], torch.tensor([1.0, 2.0, 3.0]))
    assert groups is not None
    assert groups.order.tolist() == [2, 4, 0, 3]
    assert groups.ends.tolist() == [2, 2, 4]  # nobody has the one in the middle
    assert groups.ends.dtype == torch.int32
    assert groups.scales.tolist() == [[1.0], [1.0], [3.0], [3.0]]
    assert Groups.of([None, None], torch.ones(3)) is None


@pytest.mark.parametrize("shape", [(6, 7), (6,), (6 * 5,)])
def test_a_grouped_product_equals_the_one_with_gates(shape: tuple[int, ...]) -> None:
    """Of inputs (rows, tokens, in), (rows, in) and (rows * tokens, in); a row of 6 has none."""
    rows = Rows((1, 0, 2, 1, 3, 1), Batch())
    rows.batch.rows, rows.batch.length = 6, 5 if shape == (30,) else 7
    spans = ((), ((0, 8, 0.5),), ((8, 16, -2.0),), ((16, 24, 3.0),))
    gates = Gates(spans, (0, 24), CPU, rows)
    draw = torch.Generator().manual_seed(3)
    a, b = (torch.randn(24, size, generator=draw) for size in (N_IN, N_OUT))
    x, y = (torch.randn(*shape, size, generator=draw) for size in (N_IN, N_OUT))
    module = nn.Linear(N_IN, N_OUT, bias=False)
    gated = ByGates("up", gates, a, b)
    wanted = gated.added(module, x, y)
    groups = gates.groups(rows.within(x.shape, "up"))
    assert groups is not None
    found = groups.added(x, y, a.view(3, RANK, N_IN), b.view(3, RANK, N_OUT))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)


def test_rows_with_several_adapters_or_of_several_ranks_are_not_grouped() -> None:
    rows = Rows((0, 1), Batch())
    sums = Gates((((0, 8, 1.0), (8, 16, 1.0)), ((0, 8, 1.0),)), (0, 16), CPU, rows)
    ranks = Gates((((0, 8, 1.0),), ((8, 24, 1.0),)), (0, 24), CPU, rows)
    assert sums.groups(Layout(2, 1)) is None
    assert ranks.groups(Layout(2, 1)) is None


def test_bf16_rows_are_within_two_steps_of_their_own_product() -> None:
    slots: list[int | None] = [1, None, 0, 1]
    draw = torch.Generator().manual_seed(5)
    half = {"generator": draw, "dtype": torch.bfloat16}
    x, y = (torch.randn(4, 3, size, **half) for size in (N_IN, N_OUT))
    a, b = (torch.randn(2, RANK, size, **half) / 4 for size in (N_IN, N_OUT))
    groups = Groups.of(slots, torch.tensor([0.5, 1.5]))
    assert groups is not None
    found = groups.added(x, y, a, b)
    assert found.dtype == torch.bfloat16
    wanted = expected(x, y, (a, b), slots, [0.5, 1.5]).float()
    torch.testing.assert_close(found.float(), wanted, atol=2**-6, rtol=2**-7)


def test_what_rows_were_kept_in_inference_mode_serves_gradients_later() -> None:
    rows = Rows((0, 1), Batch())
    gates = Gates((((0, 8, 1.0),), ((8, 16, 2.0),)), (0, 16), CPU, rows)
    with torch.inference_mode():
        groups = gates.groups(Layout(2, 1))
        members = dict(rows.members(Layout(2, 1), CPU))
    assert groups is not None
    x = torch.ones(2, 1, N_IN, requires_grad=True)
    a, b = torch.ones(2, RANK, N_IN), torch.ones(2, RANK, N_OUT)
    groups.added(x, x.new_zeros(2, 1, N_OUT), a, b).sum().backward()
    assert x.grad is not None
    assert x.grad[:, 0, 0].tolist() == [RANK * N_OUT, 2 * RANK * N_OUT]
    x[members[1]].sum().backward()


def test_the_reference_runs_where_there_is_no_kernel() -> None:
    """On a CPU, whatever the dtype; nothing asks a device that is not there."""
    a, b = (torch.zeros(512, size, dtype=torch.bfloat16) for size in (N_IN, N_OUT))
    assert not grouped.pays(a, b, RANK)


def test_rows_of_a_mix_are_made_once_and_in_order() -> None:
    rows = Rows((1, 0, 1), Batch())
    found = {mix: index.tolist() for mix, index in rows.members(Layout(3, 2), CPU)}
    assert found == {0: [2, 3], 1: [0, 1, 4, 5]}
    again = [index for _, index in rows.members(Layout(3, 2), CPU)]
    once = [index for _, index in rows.members(Layout(3, 2), CPU)]
    assert all(one is other for one, other in zip(again, once, strict=True))


def test_reserved_memory_tells_beams_and_tokens_from_rows() -> None:
    board = Board(torch.zeros(MAX_ROWS, dtype=torch.long))
    board.set([1, 0, 2])
    found = [board.index(rows, "up") for rows in (3, 6)]
    assert [each if each is None else each.tolist() for each in found] == [
        [1, 0, 2],
        [1, 1, 0, 0, 2, 2],
    ]
    with pytest.raises(InvalidError, match="up got 4 rows, and 3 are routed"):
        board.index(4, "up")


def test_a_graph_recorded_with_rows_has_the_first_mix_once_nothing_is_routed() -> None:
    board = Board(torch.zeros(MAX_ROWS, dtype=torch.long))
    board.set([1, 0, 2])
    recorded = board.index(3, "up")
    board.set(None)
    assert recorded is not None
    assert recorded.tolist() == [0, 0, 0]
    unrouted = board.index(3, "up")
    board.set([2, 1, 1])
    assert unrouted is not None
    assert unrouted.tolist() == recorded.tolist() == [2, 1, 1]

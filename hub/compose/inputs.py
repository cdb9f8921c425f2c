"""What a forward is called with, once tokens and keys stand in front of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from adapterkit.registry.errors import InvalidError

Call = dict[str, Any]
IGNORED = -100
# Families whose positions follow from the mask.
BY_MASK = {"bloom"}


def shape(call: Call, prefix: str = "") -> tuple[int, int]:
    """(batch, length) of the tokens, given as ids or as vectors."""
    for name in (f"{prefix}input_ids", f"{prefix}inputs_embeds"):
        if (value := call.get(name)) is not None:
            return value.shape[0], value.shape[1]
    raise InvalidError(f"neither {prefix}input_ids nor {prefix}inputs_embeds is given")


def extend_mask(call: Call, name: str, n: int, expected: int, like: Tensor) -> None:
    """n ones in front of a mask; one of ones if there is none. expected: its length so far."""
    mask = call.get(name)
    if mask is None:
        call[name] = torch.ones((like.shape[0], n + expected), dtype=torch.long, device=like.device)
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        about = f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise InvalidError(
            f"{name} has {about}, but with prefixes or virtual tokens it takes (batch, length)"
        )
    if mask.shape[1] != expected:
        raise InvalidError(
            f"{name} has {mask.shape[1]} positions, expected {expected}: those in the cache that"
            " are not virtual, and those of the input"
        )
    call[name] = torch.cat([mask.new_ones((mask.shape[0], n)), mask], dim=1)


def require_room(positions: int, config: Any, reserved: int) -> None:
    """Raises InvalidError if the model has no position for the last one."""
    room = getattr(config, "max_position_embeddings", None)
    if isinstance(room, int) and 0 < room < positions + reserved:
        raise InvalidError(
            f"{positions} positions, virtual ones included, but max_position_embeddings is {room}"
            + (f", {reserved} of them reserved" if reserved else "")
        )


def flag(embeds: Tensor, rows: Tensor, flags: object) -> Tensor:
    """The embedded tokens with rows (n, width) instead of the n that each row of flags marks."""
    batch, length = embeds.shape[:2]
    if not isinstance(flags, Tensor) or flags.ndim != 2 or flags.shape[0] != batch:
        raise InvalidError(
            "an active P-Tuning adapter stands where block_flag is 1: give it, (batch, length),"
            f" to the model; found {type(flags).__name__}"
        )
    marks = flags.to(embeds.device) == 1
    if length > marks.shape[1]:  # tokens generated since, without a cache
        marks = torch.nn.functional.pad(marks, (0, length - marks.shape[1]))
    counts = marks.sum(1).tolist()
    if marks.shape[1] != length or any(count != len(rows) for count in counts):
        raise InvalidError(
            f"block_flag marks {counts} of {marks.shape[1]} positions, expected {len(rows)} in each"
            f" row of {length}"
        )
    order = (marks.long().cumsum(1) - 1).clamp(min=0)
    placed = rows.to(embeds.device, embeds.dtype)[order]
    return torch.where(marks[..., None], placed, embeds)


def put_in_front(call: Call, rows: Tensor, embeds: Tensor) -> None:
    """rows (n, width) before the embedded tokens, whose type is 0."""
    n, batch = len(rows), embeds.shape[0]
    front = rows.to(embeds.device, embeds.dtype).expand(batch, *rows.shape)
    call["inputs_embeds"], call["input_ids"] = torch.cat([front, embeds], dim=1), None
    if (types := call.get("token_type_ids")) is not None:
        call["token_type_ids"] = torch.cat([types.new_zeros((batch, n)), types], dim=1)


def shift_positions(call: Call, shift: int, n_rows: int) -> None:
    """Positions the caller gave, behind `shift` others, the last n_rows of which are in the input
    now."""
    given = call.get("position_ids")
    if given is None:
        return
    if given.ndim != 2:
        raise InvalidError(f"position_ids have {given.ndim} dimensions, expected (batch, length)")
    rows = torch.arange(shift - n_rows, shift, device=given.device, dtype=given.dtype)
    call["position_ids"] = torch.cat([rows.expand(given.shape[0], -1), given + shift], dim=1)


def require_aligned(call: Call, family: str) -> None:
    """Raises InvalidError for rows padded on the left, where nothing can say where they start."""
    mask = call.get("attention_mask")
    padded = isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask[:, 0] == 0).any())
    if padded and family not in BY_MASK:
        raise InvalidError(
            f"{family} takes no position_ids, so that behind a prefix or a prompt rows that are"
            " padded on the left cannot stand where shorter ones would",
            hint="pad on the right, or give rows of one length",
        )


def extend_labels(call: Call, rows: Iterable[tuple[int, int]]) -> bool:
    """Whether tokens have labels; virtual ones, (start, number), get one that counts nowhere."""
    labels = call.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return False
    for start, n in rows:
        none = labels.new_full((labels.shape[0], n), IGNORED)
        labels = torch.cat([labels[:, :start], none, labels[:, start:]], dim=1)
    call["labels"] = labels
    return True


def shift_spans(call: Call, rows: Iterable[tuple[int, int]]) -> None:
    """Where answers start and end, behind virtual tokens, if outputs have positions for those."""
    n = sum(number for _, number in rows)
    for name in ("start_positions", "end_positions"):
        if n and isinstance(call.get(name), Tensor):
            call[name] = call[name] + n

"""What a forward is called with, once tokens and keys stand in front of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapterkit.registry.errors import InvalidError

Call = dict[str, Any]
IGNORED = -100
# Families whose positions follow from the mask, or from distances alone, and which take none; and
# those that make them from the mask unless they are given.
BY_MASK, BY_DISTANCE, FROM_MASK = {"bloom"}, {"mpt"}, {"opt", "biogpt"}


def shape(call: Call, prefix: str = "") -> tuple[int, int]:
    """(batch, length) of the tokens, given as ids or as vectors."""
    for name in (f"{prefix}input_ids", f"{prefix}inputs_embeds"):
        if (value := call.get(name)) is not None:
            return value.shape[0], value.shape[1]
    raise InvalidError(f"neither {prefix}input_ids nor {prefix}inputs_embeds is given")


def tokens(call: Call) -> Tensor:
    """As ids or as vectors."""
    ids: Tensor | None = call.get("input_ids")
    embeds: Tensor = call["inputs_embeds"] if ids is None else ids
    return embeds


def extend_mask(call: Call, name: str, seen: Tensor, expected: int, like: Tensor) -> None:
    """seen (rows or 1, n) in front of a mask, of ones if there is none; expected: its length so
    far."""
    mask = call.get(name)
    if mask is None:
        mask = torch.ones((like.shape[0], expected), dtype=torch.long, device=like.device)
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
    call[name] = torch.cat([seen.to(mask.device, mask.dtype).expand(len(mask), -1), mask], dim=1)


def require_room(positions: int, config: Any, reserved: int) -> None:
    """Raises InvalidError if the model has no position for the last one."""
    room = getattr(config, "max_position_embeddings", None)
    if isinstance(room, int) and 0 < room < positions + reserved:
        raise InvalidError(
            f"{positions} positions, virtual ones included, but max_position_embeddings is {room}"
            + (f", {reserved} of them reserved" if reserved else "")
        )


def require_near(positions: int, config: Any) -> None:
    """Raises InvalidError if not all positions see each other, where they are counted with those
    that only other rows have."""
    windows = (getattr(config, name, None) for name in ("sliding_window", "window_size"))
    window = next((size for size in windows if isinstance(size, int) and size > 0), positions)
    if window < positions:
        raise InvalidError(
            f"{positions} positions, but a window of {window}: behind it, rows with a prefix cannot"
            " see as far beside rows with more virtual tokens as they see alone",
            hint="route prefixes and prompts in batches of their own",
        )


def flag(embeds: Tensor, rows: Tensor, wanted: Tensor, flags: object) -> Tensor:
    """The embedded tokens with `rows` instead of those that flags marks.  rows (batch or 1, n,
    width), of which wanted (batch or 1) count."""
    batch, length = embeds.shape[:2]
    if not isinstance(flags, Tensor) or flags.ndim != 2 or flags.shape[0] != batch:
        raise InvalidError(
            "an active P-Tuning adapter stands where block_flag is 1: give it, (batch, length),"
            f" to the model; found {type(flags).__name__}"
        )
    wanted = wanted.expand(batch)
    marks = (flags.to(embeds.device) == 1) & (wanted > 0)[:, None]
    if length > marks.shape[1]:  # tokens generated since, without a cache
        marks = torch.nn.functional.pad(marks, (0, length - marks.shape[1]))
    counts = marks.sum(1)
    if marks.shape[1] != length or not torch.equal(counts, wanted):
        raise InvalidError(
            f"block_flag marks {counts.tolist()} of {marks.shape[1]} positions, expected"
            f" {wanted.tolist()} of {length}"
        )
    order = (marks.long().cumsum(1) - 1).clamp(min=0)
    rows = rows.to(embeds.dtype).expand(batch, -1, -1)
    placed = rows[torch.arange(batch, device=embeds.device)[:, None], order]
    return torch.where(marks[..., None], placed, embeds)


def put_in_front(call: Call, rows: Tensor, embeds: Tensor) -> None:
    """rows (batch or 1, n, width) before the embedded tokens, whose type is 0."""
    batch, n = len(embeds), rows.shape[1]
    front = rows.to(embeds.device, embeds.dtype).expand(batch, -1, -1)
    call["inputs_embeds"], call["input_ids"] = torch.cat([front, embeds], dim=1), None
    if (types := call.get("token_type_ids")) is not None:
        call["token_type_ids"] = torch.cat([types.new_zeros((batch, n)), types], dim=1)


def rolled(values: Tensor, by: Tensor) -> Tensor:
    """values (rows or 1, length, ...), the first `by` (rows or 1) of each row put behind the
    rest."""
    count, length = max(len(values), len(by)), values.shape[1]
    index = (torch.arange(length, device=values.device) + by[:, None]) % length
    every = torch.arange(count, device=values.device)[:, None]
    return values.expand(count, *values.shape[1:])[every, index.expand(count, -1)]


def positions(call: Call, family: str, past: int, padding: int | None, vectors: Tensor) -> Tensor:
    """Those that the library would give, (batch or 1, length), behind `past` tokens. padding: where
    they start behind that of padding; vectors (batch or 1): whose tokens are embedded already."""
    ids, mask = call.get("input_ids"), call.get("attention_mask")
    like = tokens(call)
    counted = torch.arange(past, past + like.shape[1], device=like.device)[None]
    if family in FROM_MASK and isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask.long().cumsum(1) * mask.long() - 1)[:, past:]
    if padding is None:
        return counted
    counted = counted + padding + 1
    if ids is None:
        return counted
    real = (ids != padding).long()
    return torch.where(vectors[:, None], counted, (real.cumsum(1) + past) * real + padding)


def shift_positions(call: Call, shift: Tensor, n_rows: int, start: int) -> None:
    """Positions the caller gave, behind `shift` (batch or 1) others, the last n_rows of which are
    in the input now; start: the first there is."""
    given = call.get("position_ids")
    if given is None:
        return
    if given.ndim != 2:
        raise InvalidError(f"position_ids have {given.ndim} dimensions, expected (batch, length)")
    shift = shift.to(given.device, given.dtype)[:, None]
    rows = torch.arange(-n_rows, 0, device=given.device, dtype=given.dtype)
    front, moved = (rows + shift).clamp(min=0) + start, given + shift
    call["position_ids"] = torch.cat([front.expand(len(moved), -1), moved], dim=1)


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


def extended(labels: Tensor, seats: Tensor, n: int) -> Tensor:
    """Labels at the seats (batch or 1, length) of real tokens, and at n virtual ones a label that
    counts nowhere."""
    batch, length = labels.shape
    made = labels.new_full((batch, length + n), IGNORED)
    return made.scatter_(1, seats.to(labels.device).expand(batch, -1), labels)


def shift_spans(call: Call, n: int) -> None:
    """Where answers start and end, behind n virtual tokens, if outputs have positions for those."""
    for name in ("start_positions", "end_positions"):
        if n and isinstance(call.get(name), Tensor):
            call[name] = call[name] + n

"""The forward that runs, and its tokens as vectors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adapterkit.hub.compose import inputs
from adapterkit.hub.compose.here import Here
from adapterkit.hub.compose.inputs import Call
from adapterkit.hub.compose.standing import Standing


class Running(Here):
    """starts: whether it is the first of its sequence; entered: whether the body took part in it;
    labels: whether it has labels, which virtual positions share."""

    flags: object = None
    starts: bool = False
    entered: bool = False
    labels: bool = False


def embedded(call: Call, stack: Any, found: Standing, flags: object) -> Tensor:
    """The tokens as vectors, those that the caller marked replaced."""
    embeds: Tensor | None = call.get("inputs_embeds")
    if embeds is None:
        embeds = stack.get_input_embeddings()(call["input_ids"])
    if found.n_flagged:
        batch, device = len(embeds), embeds.device
        rows = found.spread(found.flagged, batch, device)
        wanted = found.spread(found.numbers(lambda mix: mix.n_flagged), batch, device)
        embeds = inputs.flag(embeds, rows, wanted, flags)
    call["inputs_embeds"], call["input_ids"] = embeds, None
    return embeds

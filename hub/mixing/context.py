"""Prompts, or prefixes, one behind the other in the order given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import Base
from adapterkit.hub.formats import peft_write
from adapterkit.hub.formats.peft_write import Part, Place
from adapterkit.hub.mixing import parameters, replaced
from adapterkit.hub.mixing.inputs import Input
from adapterkit.hub.mixing.options import Options
from adapterkit.hub.mixing.result import KEEP, parts_of, require, result, variant
from adapterkit.hub.mixing.written import Blend, common
from adapterkit.registry.errors import InvalidError, MismatchError

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("sum", "average")
Written = tuple[dict[str, bytes], dict[Place, Part]]
# kind -> PEFT's type for it as it is stored there, and the role of its one tensor
STORED = {"prefix": ("PREFIX_TUNING", "self.prefix"), "prompt": ("PROMPT_TUNING", "rows")}
# Fields of PEFT's config besides the length: of the base, so that all have to say the same.
SIZES = ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")
LENGTH = "num_virtual_tokens"
# What AdapterHub's library calls the length.
WORDS = {"prefix": "prefix_length", "prompt": "prompt_length"}


def blended(inputs: Sequence[Input], base: Base | None, chosen: Options) -> Blend:
    """What the inputs do attached together at weight 1. Raises InvalidError for other weights."""
    require(inputs, chosen, METHODS)
    if chosen.method == "average":
        return parameters.blended(inputs, base, chosen)
    ordered = sorted(inputs, key=lambda one: one.given)
    _require_whole(ordered)
    live = [one for one in ordered if one.weight]
    if not live:
        raise InvalidError("nothing is left: all weights are 0")
    kinds = {one.adapter.kind for one in live}
    if len(kinds) > 1:
        raise InvalidError(f"{', '.join(map(variant, live))}: no type of PEFT has both", hint=KEEP)
    own = all(one.adapter.format == "adapterhub" for one in live)
    files, parts = (_for_library if own else _for_peft)(live, base, chosen)
    return result(ordered, base, chosen, files, parts)


def _for_peft(inputs: Sequence[Input], base: Base | None, chosen: Options) -> Written:
    name, role = STORED[inputs[0].adapter.kind]
    plain = [_plain(one, base) for one in inputs]
    sizes = _sizes(inputs, plain)
    tensors: dict[Place, Tensor] = {("", role): _joined(plain, role)}
    parts = parts_of(tensors | replaced.blended(inputs), chosen)
    own = {"peft_type": name, LENGTH: sum(each.fields.length for each in plain), **sizes}
    about = common(inputs)
    task = about.task or next((each.task for each in plain if each.task), None)
    return peft_write.files(peft_write.config_of(about, own, (), task), parts), parts


def _for_library(inputs: Sequence[Input], base: Base | None, chosen: Options) -> Written:
    parts = parts_of(_lengthened(inputs), chosen)
    length = sum(one.adapter.fields.length for one in inputs)
    return parameters.files(inputs, parts, **{WORDS[inputs[0].adapter.kind]: length}), parts


def _require_whole(inputs: Sequence[Input]) -> None:
    half = [f"{variant(one)}={one.weight:g}" for one in inputs if one.weight not in (0, 1)]
    if half:
        raise InvalidError(
            f"{', '.join(half)}: tokens are attended to or they are not, so that a prompt or a"
            " prefix takes weight 1, or 0",
            hint="--method average averages the tensors of like ones",
        )


def _lengthened(inputs: Sequence[Input]) -> dict[Place, Tensor]:
    """Rows of all, as AdapterHub's library stores them, which has other positions than PEFT.
    Raises InvalidError for rows that a network makes."""
    import torch

    if len(inputs) == 1:
        return parameters.tensors_of(inputs)
    place = ("", STORED[inputs[0].adapter.kind][1])
    odd = [variant(one) for one in inputs if one.tensors.keys() != {place}]
    if odd:
        raise InvalidError(
            f"{', '.join(odd)}: a network, a gate or a head belongs to it, so that it has no rows"
            " that could stand behind others",
            hint=KEEP,
        )
    if any(_meaning(one, place) != _meaning(inputs[0], place) for one in inputs):
        shown = ", ".join(map(variant, inputs))
        raise MismatchError(f"{shown}: not for one model, or not at one place in it", hint=KEEP)
    return {place: torch.cat([one.tensors[place] for one in inputs])}


def _meaning(one: Input, place: Place) -> dict[str, Any]:
    """All but how many rows there are."""
    fields = vars(one.adapter.fields)
    own = {name: value for name, value in fields.items() if name not in ("length", "stored")}
    width = one.tensors[place].numel() / fields["length"]
    return {**own, **one.adapter.requires, "row": width}


def _plain(one: Input, base: Base | None) -> Adapter:
    """As PEFT stores it: rows alone. Raises NeedsBaseError for what other tools wrote."""
    if one.adapter.format == "peft":
        return one.adapter
    from adapterkit.hub.exporting import exported

    try:
        return exported(one.folder, "peft", base).adapter
    except InvalidError as error:
        if error.hint is None:
            error.hint = KEEP
        raise


def _sizes(inputs: Sequence[Input], plain: Sequence[Adapter]) -> dict[str, Any]:
    """What the configs say of the base. Raises InvalidError where they contradict each other."""
    found: dict[str, Any] = {}
    for one, adapter in zip(inputs, plain, strict=True):
        for field in SIZES:
            value = adapter.config.get(field)
            seen = found.setdefault(field, value)
            if value is not None and seen not in (None, value):
                raise InvalidError(
                    f"{variant(one)}: {field} is {value}, expected {seen} as in the others",
                    hint=KEEP,
                )
            found[field] = value if seen is None else seen
    return {field: value for field, value in found.items() if value is not None}


def _joined(plain: Sequence[Adapter], role: str) -> Tensor:
    """The rows of all. What was made for an encoder and a decoder has them twice."""
    import torch

    from adapterkit.hub.tensors import read_finite

    copies = [getattr(each.fields, "stored", each.fields.length) // each.fields.length
              for each in plain]  # fmt: skip
    every = [read_finite(each)["", role] for each in plain]
    widths = {rows.shape[1] for rows in every}
    if len(widths) > 1 or len(set(copies)) > 1:
        raise InvalidError(f"the adapters are made for models of different sizes: {widths}")
    apart = [rows.reshape(n, -1, rows.shape[1]) for rows, n in zip(every, copies, strict=True)]
    return torch.cat(apart, dim=1).flatten(0, 1)

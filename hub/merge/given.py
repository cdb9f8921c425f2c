"""The adapters of a merge, each with its weight; of a recipe, its parts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.folder import tokenizer_digest
from adapterkit.hub.compose.admit import Options as Attach
from adapterkit.hub.findings import clean
from adapterkit.hub.gather import Asked, Found, gather
from adapterkit.hub.locate import Source
from adapterkit.hub.made import input_of
from adapterkit.hub.merge.options import Options
from adapterkit.hub.recipes import is_recipe
from adapterkit.hub.task import for_task
from adapterkit.hub.unfold import unfold
from adapterkit.registry.errors import AdapterWarning, InvalidError, MismatchError

Adapters = Mapping[str, float] | Sequence[Source] | Source


@dataclass(frozen=True)
class Given:
    found: Found
    weight: float

    def record(self) -> dict[str, Any]:
        """What a recipe says of it."""
        one = self.found
        return {"weight": self.weight, **input_of(one.folder, one.adapter)}


def given(adapters: Adapters, options: Options) -> list[Given]:
    """Those with a weight other than 0. Raises InvalidError if there are none."""
    attach = Attach(registry=options.registry, allow_fields=options.allow_fields)
    found = gather(adapters, attach)
    asked = list({one.asked.name: one.asked for one in found}.values())
    weights = [weight for each in asked for weight in _weights(each, options)]
    kept = [Given(one, weight) for one, weight in zip(found, weights, strict=True) if weight]
    if not kept:
        raise InvalidError("no adapter is given with a weight other than 0: there is no merge")
    for each in kept:
        each.found.adapter.require_sound()
    return kept


def _weights(asked: Asked, options: Options) -> list[float]:
    if not is_recipe(asked.folder):
        return [asked.weight]
    inside = unfold(asked.folder, options.registry)
    if inside.composition is not None:
        raise InvalidError(
            f"{clean(asked.name)} composes its parts in blocks, which no weight equals",
            hint="attach it: adapterkit.hub.load(BASE, adapters)",
        )
    if inside.dialect != options.dialect:
        raise InvalidError(
            f"{clean(asked.name)} is a recipe in the dialect {inside.dialect}, the merge is in"
            f" {options.dialect}"
        )
    return [asked.weight * leaf.weight for leaf in inside.leaves]


def class_of(every: Sequence[Given], stored: Base) -> Base:
    """The base as the class that the adapters' task asks for."""
    found = [for_task(stored, one.found.adapter) for one in every]
    classes = {one.architecture: one for one in found}
    if len(classes) > 1:
        raise MismatchError(f"the adapters ask for different models: {', '.join(sorted(classes))}")
    return found[0]


def mention_tokenizers(every: Sequence[Given], base: Base) -> None:
    for one in every:
        own = tokenizer_digest(one.found.folder)
        if own is not None and own != base.tokenizer:
            warnings.warn(
                f"{clean(one.found.name)} brings its own tokenizer, which differs from the base's:"
                " the merged model has the base's, copy the adapter's over it where that is right",
                AdapterWarning,
                stacklevel=5,
            )

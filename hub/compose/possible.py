"""What a model needs to have for prefixes and virtual tokens to stand before its input."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from adapterkit.hub.compose.fronts import LAYER_TYPES
from adapterkit.hub.compose.inputs import BY_DISTANCE, BY_MASK
from adapterkit.hub.compose.lowering import Lowered
from adapterkit.hub.compose.sides import has_bias
from adapterkit.hub.compose.standing import Standing
from adapterkit.hub.findings import clean
from adapterkit.registry.errors import InvalidError, MismatchError

SEEN = "past_key_values_length"
# Ends of the classes that label a sequence as a whole.
WHOLE = ("ForSequenceClassification", "ForMultipleChoice")


def require_possible(model: Any, found: Standing) -> None:
    """Raises MismatchError that says what it lacks."""
    if not isinstance(model, PreTrainedModel):
        raise MismatchError("prefixes and virtual tokens need a model of transformers")
    body = body_of(model)
    pair, name = bool(model.config.is_encoder_decoder), type(body).__name__
    if not pair and model.config.get_text_config(decoder=True) is not model.config:
        raise MismatchError(f"{name} is more than a model of text: it takes no prefix")
    takes = inspect.signature(body.forward).parameters
    unmoved = any(mix.n_keys > mix.n_shifting for mix in found.mixes)
    biased = any(has_bias(model.get_submodule(path)) for path in found.own)
    lacks = [
        (bool(found.own), "past_key_values" in takes, "takes no past_key_values"),
        (found.shift > 0, pair or "inputs_embeds" in takes, "takes no inputs_embeds"),
        (found.has_embedded, not pair and hasattr(body, "embeddings"), "has no embedding block"),
        (unmoved, biased if pair else "position_ids" in takes, "takes no position_ids"),
    ]
    for needed, there, lack in lacks:
        if needed and not there:
            raise MismatchError(f"{name} {lack}, which the active prefix or prompt needs")


def require_routable(model: Any, found: Standing) -> None:
    """Raises InvalidError naming what keeps rows with less in front from being what they are
    alone."""
    body = body_of(model)
    family, name = model.config.model_type, type(body).__name__
    takes = inspect.signature(body.forward).parameters
    shifts = {mix.shift for mix in found.mixes}
    if model.config.is_encoder_decoder:
        moved = len({mix.n_shifting for mix in found.mixes}) > 1
        counts = bool(_is_biased(model) or places(model))
        lacks = [(moved, counts, "counts the positions of all rows alike")]
    else:
        by_mask = family in BY_MASK
        hides = encodes(model, body) or _attends(model, takes)
        follows = by_mask or family in BY_DISTANCE or _is_biased(model)
        lacks = [
            (found.is_padded, "attention_mask" in takes, "takes no attention_mask"),
            (found.is_padded, hides, "does more than attend"),
            (len(shifts) > 1, "position_ids" in takes or follows, "takes no position_ids"),
            (found.has_gap, "position_ids" in takes or by_mask, "takes no position_ids"),
        ]
    for needed, there, lack in lacks:
        if needed and not there:
            raise InvalidError(
                f"{name} {lack}, so that rows with prefixes or prompts of other lengths cannot"
                " share a batch",
                hint="route them in batches of their own",
            )


def require_no_means(setups: Iterable[Iterable[str]], lowered: Mapping[str, Lowered]) -> None:
    """Raises InvalidError naming an adapter with a gate, which is a mean over all positions.
    setups: of rows that have padding in front of their own."""
    for name in (name for setup in setups for name in setup):
        for primitive in (p for made in lowered[name].updates.values() for p in made):
            if getattr(primitive, "gate", None) is not None:
                raise InvalidError(
                    f"{clean(name)} has a gate, which is a mean over all positions: it cannot share"
                    " a batch with rows that have more virtual tokens",
                    hint="route it in a batch of its own",
                )


def body_of(model: Any) -> Any:
    """What the model puts its head on: in some families the only stack of a pair."""
    body = model.base_model
    return body if model.config.is_encoder_decoder else getattr(body, "decoder", body)


def labels_whole(model: Any) -> bool:
    """Whether it labels a sequence as a whole."""
    return type(model).__name__.endswith(WHOLE)


def block_of(body: Any) -> Any:
    """What embeds the tokens and gives them positions, where that is one module."""
    return getattr(body, "embeddings", None)


def encodes(model: Any, body: Any) -> bool:
    """Whether every token sees all others, so that nothing is kept for later ones."""
    return block_of(body) is not None and not getattr(model.config, "is_decoder", False)


def places(model: Any) -> Any:
    """The module that gives the decoder of a pair its positions, if it is told of the cache."""
    module = getattr(model.get_decoder(), "embed_positions", None)
    takes = () if module is None else inspect.signature(module.forward).parameters
    return module if SEEN in takes else None


def _is_biased(model: Any) -> bool:
    return any(has_bias(module) for module in model.modules())


def _attends(model: Any, takes: Any) -> bool:
    """Whether layers of a decoder see earlier tokens by attention alone, which a mask keeps from
    padding."""
    types = set(getattr(model.config, "layer_types", None) or ())
    cached = "past_key_values" in takes or _is_biased(model)
    return cached and types <= LAYER_TYPES | {"chunked_attention"}


def require_kept(body: Any, found: Standing) -> None:
    """Raises InvalidError where layers would leave out the cache that keys in front stand in, as
    transformers' do while they check-point activations."""
    if not body.training or not (found.own or found.sides):
        return
    if any(getattr(each, "gradient_checkpointing", False) for each in body.modules()):
        raise InvalidError(
            "gradient checkpointing leaves out the cache, which the active prefix stands in",
            hint="model.gradient_checkpointing_disable(), or model.eval()",
        )

"""What a model needs to have for prefixes and virtual tokens to stand before its input."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedModel

from adapterkit.hub.compose.sides import has_bias
from adapterkit.hub.compose.standing import Standing
from adapterkit.registry.errors import InvalidError, MismatchError


def require_possible(model: Any, body: Any, found: Standing) -> None:
    """Raises MismatchError that says what it lacks. body: what its head is put on."""
    if not isinstance(model, PreTrainedModel):
        raise MismatchError("prefixes and virtual tokens need a model of transformers")
    pair, name = bool(model.config.is_encoder_decoder), type(body).__name__
    if not pair and model.config.get_text_config(decoder=True) is not model.config:
        raise MismatchError(f"{name} is more than a model of text: it takes no prefix")
    takes = inspect.signature(body.forward).parameters
    unmoved = found.n_keys > found.n_shifting
    biased = any(has_bias(model.get_submodule(path)) for path in found.layers)
    lacks = [
        (bool(found.prefixes), "past_key_values" in takes, "takes no past_key_values"),
        (found.shift > 0, pair or "inputs_embeds" in takes, "takes no inputs_embeds"),
        (bool(found.embedded), not pair and hasattr(body, "embeddings"), "has no embedding block"),
        (unmoved, biased if pair else "position_ids" in takes, "takes no position_ids"),
    ]
    for needed, there, lack in lacks:
        if needed and not there:
            raise MismatchError(f"{name} {lack}, which the active prefix or prompt needs")


def require_kept(body: Any, found: Standing) -> None:
    """Raises InvalidError where layers would leave out the cache that keys in front stand in, as
    transformers' do while they check-point activations."""
    if not body.training or not (found.prefixes or found.sides):
        return
    if any(getattr(each, "gradient_checkpointing", False) for each in body.modules()):
        raise InvalidError(
            "gradient checkpointing leaves out the cache, which the active prefix stands in",
            hint="model.gradient_checkpointing_disable(), or model.eval()",
        )

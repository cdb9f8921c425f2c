"""Adapters put on a live transformers model, and the handle of those that are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from adapterkit.hub.compose.admit import Options, refined
from adapterkit.hub.compose.handle import HANDLE, Adapters
from adapterkit.hub.compose.here import recompile
from adapterkit.hub.compose.model import describe_model
from adapterkit.hub.compose.patch import Patch
from adapterkit.hub.locate import Source, named
from adapterkit.registry.errors import ConflictError, InvalidError


def attach(
    model: nn.Module,
    adapters: Mapping[str, Source] | Sequence[Source] | Source = (),
    *,
    options: Options | None = None,
    **settings: Any,
) -> Adapters:
    """Attaches adapters to a transformers model and activates each with weight 1, but a fusion,
    which acts in a Fuse alone.

    adapters: names -> references or folders, or a plain list of them. settings: the fields of
    Options (registry, dtype, strict, allow_fields, dialect, virtual_outputs).
    Raises MismatchError with all findings, before anything is copied, if one does not fit.
    """
    chosen = refined(options, settings)
    _refuse_wrapped(model)
    base = describe_model(model)
    sources = named(adapters)
    if chosen.slots is None:
        chosen = replace(chosen, slots=max(len(sources), 1))
    found = Adapters(model, base, chosen)
    for name, source in sources.items():
        found.add(name, source)
    try:
        found.activate([name for name in sources if not found.joined(name)])
    except BaseException:
        found.detach()
        raise
    recompile()
    vars(model)[HANDLE] = found
    return found


def attached(model: nn.Module) -> Adapters | None:
    """What is attached to a model, or None."""
    found: Adapters | None = vars(model).get(HANDLE)
    return found


def _refuse_wrapped(model: nn.Module) -> None:
    if attached(model) is not None:
        raise ConflictError(
            "adapters are attached to this model already", hint="adapters.add(name, source)"
        )
    forwards = [vars(module).get("forward") for module in model.modules()]
    if any(isinstance(getattr(forward, "__self__", None), Patch) for forward in forwards):
        raise ConflictError("another wrapper keeps adapters on this model", hint="load it again")
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if "PeftModel" in kinds or any(hasattr(module, "base_layer") for module in model.modules()):
        raise InvalidError("the model is wrapped by PEFT", hint="model = model.unload()")
    if "OptimizedModule" in kinds:
        raise InvalidError(
            "the model is compiled", hint="attach to the model first, then torch.compile it"
        )

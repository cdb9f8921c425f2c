"""Several adapters as one PEFT adapter that does what they do together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.hub.bases.base import CONV1D, EMBEDDING, LINEAR, Base
from adapterkit.hub.convert import Options as Reading
from adapterkit.hub.convert import fitting
from adapterkit.hub.findings import clean
from adapterkit.hub.mixing.inputs import Input, Weighted, joined, pairs, read_inputs
from adapterkit.hub.mixing.options import LINEAR_METHODS, Options
from adapterkit.hub.mixing.written import Blend, written
from adapterkit.registry.errors import InvalidError

if TYPE_CHECKING:
    from adapterkit.registry import Registry

TYPES = (LINEAR, CONV1D, EMBEDDING)


def blend(
    sources: Weighted,
    *,
    base: str | Path | Base | None = None,
    registry: Registry | None = None,
    executor: Executor | None = None,
    options: Options | None = None,
    **settings: Any,
) -> Blend:
    """One adapter out of several: sources -> weights, negative ones subtract.

    base: needed exactly where an input refers to the base's values (DoRA, gains, replaced parts
    whose weights do not add up to 1). executor: what computes, on this machine or on many; None:
    this thread. settings: fields of Options, and of `blend.settings`.
    The result is a PEFT LoRA with alpha equal to its rank; a DoRA where a sum of DoRAs is exact as
    one; of like adapters that are no changes of weights, one like them. Raises InvalidError for
    what has no such sum, MismatchError if the inputs do not fit.
    """
    chosen = _options(options, settings)
    given = pairs(sources)
    described = _described(given, base, registry, chosen)
    inputs = read_inputs(given, described, chosen.quantization, registry, chosen.allow_fields)
    made = _alike(inputs, described, chosen)
    if made is not None:
        return made
    if chosen.method in LINEAR_METHODS and not chosen.at:
        inputs = joined(inputs)
    return _blended(inputs, described, chosen, executor)


def _alike(inputs: Sequence[Input], base: Base | None, chosen: Options) -> Blend | None:
    from adapterkit.hub.mixing.alike import alike
    from adapterkit.hub.reduce import single_thread

    with single_thread():
        return alike(inputs, base, chosen)


def _options(options: Options | None, settings: Mapping[str, Any]) -> Options:
    names = {each.name for each in fields(Options)}
    own = {name: value for name, value in settings.items() if name in names}
    rest = {name: value for name, value in settings.items() if name not in own}
    chosen = replace(options or Options(), **own)
    return replace(chosen, settings={**chosen.settings, **rest})


def _described(
    given: Sequence[tuple[Any, float]],
    base: str | Path | Base | None,
    registry: Registry | None,
    chosen: Options,
) -> Base | None:
    """The base, once every input fits it."""
    if base is None:
        return None
    from adapterkit.hub.locate import locate
    from adapterkit.hub.read import read_adapter

    described: Base | None = None
    reading = Reading(quantization=chosen.quantization, allow_fields=chosen.allow_fields)
    for source, _ in given:
        folder = locate(source, registry)
        adapter = read_adapter(folder, chosen.allow_fields)
        described = fitting(folder, adapter, described or base, reading)
    return described


def _blended(
    inputs: Sequence[Input], base: Base | None, chosen: Options, executor: Executor | None
) -> Blend:
    from adapterkit.hub.mixing import far, replaced
    from adapterkit.hub.mixing.run import Mix
    from adapterkit.hub.reduce import single_thread

    modules = list(dict.fromkeys(module for one in inputs for module in one.modules))
    _require_types(inputs, modules)
    with single_thread():
        if executor is None:
            found = Mix(inputs, chosen).run(modules)
        else:
            found = far.run(inputs, chosen, modules, executor)
        parts = replaced.blended(inputs)
    if not found.factors:
        raise InvalidError(f"{inputs[0].name} adds nothing to a weight: there is nothing to blend")
    return written(inputs, base, chosen, found, parts)


def _require_types(inputs: Sequence[Input], modules: Sequence[str]) -> None:
    ground = inputs[0].ground
    strange = [
        f"{clean(name)} ({ground.module(name).type})"
        for name in modules
        if (ground.base is None or name in ground.base.modules)
        and ground.module(name).type not in TYPES
    ]
    if strange:
        raise InvalidError(f"no LoRA of PEFT carries changes of {', '.join(strange[:10])}")



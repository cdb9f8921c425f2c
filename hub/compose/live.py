"""A few weight values of a live model, to tell whether it holds the weights that were recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial

from torch import Tensor, nn

from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.likeness import SketchResult, compare_values
from adapterkit.hub.bases.names import Names
from adapterkit.hub.bases.values import Values, dense_values
from adapterkit.hub.compose.offload import fetched
from adapterkit.hub.quant import format_of
from adapterkit.hub.tensors import DTYPES
from adapterkit.registry.errors import MismatchError

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def compare_live(modules: Mapping[str, nn.Module], base: Base, recorded: bytes) -> SketchResult:
    """A sketch held against the weights in memory, whatever format they are in."""
    rename = _runtime_names(base)
    # both runs of a tensor come one after the other, so that it is dequantized once
    flat = lru_cache(maxsize=1)(partial(_flat, modules))
    return compare_values(recorded, partial(_read, modules, flat, rename))


def _runtime_names(base: Base) -> Callable[[str], str | None]:
    try:
        return Names.of(base.config, base.architecture).runtime
    except MismatchError:  # a family without a row: its checkpoints are named as it is
        return lambda key: key


def _read(
    modules: Mapping[str, nn.Module],
    flat: Callable[[str, str], Tensor | None],
    rename: Callable[[str], str | None],
    key: str,
    start: int,
    count: int,
) -> Values | None:
    module, _, parameter = (rename(key) or key).rpartition(".")
    values = flat(module, parameter)
    if values is None or start + count > len(values):
        return None
    numbers = values[start : start + count].float().tolist()
    if parameter == "weight":
        return format_of(modules[module]).values(modules[module], numbers, start)
    return dense_values(NAMES[values.dtype], numbers)


def _flat(modules: Mapping[str, nn.Module], name: str, parameter: str) -> Tensor | None:
    """All values of a parameter in the order a checkpoint stores them, None if it has none."""
    module = modules.get(name)
    if module is None:
        return None
    with fetched(module):
        return _values(module, parameter)


def _values(module: nn.Module, parameter: str) -> Tensor | None:
    value = getattr(module, parameter, None)
    if not isinstance(value, Tensor):
        return None
    whole = value.detach()
    if parameter == "weight" and format_of(module).method(module) != "none":
        try:
            whole = format_of(module).read_weight(module)
        except MismatchError:  # repacked: no longer exact, so not compared
            return None
    return whole.flatten() if whole.dtype in NAMES else None

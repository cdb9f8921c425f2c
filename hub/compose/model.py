"""A live model, described as a base: the same module table that a checkpoint has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from adapterkit.hub.bases import base as rows
from adapterkit.hub.bases.base import Base, Module, Quantization
from adapterkit.hub.conv1d import is_conv1d
from adapterkit.hub.quant import format_of
from adapterkit.registry.errors import InvalidError

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def describe_model(model: nn.Module) -> Base:
    """The module table and config of a transformers model. Its weights are not read."""
    config = getattr(model, "config", None)
    if config is None:
        raise InvalidError(f"{type(model).__name__} has no config: it is not a transformers model")
    found = dict(model.named_modules())
    owners = {id(module): name for name, module in _input_table(model, found)}
    modules = {
        name: _row(name, module, owners) for name, module in found.items() if _is_leaf(module)
    }
    modules |= {row.name: row for name, module in found.items() for row in _bare(name, module)}
    settings: dict[str, Any] = {**config.to_dict(), "architectures": [type(model).__name__]}
    name = str(getattr(config, "_name_or_path", "") or type(model).__name__)
    return Base(name=name, config=settings, modules=modules, quantization=quantization(model))


def quantization(model: nn.Module) -> Quantization:
    """How the model's linear layers are stored: the format of the first that is quantized."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            method = format_of(module).method(module)
            if method != "none":
                return Quantization(method)
    return Quantization("none")


def weights_of(module: nn.Module) -> Tensor | None:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _input_table(model: nn.Module, found: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the first module that holds each shared weight."""
    seen: dict[int, str] = {}
    for name, module in found.items():
        weight = weights_of(module)
        if weight is not None and _is_leaf(module):
            first = seen.setdefault(id(weight), name)
            if first != name:
                yield first, module


def _is_leaf(module: nn.Module) -> bool:
    return weights_of(module) is not None and next(module.children(), None) is None


def _row(name: str, module: nn.Module, owners: dict[int, str]) -> Module:
    bias = "" if getattr(module, "bias", None) is not None else None
    kind, shape = _shape(module)
    groups = module.groups if isinstance(module, CONVS) else 1
    return Module(name, kind, shape, bias=bias, tied_to=owners.get(id(module)), groups=groups)


def _shape(module: nn.Module) -> tuple[str, tuple[int, ...]]:
    """Type and logical shape; quantized weights are packed, so the sizes come from the layer."""
    if isinstance(module, nn.Linear):
        return rows.LINEAR, (module.out_features, module.in_features)
    weight = weights_of(module)
    shape = tuple(weight.shape) if weight is not None else ()
    if is_conv1d(module):
        return rows.CONV1D, shape[::-1]
    if isinstance(module, nn.Embedding):
        return rows.EMBEDDING, shape
    if isinstance(module, CONVS):
        return rows.CONV if _is_plain(module) else rows.OTHER, shape
    return (rows.NORM, shape) if len(shape) == 1 else (rows.OTHER, shape)


def _is_plain(module: nn.Module) -> bool:
    """Whether what is added to the weight of a convolution is another one with its strides."""
    layer: Any = module
    return layer.padding_mode == "zeros" and set(layer.dilation) == {1}


def _bare(name: str, module: nn.Module) -> list[Module]:
    """Parameters that the block itself holds: those of all experts, fused, and any others."""
    return [
        Module(f"{name}.{parameter}".lstrip("."), *_form(module, weight))
        for parameter, weight in module.named_parameters(recurse=False)
        if parameter not in ("weight", "bias")
    ]


def _form(module: nn.Module, weight: Tensor) -> tuple[str, tuple[int, ...]]:
    if weight.ndim == 3:
        return rows.EXPERTS, _logical(module, weight)
    return rows.OTHER, tuple(weight.shape)


def _logical(module: nn.Module, weight: Tensor) -> tuple[int, ...]:
    """(experts, out, in); some families store (experts, in, out) and say so."""
    count, rows_, width = weight.shape
    return (count, width, rows_) if getattr(module, "is_transposed", False) else tuple(weight.shape)

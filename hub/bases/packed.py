"""Weights that bitsandbytes stored quantized: what the tensors mean, read from the tensors.

4-bit: `W` holds two codes a byte, `W.quant_state.bitsandbytes__nf4` (JSON) the shape, `W.absmax`
one scale a block; with double quantization absmax is 8-bit itself, `W.nested_absmax` its scales.
8-bit: `M.weight` is int8 and `M.SCB` the largest absolute value of each row, so w = q * SCB / 127.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapterkit.hub.bases.base import Quantization
from adapterkit.hub.findings import clean
from adapterkit.hub.headers import Stored
from adapterkit.registry.errors import DamagedError, MismatchError
from adapterkit.registry.strictjson import parse_object

STATE = ".quant_state.bitsandbytes__"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
MAX_STATE = 1 << 16


@dataclass(frozen=True)
class State:
    """The quant state of one 4-bit weight. nested: (block size, offset) of its absmax. dtype: what
    it was quantized from and is dequantized to, "" where that is not said."""

    method: str
    shape: tuple[int, ...]
    block_size: int
    nested: tuple[int, float] | None
    dtype: str = ""


def state_of(tensors: Mapping[str, Stored], name: str) -> State | None:
    """The quant state of a 4-bit weight, None for any other. Raises DamagedError if it lies."""
    for method in ("nf4", "fp4"):
        key = f"{name}{STATE}{method}"
        if key in tensors:
            return _checked(tensors, name, _parse(tensors[key], method))
    return None


def _parse(stored: Stored, method: str) -> State:
    try:
        return _read_state(stored, method)
    except DamagedError as error:  # names are cleaned only when shown: there are many states
        where = f"{clean(stored.key)} in {clean(stored.source.name)}"
        raise DamagedError(f"{where}: {error}") from error


def _read_state(stored: Stored, method: str) -> State:
    if stored.dtype != "U8" or stored.size > MAX_STATE:
        raise DamagedError(f"{stored}, expected at most {MAX_STATE} bytes of JSON")
    fields = parse_object(stored.read(), "the quant state")
    shape, block = fields.get("shape"), fields.get("blocksize")
    if not isinstance(shape, list) or not shape or not all(map(_positive, shape)):
        raise DamagedError(f"the shape is {clean(repr(shape))}, expected positive sizes")
    if not _positive(block):
        raise DamagedError(f"the blocksize is {clean(repr(block))}, expected a size")
    if fields.get("quant_type") != method:
        raise DamagedError(f"the quant_type is {clean(repr(fields.get('quant_type')))}")
    dtype = str(fields.get("dtype", ""))
    return State(method, tuple(shape), int(str(block)), _nested(fields), dtype)


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 48


def _nested(fields: Mapping[str, Any]) -> tuple[int, float] | None:
    if "nested_blocksize" not in fields:
        return None
    block, offset = fields["nested_blocksize"], fields.get("nested_offset")
    number = isinstance(offset, int | float) and not isinstance(offset, bool)
    if not _positive(block) or not number or not math.isfinite(float(str(offset))):
        raise DamagedError(
            f"nested_blocksize is {clean(repr(block))} and nested_offset {clean(repr(offset))},"
            f" expected a positive size and a finite number"
        )
    return int(block), float(str(offset))


def _checked(tensors: Mapping[str, Stored], name: str, state: State) -> State:
    """`state`, if the tensors beside it have the sizes it says."""
    count = math.prod(state.shape)
    blocks = -(-count // state.block_size)
    if state.nested is None:
        sizes = {"": -(-count // 2), ".absmax": 4 * blocks, ".quant_map": 64}
    else:
        scales = -(-blocks // state.nested[0])
        sizes = {
            "": -(-count // 2), ".absmax": blocks, ".quant_map": 64,
            ".nested_absmax": 4 * scales, ".nested_quant_map": 1024,
        }  # fmt: skip
    for part, size in sizes.items():
        found = tensors.get(name + part)
        if found is None or found.size != size:
            shown = "nothing" if found is None else f"{found} of {found.size} bytes"
            raise DamagedError(
                f"{clean(name + part)} is {shown}, but the quant state of {clean(name)} in"
                f" {clean(tensors[name].source.name) if name in tensors else 'the weights'} says"
                f" shape {list(state.shape)} in blocks of {state.block_size}: {size} bytes"
            )
    return state


def scales_of(tensors: Mapping[str, Stored], name: str) -> Stored | None:
    """The row scales of an int8 weight, None for any other. Raises DamagedError if they misfit."""
    scales = tensors.get(name.removesuffix("weight") + "SCB") if name.endswith(".weight") else None
    weight = tensors.get(name)
    if scales is None or weight is None or weight.dtype != "I8":
        return None
    if scales.dtype != "F32" or len(weight.shape) != 2 or scales.shape != weight.shape[:1]:
        raise DamagedError(
            f"{clean(scales.key)} in {clean(scales.source.name)} is {scales}, expected one F32"
            f" for each row of {clean(name)}, {weight}"
        )
    return scales


def auxiliary(tensors: Mapping[str, Stored]) -> set[str]:
    """Names of tensors that are constants of a quantized weight, not parameters."""
    found: set[str] = set()
    for key in tensors:
        if STATE in key:
            found.add(key)
            found.update(constants_of(tensors, key[: key.index(STATE)]))
        elif key.endswith(".SCB"):
            found.update({key, key.removesuffix("SCB") + "weight_format"} & tensors.keys())
    return found


def constants_of(tensors: Mapping[str, Stored], name: str) -> list[str]:
    """The tensors without which a quantized weight means nothing."""
    keys = [name + part for part in (*PARTS, STATE + "nf4", STATE + "fp4")]
    if name.endswith(".weight"):
        keys.append(name.removesuffix("weight") + "SCB")
    return [key for key in keys if key in tensors]


def logical_shapes(tensors: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter as a model sees it, quantization constants left out."""
    hidden = auxiliary(tensors)
    packed = {key[: key.index(STATE)] for key in hidden if STATE in key}
    shapes = {}
    for name, stored in tensors.items():
        if name not in hidden:
            state = state_of(tensors, name) if name in packed else None
            shapes[name] = stored.shape if state is None else state.shape
    return shapes


def quantization(config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> Quantization:
    """How the weights are stored, as config and tensors both say.

    Raises DamagedError if they disagree, MismatchError for a method other than bitsandbytes'.
    """
    said = config.get("quantization_config")
    if said is not None and not isinstance(said, dict):
        raise DamagedError("config.json has a quantization_config that is not an object")
    declared = _declared(said or {})
    found = _found(tensors)
    if declared.method != found:
        raise DamagedError(
            f"config.json says the weights are stored as {declared.method}, the tensors are {found}"
        )
    if declared.block_size is None and found in ("nf4", "fp4"):
        return _with_blocks(declared, tensors)
    return declared


def _declared(said: Mapping[str, Any]) -> Quantization:
    method = said.get("quant_method", "bitsandbytes" if said else None)
    if method is None:
        return Quantization("none")
    compute = said.get("bnb_4bit_compute_dtype")
    if method == "bitsandbytes" and said.get("load_in_8bit", said.get("_load_in_8bit")):
        return Quantization("int8")
    if method == "bitsandbytes" and said.get("load_in_4bit", said.get("_load_in_4bit")):
        return Quantization(
            str(said.get("bnb_4bit_quant_type", "fp4")),
            bool(said.get("bnb_4bit_use_double_quant", False)),
            compute.removeprefix("torch.") if isinstance(compute, str) else None,
        )
    raise MismatchError(
        f"config.json has the quantization method {clean(repr(method))}, which is not supported",
        hint="use the unquantized base, or one stored by bitsandbytes in 4 or 8 bits",
    )


def _found(tensors: Mapping[str, Stored]) -> str:
    for method in ("nf4", "fp4"):
        if any(key.endswith(STATE + method) for key in tensors):
            return method
    return "int8" if any(key.endswith(".SCB") for key in tensors) else "none"


def _with_blocks(declared: Quantization, tensors: Mapping[str, Stored]) -> Quantization:
    key = next(key for key in tensors if STATE in key)
    state = state_of(tensors, key[: key.index(STATE)])
    if state is None:
        return declared
    double = state.nested is not None
    return Quantization(declared.method, double, declared.compute_dtype, state.block_size)

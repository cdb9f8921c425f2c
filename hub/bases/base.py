"""A base model as data: its config, header table, module table and quantization. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from adapterkit.hub.headers import Stored
from adapterkit.hub.sources import ByteSource

LINEAR, CONV1D, EMBEDDING, NORM, CONV, EXPERTS, OTHER = (
    "linear", "conv1d", "embedding", "norm", "conv", "experts", "other",
)  # fmt: skip
# Of quantization; how a base is stored, loaded, or was when an adapter was trained.
METHODS = ("none", "nf4", "fp4", "int8")


@dataclass(frozen=True)
class Module:
    """A row of the module table: one leaf module of the model as transformers builds it.

    name: dotted path at run time. type: one of the names above.
    shape: logical weight shape: (out, in) for linear and conv1d, whatever the file stores;
    (rows, width) for an embedding; (experts, out, in) for a fused expert parameter.
    weight: the checkpoint tensors that hold it, in order: one, or those of expert 0, of expert 1,
    ... (gate before up); empty when the checkpoint has none (a head still to be created, or tied).
    bias: the checkpoint tensor of the bias, "" when the checkpoint has none but the model has one,
    None when the module has no bias.
    tied_to: the module whose weight this one shares. groups: of a convolution.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    weight: tuple[str, ...] = ()
    bias: str | None = None
    tied_to: str | None = None
    groups: int = 1

    @property
    def n_in(self) -> int:
        """Inputs of the weight as a matrix (out, in); an embedding multiplies a one-hot row."""
        if self.type == CONV:  # (out, in of its group, kernel...)
            return prod(self.shape[1:])
        return self.shape[0] if self.type == EMBEDDING else self.shape[-1]

    @property
    def n_out(self) -> int:
        if self.type == EMBEDDING or len(self.shape) == 1:
            return self.shape[-1]
        if self.type == CONV:
            return self.shape[0]
        return self.shape[-2]


@dataclass(frozen=True)
class Quantization:
    """How weights are stored: method `nf4`, `fp4`, `int8` or `none`.

    double_quant, compute_dtype, block_size are None when unknown or meaningless.
    """

    method: str
    double_quant: bool | None = None
    compute_dtype: str | None = None
    block_size: int | None = None

    def record(self) -> dict[str, Any]:
        fields = {
            "method": self.method,
            "double_quant": self.double_quant,
            "compute_dtype": self.compute_dtype,
            "block_size": self.block_size,
        }
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Base:
    """A base model, described. `tensors` is empty for a live model (its weights are not files)."""

    name: str
    config: Mapping[str, Any]
    modules: Mapping[str, Module]
    tensors: Mapping[str, Stored] = field(default_factory=dict)
    quantization: Quantization = Quantization("none")
    weight_files: Mapping[str, ByteSource] = field(default_factory=dict)
    tokenizer: str | None = None

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def architecture(self) -> str:
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else ""

    @property
    def vocabulary(self) -> int | None:
        """Rows of the input embedding, from the config."""
        text = self.config.get("text_config")
        config = text if isinstance(text, Mapping) and "vocab_size" in text else self.config
        size = config.get("vocab_size")
        return size if isinstance(size, int) and not isinstance(size, bool) else None

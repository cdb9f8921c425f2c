"""What is merged onto: the base's weights, as stored or as the adapters met them in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkit.hub.bases.base import METHODS, Base, Quantization
from adapterkit.hub.findings import clean
from adapterkit.hub.quant.packing import Scheme, pack
from adapterkit.hub.quant.stored import Weights
from adapterkit.hub.sources import Folder
from adapterkit.registry.errors import InvalidError

ORIGINAL, DEQUANTIZED, AUTO = CHOICES = ("original", "dequantized", "auto")


@dataclass(frozen=True)
class Onto:
    """scheme: what the weights go through before they are merged onto; None: nothing.
    word: original or dequantized. why: how that was chosen."""

    scheme: Scheme | None
    word: str
    why: str


def choose(onto: str, said: str | None, base: Base, folders: Sequence[Folder]) -> Onto:
    """said: what the adapters were trained on, where the registry does not know.

    Raises InvalidError where that would have to be known and is not.
    """
    stored = base.quantization.method
    if stored != "none":
        if onto == ORIGINAL:
            raise InvalidError(
                f"{clean(base.name)} is stored as {stored}, so that its original weights are not"
                " there",
                hint="give the unquantized base: --base BASE",
            )
        return Onto(None, DEQUANTIZED, f"the base is stored as {stored}")
    if onto == ORIGINAL:
        return Onto(None, ORIGINAL, "as asked for")
    known = [_trained_on(folder) or said for folder in folders]
    schemes = {Scheme.of(_parsed(each)) if each is not None else None for each in known}
    names = " and ".join(sorted({_named(each) for each in known}))
    why = f"the adapters were trained on {names}"
    scheme = next(iter(schemes)) if len(schemes) == 1 else None
    if onto == DEQUANTIZED and scheme is None:
        raise InvalidError(
            f"{why}, expected one kind of quantized base for all",
            hint="say it: --trained-on nf4, or merge onto the original weights: --onto original",
        )
    if scheme is not None:
        return Onto(scheme, DEQUANTIZED, why)
    return Onto(None, ORIGINAL, why)


def _trained_on(folder: Folder) -> Mapping[str, Any] | str | None:
    recorded = (folder.manifest.quantization or {}) if folder.manifest is not None else {}
    found = recorded.get("trained_on")
    return found if isinstance(found, Mapping) else None


def _parsed(known: Mapping[str, Any] | str) -> Quantization:
    record = {"method": known} if isinstance(known, str) else known
    method = record.get("method")
    if method not in METHODS:
        raise InvalidError(f"an adapter was trained on {clean(repr(method))}, which is not known")
    double, block = record.get("double_quant"), record.get("block_size")
    return Quantization(
        str(method),
        double if isinstance(double, bool) else None,
        None,
        block if isinstance(block, int) else None,
    )


def _named(known: Mapping[str, Any] | str | None) -> str:
    if known is None:
        return "a base whose format is not recorded"
    method = _parsed(known).method
    return "an unquantized base" if method == "none" else method


class Ground(Weights):
    """The weights that are merged onto. quantized: modules that a load in `scheme` quantizes."""

    def __init__(self, base: Base, scheme: Scheme | None, quantized: frozenset[str]) -> None:
        super().__init__(base)
        self.scheme, self.quantized = scheme, quantized

    def over(self, base: Base) -> Ground:
        """The same under other names of the modules."""
        return Ground(base, self.scheme, self.quantized)

    def weight(self, name: str) -> Tensor:
        found = super().weight(name)
        return found if name not in self.quantized else self.requantized(name, found)

    def requantized(self, name: str, weight: Tensor) -> Tensor:
        """dequantize(quantize(weight)) of a module that is quantized at load.  (out, in)."""
        if self.scheme is None:
            return weight
        key = self._base.modules[name].weight[0]
        dtype = stored_dtype(self._base, key)
        return pack(key, weight.to(dtype), self.scheme, dtype).values


def stored_dtype(base: Base, key: str) -> torch.dtype:
    """The floating-point dtype of a tensor; of a quantized one, what it dequantizes to."""
    from adapterkit.hub.bases.packed import state_of
    from adapterkit.hub.quant.stored import DTYPES
    from adapterkit.hub.tensors import DTYPES as STORED

    state = state_of(base.tensors, key)
    if state is not None:
        return DTYPES.get(state.dtype, torch.float32)
    found = STORED[base.tensors[key].dtype]
    return found if found.is_floating_point else _config_dtype(base)


def _config_dtype(base: Base) -> torch.dtype:
    from adapterkit.hub.quant.stored import DTYPES

    said = base.config.get("dtype") or base.config.get("torch_dtype")
    return DTYPES.get(str(said), torch.float32)


def quantized_by(base: Base, config: Mapping[str, Any], scheme: Scheme) -> frozenset[str]:
    """The modules that transformers quantizes when it loads this model so: asked of itself, on a
    model without weights."""
    import transformers
    from transformers import AutoConfig, BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    known = {name: value for name, value in config.items() if name != "quantization_config"}
    made = AutoConfig.for_model(known.pop("model_type"), **known)
    with torch.device("meta"):
        model = getattr(transformers, base.architecture)(made)
    four = scheme.method != "int8"
    wanted: Any = BitsAndBytesConfig
    chosen = wanted(
        load_in_4bit=four,
        load_in_8bit=not four,
        **({"bnb_4bit_quant_type": scheme.method} if four else {}),
    )
    quantizer: Any = AutoHfQuantizer.from_config(chosen, pre_quantized=False)
    before = {name: type(module) for name, module in model.named_modules()}
    quantizer.preprocess_model(model=model, device_map={"": "cpu"}, dtype=torch.float32)
    return frozenset(n for n, module in model.named_modules() if type(module) is not before.get(n))

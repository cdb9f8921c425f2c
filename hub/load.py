"""A base model with its adapters on it, in one call."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from adapterkit.hub.bases.base import METHODS, Base
from adapterkit.hub.bases.folder import find_base, read_base, tokenizer_digest
from adapterkit.hub.compose.admit import refined
from adapterkit.hub.compose.attach import attach
from adapterkit.hub.compose.handle import Adapters
from adapterkit.hub.compose.model import quantization as quantization_of
from adapterkit.hub.findings import clean
from adapterkit.hub.gather import Asked, Found, gather, labels, require_fit, vocabulary
from adapterkit.hub.locate import Source
from adapterkit.hub.quant import format_of
from adapterkit.hub.task import for_task
from adapterkit.registry.errors import AdapterWarning, DamagedError, InvalidError, MismatchError

if TYPE_CHECKING:
    from adapterkit.registry import Registry

CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "Model": "AutoModel",
}


def load(  # noqa: PLR0913
    base: str | Path,
    adapters: Mapping[str, float] | Sequence[Source] | Source | None = None,
    *,
    quantization: str | BitsAndBytesConfig | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    registry: Registry | None = None,
    resize: bool = False,
    strict: bool = False,
    **settings: Any,
) -> PreTrainedModel:
    """The base as a transformers model in evaluation mode, adapters attached and active.

    adapters: references, folders or recipes -> weights, or a list of them with weight 1;
    `attached(model)` is their handle. quantization: none, int8, nf4 or fp4 (4 bits with double
    quantization), or a config of transformers. dtype: of the weights that stay dense, and of the
    products on a 4-bit base. resize: grow the vocabulary to that of
    the adapter's tables. settings: the other fields of attach's Options.
    The class follows the adapters' task, the number of labels their head.
    Raises MismatchError with all findings, before the base is loaded, if one does not belong to it.
    """
    options = refined(None, {"registry": registry, "strict": strict, **settings})
    config = _bitsandbytes(quantization, dtype)
    method = _method(config)
    place = base if isinstance(base, Path) else find_base(base)
    described = read_base(place)
    found = gather(adapters, options)
    rows = vocabulary(found, described) if resize else None
    if rows is None:
        require_fit(found, described, method, options)
    model = _model(place, described, found, config, device=device, dtype=dtype)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    if torch.device(device).type == "cpu" and quantization_of(model).method in ("nf4", "fp4"):
        _keep_unpacked(model)
    _mention_tokenizers(found, described)
    if found:
        asked = list({one.asked.name: one.asked for one in found}.values())
        handle = attach(model, options=replace(options, slots=options.slots or len(asked)))
        for each in asked:
            handle.add(each.name, each.folder)
        handle.activate({each.name: each.weight for each in asked if not _waits(handle, each)})
    return model


def _waits(handle: Adapters, each: Asked) -> bool:
    """Whether it is a fusion, which does nothing before a Fuse names what it joins."""
    joined = handle.joined(each.name)
    if joined and each.weight == 1:
        text = f"{clean(each.name)} joins {', '.join(joined)}: it acts in a Fuse only"
        warnings.warn(text, AdapterWarning, stacklevel=3)
        return True
    return False


def _keep_unpacked(model: nn.Module) -> None:
    """4-bit codes stay as they are: on some CPUs bitsandbytes repacks them at the first forward,
    which loses their exact values."""
    from adapterkit.hub.quant import (
        bnb4,  # takes seconds to import, and not every base is quantized
    )

    for module in model.modules():
        if format_of(module) is bnb4:
            bnb4.keep_unpacked(module)


def _model(
    place: Path, base: Base, found: list[Found], config: BitsAndBytesConfig | None, **where: Any
) -> PreTrainedModel:
    """where: device and dtype. Nothing is fetched, and no code of the checkpoint is run."""
    settings: dict[str, Any] = {
        "dtype": where["dtype"],
        "use_safetensors": True,
        "local_files_only": True,
        "trust_remote_code": False,
        "device_map": {"": where["device"]},
    }
    settings |= {"quantization_config": config} if config is not None else {}
    n_labels = labels(found)
    settings |= {"num_labels": n_labels} if n_labels else {}
    loader: Any = getattr(transformers, _class(base, found))
    model: PreTrainedModel = loader.from_pretrained(place, **settings).eval()
    return model


def _bitsandbytes(
    quantization: str | BitsAndBytesConfig | None, dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """transformers' config for a method. Raises InvalidError for a method that is not known."""
    if quantization is None or isinstance(quantization, BitsAndBytesConfig):
        return quantization
    if quantization not in METHODS:
        raise InvalidError(
            f"quantization is {quantization!r}, expected one of {', '.join(METHODS)}"
        )
    make: Any = BitsAndBytesConfig
    found: dict[str, BitsAndBytesConfig | None] = {
        "none": None,
        "int8": make(load_in_8bit=True),
    }
    if quantization in found:
        return found[quantization]
    four_bits: BitsAndBytesConfig = make(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )
    return four_bits


def _method(config: BitsAndBytesConfig | None) -> str | None:
    if config is None:
        return None
    return "int8" if config.load_in_8bit else str(config.bnb_4bit_quant_type)


def _class(base: Base, found: list[Found]) -> str:
    """The auto class for the adapters' task, else for the checkpoint's own architecture."""
    architectures = sorted({for_task(base, one.adapter).architecture for one in found})
    if len(architectures) > 1:
        raise MismatchError(f"the adapters ask for different models: {', '.join(architectures)}")
    architecture = architectures[0] if architectures else base.architecture
    for end, name in CLASSES.items():
        if architecture.endswith(end):
            return name
    raise MismatchError(f"{clean(architecture)} is of no task known here: {', '.join(CLASSES)}")


def _mention_tokenizers(found: list[Found], base: Base) -> None:
    """An adapter with another tokenizer is only right with that one: which folder has it."""
    for one in found:
        try:
            own = tokenizer_digest(one.folder)
        except DamagedError as error:
            raise DamagedError(f"{clean(one.name)}: {error}") from error
        if own is not None and own != base.tokenizer:
            warnings.warn(
                f"{clean(one.name)} brings its own tokenizer, which differs from the base's:"
                " use that one with this model",
                AdapterWarning,
                stacklevel=3,
            )

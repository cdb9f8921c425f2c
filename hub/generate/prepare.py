"""A base and adapters, made ready to generate text; what cannot is refused before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.folder import read_base
from adapterkit.hub.compose.admit import refined
from adapterkit.hub.compose.attach import attached
from adapterkit.hub.findings import clean
from adapterkit.hub.gather import Found, gather
from adapterkit.hub.generate.prompts import Ask, Chosen, Prompt, choose, encode
from adapterkit.hub.generate.session import Session, enough_memory
from adapterkit.hub.load import load
from adapterkit.hub.task import for_task, serves
from adapterkit.registry.errors import InvalidError, MismatchError

TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
DTYPES = {each: getattr(torch, each) for each in ("float32", "float16", "bfloat16")}


def prepare(  # noqa: PLR0913
    place: Path,
    sources: Mapping[str, float],
    ask: Ask,
    *,
    tokenizer: Path | None = None,
    quantization: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    **settings: Any,
) -> Session:
    """The base in a folder with adapters on it, ready to answer.

    tokenizer: the folder of one to use instead of the adapters' or the base's. device, dtype: None
    is the GPU if there is one, and as the base says. settings: as for `load`.
    Raises MismatchError for what generates no text, before the base is loaded.
    """
    base = read_base(place)
    where = _device(device)
    options = {name: value for name, value in settings.items() if name != "resize"}
    found = gather(dict(sources), refined(None, options))
    _require_text(found, base)
    _require_loadable(base, quantization)
    chosen = choose(found, place, tokenizer)
    prompt = encode(chosen, ask)
    with enough_memory():
        model = load(
            place, dict(sources), quantization=quantization, device=where,
            dtype=DTYPES[dtype] if dtype else stored_dtype(base), **settings,
        )  # fmt: skip
    handle = attached(model)
    if handle is None:
        raise InvalidError("there is no adapter to run")
    weights = {name: weight for name, weight in sources.items() if not handle.joined(name)}
    _require_known(model, chosen, prompt)
    return Session(model, handle, weights, chosen, prompt)


def _require_known(model: Any, chosen: Chosen, prompt: Prompt) -> None:
    """Raises MismatchError for a token that the model has no row for."""
    rows = model.get_input_embeddings().num_embeddings
    largest = int(prompt.ids.max())
    if largest >= rows:
        raise MismatchError(
            f"the tokenizer of {clean(chosen.name)} makes the token {largest} of the prompt, but"
            f" the model has {rows} rows for tokens"
        )


def _require_text(found: list[Found], base: Base) -> None:
    """Raises MismatchError naming every adapter that is for another task, or the base."""
    expected = " or ".join(TASKS)
    faults = [
        f"{clean(one.name)} is for the task {clean(str(one.adapter.task))}, which generates no"
        f" text: expected {expected}"
        for one in found
        if one.adapter.task not in (None, *TASKS)
    ]
    if faults:
        raise MismatchError("\n".join(faults))
    for name in {for_task(base, one.adapter).architecture for one in found}:
        if not any(serves(name, task) for task in TASKS):
            raise MismatchError(f"{clean(base.name)} is a {clean(name)}, which generates no text")


def _require_loadable(base: Base, quantization: str | None) -> None:
    """Raises InvalidError for a base that is stored in another quantized form."""
    stored = base.quantization.method
    if stored != "none" and quantization not in (None, stored):
        raise InvalidError(
            f"{clean(base.name)} is stored in {stored}, and is not loaded as {quantization}",
            hint="leave --quantization out",
        )


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # the latter from a torch built without it
        about = clean(str(error).partition("\n")[0])
        raise InvalidError(f"the device {clean(name)} cannot be used: {about}") from error
    return torch.device(name)


def stored_dtype(base: Base) -> torch.dtype:
    """As the base's config says; float32 where it does not."""
    text = base.config.get("text_config")
    for config in (base.config, text if isinstance(text, Mapping) else {}):
        for field in ("dtype", "torch_dtype"):
            if isinstance(config.get(field), str) and config[field] in DTYPES:
                found: torch.dtype = DTYPES[config[field]]
                return found
    return torch.float32

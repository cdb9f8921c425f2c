"""A folder that AdapterHub's library `adapters` reads.  adapters 1.3 `loading.py`."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import Base
from adapterkit.hub.findings import clean
from adapterkit.hub.formats import adapterhub_head
from adapterkit.hub.formats.adapterhub import WEIGHTS
from adapterkit.hub.formats.adapterhub_places import LAYERS, Layer
from adapterkit.hub.formats.files import CONFIG, read_weights
from adapterkit.hub.formats.safetensors_write import Part, dump
from adapterkit.hub.sources import Folder, read_object
from adapterkit.registry.errors import InvalidError

# The version of the library whose rules are followed.
VERSION = "adapters.1.3.0"
NAME = "adapter"
FLAGS = ("intermediate_lora", "output_lora")


def written(folder: Folder, adapter: Adapter, base: Base | None) -> dict[str, bytes]:
    """Path -> content. What the library wrote comes out in safetensors; a LoRA of other tools is
    said in its words.

    Raises InvalidError where the library has nothing that is the same, or a base has to be given.
    """
    if adapter.format == "adapterhub":
        return _again(folder, adapter)
    if adapter.kind != "lora":
        raise InvalidError(
            f"{clean(adapter.name)} is of the kind {adapter.kind} and of the format"
            f" {adapter.format}: only a LoRA is written for the library adapters",
            hint="adapter convert may make a LoRA of it",
        )
    if base is None:
        raise InvalidError(
            f"{clean(adapter.name)}: the library names the family and the layers of the base",
            hint="give the base: --base BASE",
        )
    _require_plain(adapter)
    layer = LAYERS.get(base.model_type)
    method = None if layer is None else next(_methods(adapter, base, layer), None)
    if method is None:
        raise InvalidError(
            f"{clean(adapter.name)}: its modules are not such as the library adapts in a"
            f" {clean(base.model_type)}: query, key and value, or what is around the feed-forward"
            " layer, of whole layers"
        )
    config = {
        "config": method,
        "hidden_size": _width(base),
        "model_class": base.architecture,
        "model_name": adapter.base_name or base.name,
        "model_type": base.model_type,
        "name": NAME,
        "version": VERSION,
    }
    tensors = {
        f"{module}.loras.{NAME}.lora_{role}": Part.of(stored)
        for (module, role), stored in adapter.tensors.items()
    }
    return {CONFIG: text(config), WEIGHTS[0]: dump(tensors)}


def _again(folder: Folder, adapter: Adapter) -> dict[str, bytes]:
    """Every tensor of its files, in safetensors; the configs as they are."""
    heads = {"head": adapterhub_head.WEIGHTS[0], "weights": WEIGHTS[0]}
    found: dict[str, bytes] = {}
    for path, role in adapter.files.items():
        source = folder.files[path]
        if role in heads:
            tensors = read_weights(folder, path).tensors
            found[heads[role]] = dump({key: Part.of(stored) for key, stored in tensors.items()})
        else:
            found[path] = text(read_object(source, path))
    return found


def text(value: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(dict(value), indent=2, sort_keys=True)}\n".encode()


def _require_plain(adapter: Adapter) -> None:
    """The library has one rank and one alpha for all modules, and nothing beside the factors."""
    fields = adapter.fields
    modules = sorted(adapter.modules)
    faults = []
    if len({fields.rank_of(name) for name in modules}) > 1:
        faults.append("several ranks")
    if len({fields.scaling(name) for name in modules}) > 1:
        faults.append("several scales")
    faults += [word for word in ("dora", "lora_bias") if getattr(fields, word)]
    faults += sorted({role for _, role in adapter.tensors} - {"A", "B"})
    if faults:
        raise InvalidError(
            f"{clean(adapter.name)}: the library's LoRA has no {', '.join(faults)}",
            hint="adapter convert makes one rank and one scale of several",
        )


def _methods(adapter: Adapter, base: Base, layer: Layer) -> Iterator[dict[str, Any]]:
    """Configs of the method that mean exactly the modules that the adapter has."""
    own = set(adapter.modules)
    numbers = {int(n) for name in base.modules for n in _numbers(layer, name)}
    held = {int(n) for name in own for n in _numbers(layer, name)}
    subsets = itertools.chain.from_iterable(
        itertools.combinations(layer.attention, n) for n in range(len(layer.attention) + 1)
    )
    for chosen, flags in itertools.product(subsets, itertools.product((False, True), repeat=2)):
        around = zip((layer.intermediate, layer.output), flags, strict=True)
        patterns = [layer.attention[matrix] for matrix in chosen]
        patterns += [pattern for pattern, is_on in around if is_on]
        inside = "|".join(dict.fromkeys(patterns)) or "(?!)"
        whole = re.compile(rf"(?:.*\.)?{layer.name}\.(\d+)\.(?:{inside})")
        meant = {n for n in base.modules if (m := whole.fullmatch(n)) and int(m[1]) in held}
        if meant == own:
            yield _method(adapter, chosen, dict(zip(FLAGS, flags, strict=True)), numbers - held)


def _numbers(layer: Layer, name: str) -> list[str]:
    return re.findall(rf"(?:^|\.){layer.name}\.(\d+)\.", name)[:1]


def _method(
    adapter: Adapter, chosen: tuple[str, ...], flags: Mapping[str, bool], without: set[int]
) -> dict[str, Any]:
    rank: int = adapter.fields.rank_of(min(adapter.modules))
    alpha = adapter.fields.scaling(min(adapter.modules)) * rank
    return {
        "alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "architecture": "lora",
        "attn_matrices": list(chosen) or ["q"],
        "composition_mode": "add",
        "dropout": 0.0,
        "dtype": None,
        "init_weights": "lora",
        "init_weights_seed": None,
        **flags,
        "leave_out": sorted(without),
        "r": rank,
        "selfattn_lora": bool(chosen),
        "use_dora": False,
        "use_gating": False,
        "vera_b": None,
        "vera_d": None,
    }


def _width(base: Base) -> int | None:
    sizes = [base.config.get(name) for name in ("hidden_size", "n_embd", "d_model", "dim")]
    return next((size for size in sizes if isinstance(size, int)), None)

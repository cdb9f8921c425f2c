"""A fusion as AdapterHub's library saves it: `adapter_fusion_config.json` beside its matrices.
adapters 1.3 `configuration/adapter_fusion_config.py`, `methods/modeling.py` (BertFusion)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.fields import FusionFields, Mixing
from adapterkit.hub.findings import ERROR, Finding, clean
from adapterkit.hub.formats.adapterhub_bottleneck import place_of
from adapterkit.hub.formats.config import ConfigReader, is_blank, unknown_fields, unsupported
from adapterkit.hub.formats.files import CERTAIN, Claim, weights_of
from adapterkit.hub.matching import Targets
from adapterkit.hub.sources import Folder, read_object
from adapterkit.registry.errors import DamagedError, NotFoundError

CONFIG = "adapter_fusion_config.json"
WEIGHTS = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")
HOLDER = ".adapter_fusion_layer."
MAX_WIDTH = 1 << 24
AROUND = frozenset(
    ["adapter_names", "config", "config_id", "hidden_size", "model_class", "model_name",
     "model_type", "name", "version"]
)  # fmt: skip
KNOWN = frozenset(
    ["key", "query", "value", "query_before_ln", "residual_before", "value_before_softmax",
     "temperature", "dropout_prob", "regularization", "value_initialized"]
)  # fmt: skip
ROLES = {
    "query.weight": "query",
    "query.bias": "query_bias",
    "key.weight": "key",
    "key.bias": "key_bias",
    "value.weight": "value",
}


def claims(folder: Folder, config: Mapping[str, Any] | None) -> Claim | None:
    return Claim(CERTAIN, CONFIG) if config is None and CONFIG in folder.files else None


def read(
    folder: Folder, config: Mapping[str, Any] | None, allow_fields: Collection[str]
) -> Adapter:
    """The fusion in canonical form. Raises DamagedError, NotFoundError as every format does."""
    if CONFIG not in folder.files:
        raise NotFoundError(f"{clean(folder.name)} is no fusion: {CONFIG} is missing")
    where = f"{folder.name}/{CONFIG}"
    outer = read_object(folder.files[CONFIG], clean(where))
    mixing = outer.get("config")
    if not isinstance(mixing, dict):
        shown = clean(repr(mixing), 60)
        raise DamagedError(f"{clean(where)}: config is {shown}, expected the fusion's fields")
    around, inside = ConfigReader(outer, where), ConfigReader(mixing, where)
    names = around.names("adapter_names") or _split(around.text("name"))
    if len(names) < 2:
        around.fault("adapter_names", "two adapters or more")
    width = None if outer.get("hidden_size") is None else around.count("hidden_size", 1, MAX_WIDTH)
    family, base = around.text("model_type"), around.text("model_name")
    fields = _fields(inside, names, width)
    for reader in (around, inside):
        reader.done()
    weights = weights_of(folder, WEIGHTS)
    tensors, strays = {}, []
    for key, stored in weights.header.tensors.items():
        place = _place(key, ",".join(names))
        if place is None or place in tensors:  # two spellings of one place
            strays.append(key)
        else:
            tensors[place] = stored
    unknown, findings = unknown_fields(outer, AROUND, allow_fields)
    more = unknown_fields(mixing, KNOWN, allow_fields)[1]
    return Adapter(
        name=folder.name,
        kind="fusion",
        format="adapterhub-fusion",
        fields=fields,
        targets=Targets(),
        tensors=tensors,
        config=outer,
        unconsumed=tuple(strays),
        unknown_fields=tuple(unknown),
        base_name=base,
        writer=around.text("version"),
        findings=(
            *weights.findings, *findings, *more, *_refusals(mixing), *map(_stray, strays)
        ),
        files={CONFIG: "config", weights.path: "weights"},
        requires={"model_type": family, "hidden_size": width},
        portable=True,
    )  # fmt: skip


def _split(name: str | None) -> tuple[str, ...]:
    return tuple((name or "").split(","))


def _fields(reader: ConfigReader, names: tuple[str, ...], width: int | None) -> FusionFields:
    for field in ("key", "query", "value"):
        if reader.config.get(field) is None:
            reader.fault(field, "true or false, as it is required")
    mixing = Mixing(
        before_softmax="value_before_softmax" not in reader.config
        or reader.flag("value_before_softmax"),
        query_before=reader.flag("query_before_ln"),
        residual_before=reader.flag("residual_before"),
    )
    query, key, value = (reader.flag(field) for field in ("query", "key", "value"))
    return FusionFields(names, query, key, value, mixing, width)


def _refusals(config: Mapping[str, Any]) -> list[Finding]:
    found = []
    if not is_blank(config.get("temperature")):
        why = "a temperature that falls with every forward from where it was, which no file says"
        found.append(unsupported("temperature", why))
    if not any(config.get(field) for field in ("key", "query", "value")):
        found.append(unsupported("config", "a fusion without query, key and value"))
    return found


def _place(key: str, name: str) -> tuple[str, str] | None:
    path, _, rest = key.partition(HOLDER)
    found = place_of(path)
    role = ROLES.get(rest.removeprefix(f"{name}.")) if rest.startswith(f"{name}.") else None
    return None if found is None or role is None else ("".join(found), role)


def _stray(key: str) -> Finding:
    want = "one matrix of this fusion at a place of a layer"
    return Finding(ERROR, "unexpected-tensor", key, want, "a tensor that belongs to nothing else")

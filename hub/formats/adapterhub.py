"""The folder of AdapterHub's library `adapters`: `adapter_config.json` beside
`adapter.safetensors`, and a head of its own files.

Source: adapters 1.3 `loading.py`; files of adapter-transformers 1 to 3 have no `version`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from packaging.version import InvalidVersion, Version

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.findings import WARNING, Finding, clean
from adapterkit.hub.formats.adapterhub_head import Head, read_head
from adapterkit.hub.formats.adapterhub_keys import Keys, read_keys
from adapterkit.hub.formats.adapterhub_reft import SUBTRACT
from adapterkit.hub.formats.adapterhub_type import (
    ARCHITECTURES,
    BOTTLENECK,
    OTHER_ARCHITECTURES,
    Architecture,
    Outer,
    architecture,
)
from adapterkit.hub.formats.config import ConfigReader, is_blank, unknown_fields, unsupported
from adapterkit.hub.formats.files import CERTAIN, CONFIG, LIKELY, Claim, weights_of
from adapterkit.hub.sources import Folder
from adapterkit.registry.errors import DamagedError, NotFoundError

WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
LIBRARY = "adapters."
HINTS = {SUBTRACT: "of a ReFT without orthogonality: false for DiReFT, true for NoReFT"}
# What adapter-transformers called the activations of its first versions, which wrote none.
ACT, RENAMED = "non_linearity", {"gelu": "gelu_new", "gelu_orig": "gelu"}
MAX_WIDTH = 1 << 24
# `type` and `config_id` are of adapter-transformers.
AROUND = frozenset(
    ["config", "config_id", "hidden_size", "model_class", "model_name", "model_type", "name",
     "type", "version"]
)  # fmt: skip


def claims(folder: Folder, config: Mapping[str, Any] | None) -> Claim | None:
    """By the config: of the base's family and of the method, and none of PEFT's."""
    if config is None or "peft_type" in config or "model_type" not in config:
        return None
    marks = [mark for mark in ("model_name", "model_class", "config", "name") if mark in config]
    family = clean(str(config["model_type"]), 40)
    evidence = f"model_type {family} and {', '.join(marks)} in {CONFIG}"
    certain = isinstance(config.get("config"), dict) and len(marks) > 1
    return Claim(CERTAIN if certain else LIKELY, evidence) if marks else None


def read(
    folder: Folder, config: Mapping[str, Any] | None, allow_fields: Collection[str]
) -> Adapter:
    """The adapter in canonical form. Raises DamagedError if a file or a field is malformed and
    NotFoundError if it is of an architecture that this program does not have."""
    if config is None:
        raise NotFoundError(
            f"{clean(folder.name)} is not an adapter of AdapterHub: {CONFIG} is missing"
        )
    outer = _outer(config, f"{folder.name}/{CONFIG}", folder.hints)
    method, row = _method(config, folder.name)
    weights = weights_of(folder, WEIGHTS)
    head = read_head(folder, outer, allow_fields)
    keys = read_keys([weights.header.tensors, head.others], row, outer.name)
    reader = ConfigReader(method, f"{folder.name}/{CONFIG}")
    paths = sorted({path for path, _ in keys.tensors if path})
    targets = replace(row.targets(reader, outer, paths), saved=head.modules)
    fields = row.fields(reader, outer, paths)
    reader.done()
    if head.fields is not None:
        fields = replace(fields, replaced=replace(fields.replaced, head=head.fields))
    names, unknown = _unknown(config, method, row, allow_fields)
    findings = [*weights.findings, *_refusals(method, row, outer), *unknown, *head.findings]
    return Adapter(
        name=folder.name,
        kind=row.kind_of(method, outer),
        format="adapterhub",
        fields=fields,
        targets=targets,
        tensors=_together(keys, head),
        config={**config, **method},
        unconsumed=(*keys.strays, *head.strays),
        unknown_fields=tuple(names),
        base_name=_text(config, "model_name"),
        task=head.task,
        writer=_text(config, "version"),
        findings=(*findings, *keys.findings),
        files={CONFIG: "config", weights.path: "weights", **head.files},
        requires={"model_type": outer.model_type, "hidden_size": outer.width},
        portable=True,
        hints={name: folder.hints[name] for name in row.hints if name in folder.hints},
    )


def _outer(config: Mapping[str, Any], name: str, hints: Mapping[str, Any]) -> Outer:
    reader = ConfigReader(config, name)
    width = None if config.get("hidden_size") is None else reader.count("hidden_size", 1, MAX_WIDTH)
    found = Outer(
        name=reader.text("name") or "",
        model_type=reader.text("model_type") or "",
        model_class=reader.text("model_class"),
        width=width,
        version=_version(reader),
        hints=hints,
    )
    if not found.name or "." in found.name:
        reader.fault("name", "the adapter's name, without dots")
    if not found.model_type:
        reader.fault("model_type", "the model family of the base")
    for field in ("model_name", "type", "config_id"):
        reader.text(field)
    reader.done()
    return found


def _version(reader: ConfigReader) -> Version | None:
    """Of the library; None for one of adapter-transformers, which says none, or a bare number."""
    text = reader.text("version")
    if text is None or not text.startswith(LIBRARY):
        return None
    try:
        return Version(text.removeprefix(LIBRARY))
    except InvalidVersion:
        reader.fault("version", f"{LIBRARY}NUMBER")
        return None


def _method(config: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], Architecture]:
    """The config of the method and its row."""
    method = config.get("config")
    where = f"{clean(name)}/{CONFIG}"
    if not isinstance(method, dict):
        shown = clean(repr(method), 60)
        raise DamagedError(f"{where}: config is {shown}, expected the method's fields")
    act = method.get(ACT)
    if "version" not in config and isinstance(act, str):
        method = {**method, ACT: RENAMED.get(act, act)}
    value = method.get("architecture")
    chosen = BOTTLENECK if value is None else value
    if isinstance(chosen, str) and chosen in ARCHITECTURES:
        return method, architecture(chosen).placed(method)
    about = f"AdapterHub adapters of architecture {clean(str(chosen), 60)}"
    if isinstance(chosen, str) and chosen in OTHER_ARCHITECTURES:
        raise NotFoundError(
            f"{clean(name)}: {about} are known, but not applied by this version",
            hint=f"this version reads {', '.join(sorted(ARCHITECTURES))}",
        )
    raise NotFoundError(f"{where}: {about} are not known here")


def _unknown(
    config: Mapping[str, Any],
    method: Mapping[str, Any],
    row: Architecture,
    allowed: Collection[str],
) -> tuple[list[str], list[Finding]]:
    """Fields nothing is known of, around the method's config and in it."""
    around, findings = unknown_fields(config, AROUND, allowed)
    for inner, own in _all(method, row):
        known = own.known | own.inert | own.refused.keys() | {"architecture"}
        inside, more = unknown_fields(inner, known, allowed)
        around += inside if inner is method else []
        findings += more
    return around, findings


def _all(
    method: Mapping[str, Any], row: Architecture
) -> list[tuple[Mapping[str, Any], Architecture]]:
    """The method's config and those in it, each with its row."""
    return [(method, row), *row.parts(method)]


def _refusals(method: Mapping[str, Any], row: Architecture, outer: Outer) -> list[Finding]:
    found: list[Finding] = []
    for inner, own in _all(method, row):
        found += [
            unsupported(field, why)
            for field, why in own.refused.items()
            if not is_blank(inner.get(field))
        ]
        found += own.refusals(inner, outer)
    if outer.version is None:
        about = "none of adapters: written by adapter-transformers, and read as that is"
        found.append(Finding(WARNING, "old-version", "version", f"{LIBRARY}NUMBER", about))
    return found


def _together(keys: Keys, head: Head) -> dict[tuple[str, str], Any]:
    return {**keys.tensors, **head.tensors}


def _text(config: Mapping[str, Any], field: str) -> str | None:
    value = config.get(field)
    return value if isinstance(value, str) else None

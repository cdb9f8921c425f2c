"""Folder formats, known by content: each translates a folder to the canonical form."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.findings import clean
from adapterkit.hub.formats.files import CONFIG, Claim
from adapterkit.hub.sources import Folder, read_object
from adapterkit.registry.errors import AdapterError, DamagedError, InvalidError, NotFoundError

# name -> module with
#   claims(folder, config) -> Claim | None: whether this is its format; config is the parsed
#     adapter_config.json, None where there is none
#   read(folder, config, allow_fields) -> Adapter
#   HINTS, if the files may not say all: name -> what it is, for `--hint NAME=VALUE`
FORMATS = {
    "kohya": "adapterkit.hub.formats.kohya",
    "mlx": "adapterkit.hub.formats.mlx",
    "li_liang": "adapterkit.hub.formats.li_liang",
    "thudm_v1": "adapterkit.hub.formats.thudm_v1",
    "thudm_v2": "adapterkit.hub.formats.thudm_v2",
    "loralib": "adapterkit.hub.formats.loralib",
    "adapterhub": "adapterkit.hub.formats.adapterhub",
    "adapterhub-fusion": "adapterkit.hub.formats.adapterhub_fusion",
    "opendelta": "adapterkit.hub.formats.opendelta",
    "peft": "adapterkit.hub.formats.peft",
    "state_dict": "adapterkit.hub.formats.state_dict",
}

# Hints that are not of one format: `format` says which one it is where two are possible.
FORMAT = "format"


def read_folder(folder: Folder, allow_fields: Collection[str] = ()) -> Adapter:
    """The adapter in `folder`. Raises NotFoundError naming what is missing or not supported."""
    try:
        return _read(folder, allow_fields)
    except InvalidError as error:  # what the user has to say of a folder, a manifest says
        if folder.manifest is None:
            raise
        raise DamagedError(f"the manifest of {clean(folder.name)}: {error}") from error


def _read(folder: Folder, allow_fields: Collection[str]) -> Adapter:
    config = _config(folder)
    name = _format(folder, config)
    module = import_module(FORMATS[name])
    adapter: Adapter = module.read(folder, config, allow_fields)
    used = dict(adapter.hints)
    used |= {FORMAT: name} if FORMAT in folder.hints else {}
    _require_used(folder, used, name, getattr(module, "HINTS", {}))
    return replace(adapter, hints=used, findings=(*folder.remarks, *adapter.findings))


def _format(folder: Folder, config: Mapping[str, Any] | None) -> str:
    """The format with the strongest claim; an error if two are equal, or there is none."""
    if FORMAT in folder.hints:
        return _given(folder.hints[FORMAT])
    claims: dict[str, Claim] = {}
    errors: list[AdapterError] = []
    for name, path in FORMATS.items():
        try:
            claim = import_module(path).claims(folder, config)
        except AdapterError as error:  # a file that cannot be read: of interest if nobody claims
            errors.append(error)
            continue
        claims |= {name: claim} if claim is not None else {}
    best = max((claim.score for claim in claims.values()), default=0)
    found = [name for name, claim in claims.items() if claim.score == best]
    if len(found) == 1:
        return found[0]
    if found:
        shown = "; ".join(f"{name} ({claims[name].evidence})" for name in found)
        raise InvalidError(
            f"{clean(folder.name)} may be of several formats: {shown}",
            hint=f"give --hint {FORMAT}={found[0]}",
        )
    raise errors[0] if errors else _nobody(folder, config)


def _given(value: object) -> str:
    if not isinstance(value, str) or value not in FORMATS:
        raise InvalidError(
            f"the hint {FORMAT} is {clean(repr(value))}, expected one of {', '.join(FORMATS)}"
        )
    return value


def _require_used(
    folder: Folder, used: Mapping[str, Any], name: str, known: Mapping[str, str]
) -> None:
    unused = sorted(folder.hints.keys() - used.keys())
    if not unused:
        return
    shown = ", ".join(map(clean, unused[:10]))
    names = "; ".join(f"{hint}: {about}" for hint, about in known.items()) or "none"
    raise InvalidError(
        f"{clean(folder.name)} has hints that are not used: {shown}; the format {name} knows"
        f" {names}"
    )


def _config(folder: Folder) -> dict[str, Any] | None:
    if CONFIG not in folder.files:
        return None
    return read_object(folder.files[CONFIG], f"{clean(folder.name)}/{CONFIG}")


def _nobody(folder: Folder, config: Mapping[str, Any] | None) -> NotFoundError:
    """Why no format claims the folder."""
    if config is not None:
        about = "peft_type is missing, so this is not a PEFT adapter, and no other format has it"
        return NotFoundError(f"{clean(folder.name)}/{CONFIG}: {about}")
    inside = sorted(path for path in folder.files if path.endswith(f"/{CONFIG}"))
    hint = f"give one of its subfolders: {', '.join(map(clean, inside[:10]))}" if inside else None
    state = "is empty" if not folder.files else "is not an adapter folder"
    state = f"holds {len(inside)} adapters in subfolders" if len(inside) > 1 else state
    return NotFoundError(f"{clean(folder.name)} {state}: {CONFIG} is missing", hint=hint)

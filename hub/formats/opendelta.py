"""OpenDelta: `config.json` with a `delta_type` beside `pytorch_model.bin`; BitFit of its types.

Source: opendelta 0.3 `basemodel.py`, `delta_models/bitfit.py`. Its tensors are parameters of the
base under their own names, new values; where a linear layer has no bias it gets one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.fields import BitfitFields
from adapterkit.hub.findings import Finding, clean
from adapterkit.hub.formats.config import ConfigReader, is_blank, unknown_fields, unsupported
from adapterkit.hub.formats.files import CERTAIN, Claim, weights_of
from adapterkit.hub.formats.state_dict import placed, strays
from adapterkit.hub.headers import Stored
from adapterkit.hub.matching import Targets
from adapterkit.hub.sources import Folder, read_object
from adapterkit.hub.task import ENDS
from adapterkit.registry.errors import NotFoundError

CONFIG, TYPE = "config.json", "delta_type"
MARKS = ("opendelta_version", "backbone_class", "modified_modules")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
KNOWN = frozenset(
    [
        TYPE, *MARKS, "backbone_checkpoint_name", "common_structure", "exclude_modules",
        "unfrozen_modules",
        # what it notes beside that, which changes nothing
        "backbone_hash", "transformers_version", "delta_args", "interactive_modify",
    ]
)  # fmt: skip
DELTAS = "deltas"  # the tensors of the method itself, in `unfrozen_modules`
LAYER = ".bitfit"  # a layer of its own behind a module that is not linear
REGEX = "[r]"


def claims(folder: Folder, config: Mapping[str, Any] | None) -> Claim | None:
    if config is not None or CONFIG not in folder.files:
        return None
    own = read_object(folder.files[CONFIG], f"{clean(folder.name)}/{CONFIG}")
    if TYPE not in own or not any(mark in own for mark in MARKS):
        return None
    return Claim(CERTAIN, f"{TYPE} {clean(str(own[TYPE]), 40)} in {CONFIG}")


def read(
    folder: Folder, config: Mapping[str, Any] | None, allow_fields: Collection[str]
) -> Adapter:
    """Raises NotFoundError for types other than BitFit, DamagedError for a malformed config."""
    own = read_object(folder.file(CONFIG), f"{clean(folder.name)}/{CONFIG}")
    if own.get(TYPE) != "bitfit":
        raise NotFoundError(
            f"{clean(folder.name)} is of OpenDelta's type {clean(str(own.get(TYPE)), 40)}, which"
            " this version does not read",
            hint="of OpenDelta's types it reads bitfit",
        )
    reader = ConfigReader(own, f"{folder.name}/{CONFIG}")
    fields, odd = _fields(reader)
    base, task = reader.text("backbone_checkpoint_name"), _task(reader.text("backbone_class"))
    reader.done()
    weights = weights_of(folder, WEIGHTS)
    layers, plain = _split(weights.header.tensors)
    tensors, findings = placed(plain)
    names, unknown = unknown_fields(own, KNOWN, allow_fields)
    return Adapter(
        name=folder.name,
        kind="bitfit",
        format="opendelta",
        fields=fields,
        targets=Targets(),
        tensors={**tensors, **layers},
        config=own,
        unconsumed=strays(findings),
        unknown_fields=tuple(names),
        base_name=base,
        task=task,
        writer=reader.text("opendelta_version"),
        findings=(*weights.findings, *findings, *odd, *unknown),
        files={CONFIG: "config", weights.path: "weights"},
    )


def _fields(reader: ConfigReader) -> tuple[BitfitFields, list[Finding]]:
    """Which modules the file has to hold, where their names are those of the base."""
    modified, excluded = reader.names("modified_modules"), reader.names("exclude_modules")
    unfrozen = tuple(name for name in reader.names("unfrozen_modules") if name != DELTAS)
    fields = BitfitFields(extends=True)
    odd = [] if is_blank(reader.config.get("delta_args")) else [unsupported("delta_args", "unread")]
    by_pattern = any(name.startswith(REGEX) for name in (*modified, *excluded, *unfrozen))
    if reader.flag("common_structure") or by_pattern:
        return fields, odd
    return replace(fields, modules=modified, exclude=excluded, whole=unfrozen), odd


def _task(name: str | None) -> str | None:
    """PEFT's name for what a class of transformers does."""
    ends = ((end, task) for task, every in ENDS.items() for end in every if end != "Model")
    return next((task for end, task in ends if name is not None and name.endswith(end)), None)


def _split(
    held: Mapping[str, Stored],
) -> tuple[dict[tuple[str, str], Stored], dict[str, Stored]]:
    """(what a layer behind a module adds to its output, the parameters of the base)."""
    end = f"{LAYER}.bias"
    layers = {(key.removesuffix(end), "shift"): s for key, s in held.items() if key.endswith(end)}
    return layers, {key: stored for key, stored in held.items() if not key.endswith(end)}

"""AdapterHub's ReFT: LoReFT, NoReFT and DiReFT.  adapters 1.3 `methods/reft.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterkit.hub.fields import ReftFields
from adapterkit.hub.findings import WARNING, Finding, clean
from adapterkit.hub.formats.adapterhub_bottleneck import activation
from adapterkit.hub.formats.adapterhub_type import Architecture, Key, Outer, Paths, Place
from adapterkit.hub.formats.config import ConfigReader, is_index, unsupported
from adapterkit.hub.formats.peft_config import MAX_RANK
from adapterkit.registry.errors import InvalidError

MAX_TOKENS = 1 << 20
LAYER = "reft_layer"
# Of a projection that is kept orthogonal, torch stores what it is computed from.
ROLES = {
    "learned_source.weight": "source",
    "learned_source.bias": "source_bias",
    "projection.weight": "projection",
    "projection.parametrizations.weight.original": "original",
    "projection.parametrizations.weight.0.base": "basis",
}
UNITS = ("first", "last")
SUBTRACT = "subtract_projection"


def place(key: Key) -> Place | None:
    layer, _, end = key.path.rpartition(".")
    name, _, rest = key.rest.partition(".")
    number, _, rest = rest.partition(".")
    if key.holder != "refts" or end != LAYER or name != "units" or number not in ("0", "1"):
        return None
    role = ROLES.get(rest)
    return None if role is None or not layer else (layer, f"{UNITS[int(number)]}.{role}")


def read(reader: ConfigReader, outer: Outer, paths: Paths) -> ReftFields:
    for name in ("orthogonality", "prefix_positions", "suffix_positions", "layers", "r"):
        if reader.config.get(name) is None:
            reader.fault(name, "a value: it has no default")
    return ReftFields(
        rank=reader.count("r", 1, MAX_RANK),
        first=_tokens(reader, "prefix_positions"),
        last=_tokens(reader, "suffix_positions"),
        orthogonal=reader.flag("orthogonality"),
        tied=reader.flag("tied_weights"),
        subtracts=_subtracts(reader, outer),
        act=_activation(reader),
        layers=_layers(reader),
    )


def _subtracts(reader: ConfigReader, outer: Outer) -> bool:
    said = outer.hints.get(SUBTRACT)
    if said is not None and not isinstance(said, bool):
        raise InvalidError(f"the hint {SUBTRACT} is {clean(repr(said))}, expected true or false")
    given = reader.config.get(SUBTRACT) is not None
    return (reader.flag(SUBTRACT) if given else True) if said is None else said


def _activation(reader: ConfigReader) -> str | None:
    given = reader.config.get("non_linearity") is not None
    return activation(reader, "non_linearity", None) if given else None


def _tokens(reader: ConfigReader, field: str) -> int:
    value = reader.config.get(field)
    if not isinstance(value, int) or not is_index(value) or value > MAX_TOKENS:
        reader.fault(field, f"an integer from 0 to {MAX_TOKENS}")
        return 0
    return value


def _layers(reader: ConfigReader) -> tuple[int, ...] | None:
    return None if reader.config.get("layers") == "all" else reader.integers("layers") or ()


def refusals(config: Mapping[str, Any], outer: Outer) -> list[Finding]:
    """The library does not save whether the projection is subtracted (adapters 1.3: a field of the
    config without a type), so that a DiReFT cannot be told from a NoReFT; it loads it as that."""
    found = []
    if config.get("output_reft") is False:
        found.append(unsupported("output_reft", "interventions elsewhere than behind layers"))
    open_ = config.get("orthogonality") is False and SUBTRACT not in {*config, *outer.hints}
    if open_:
        about = "nothing: a DiReFT is saved as a NoReFT, and read as one"
        hint = f"if it is a DiReFT, give --hint {SUBTRACT}=false"
        found.append(Finding(WARNING, "direft-or-noreft", SUBTRACT, "true or false", about, hint))
    return found


REFT = Architecture(
    kind="reft",
    place=place,
    fields=read,
    known=frozenset(
        ["r", "layers", "prefix_positions", "suffix_positions", "orthogonality", "tied_weights",
         "non_linearity", "output_reft", SUBTRACT]
    ),
    inert=frozenset(["dropout", "dtype", "init_weights_seed"]),
    refusals=refusals,
    hints=frozenset([SUBTRACT]),
)  # fmt: skip

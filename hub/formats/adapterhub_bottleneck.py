"""AdapterHub's bottlenecks and Compacters: configs without an architecture.  adapters 1.3
`configuration/adapter_config.py` (BnConfig), `methods/modeling.py`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from adapterkit.hub.bases.places import ATTENTION, CROSS, EMBEDDINGS, OUTPUT
from adapterkit.hub.fields import BottleneckFields, PhmFields, Wiring
from adapterkit.hub.findings import Finding, clean
from adapterkit.hub.formats.adapterhub_type import Architecture, Key, Outer, Paths, Place
from adapterkit.hub.formats.config import ConfigReader, is_number, unsupported
from adapterkit.hub.formats.peft_config import MAX_RANK

REQUIRED = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")
# Names of transformers that are functions, without parameters of their own; any case.
ACTIVATIONS = frozenset(
    ["gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python",
     "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu",
     "relu", "relu2", "relu6", "sigmoid", "silu", "swish", "tanh"]
)  # fmt: skip
OTHER_NAMES = {"leakyrelu": "leaky_relu"}
DEFAULT = "default"
# Where the library keeps a bottleneck -> which place of which layer that is.
PATHS: tuple[tuple[str, str], ...] = (
    (r"((?:.*\.)?layer\.\d+)\.attention\.output", ATTENTION),
    (r"((?:.*\.)?layer\.\d+)\.output", OUTPUT),
    (r"(.+)\.attention_adapters", ATTENTION),
    (r"(.+)\.cross_attention_adapters", CROSS),
    (r"(.+)\.output_adapters", OUTPUT),
    (r"((?:.*\.)?encoder\.block\.\d+)\.layer\.0", ATTENTION),
    (r"((?:.*\.)?encoder\.block\.\d+)\.layer\.1", OUTPUT),
    (r"((?:.*\.)?decoder\.block\.\d+)\.layer\.0", ATTENTION),
    (r"((?:.*\.)?decoder\.block\.\d+)\.layer\.1", CROSS),
    (r"((?:.*\.)?decoder\.block\.\d+)\.layer\.2", OUTPUT),
)
ROLES = {
    "scaling": "scaling",
    "gate.weight": "gate",
    "gate.bias": "gate_bias",
    "adapter_norm_before.weight": "norm_before",
    "adapter_norm_before.bias": "norm_before_bias",
    "adapter_norm_after.weight": "norm_after",
    "adapter_norm_after.bias": "norm_after_bias",
}
PROJECTION = {
    "weight": "", "bias": "_bias", "b": "_bias", "W": "_weight", "W_left": "_left",
    "W_right": "_right", "phm_rule": "_rule", "phm_rule_left": "_rule_left",
    "phm_rule_right": "_rule_right",
}  # fmt: skip
SHARED = {
    "phm_rule": "rule", "phm_rule_left": "rule_left", "phm_rule_right": "rule_right",
    "W_down": "down_weight", "W_down_left": "down_left", "W_down_right": "down_right",
    "W_up": "up_weight", "W_up_left": "up_left", "W_up_right": "up_right",
}  # fmt: skip
COUPLING = {
    f"{net}.{number}.{end}": f"{net}_{part}{'_bias' if end == 'bias' else ''}"
    for net in "FG"
    for number, part in ((0, "down"), (2, "up"))
    for end in ("weight", "bias")
}
PHM = frozenset(
    ["phm_dim", "phm_rank", "phm_bias", "shared_phm_rule", "factorized_phm_rule", "shared_W_phm",
     "factorized_phm_W"]
)  # fmt: skip


def kind(config: Mapping[str, Any], outer: Outer) -> str:
    return "compacter" if config.get("phm_layer") else "bottleneck"


def placing(config: Mapping[str, Any]) -> Callable[[Key], Place | None]:
    """With a norm in front, the projection down is the second of the network's modules."""
    roles = dict(ROLES)
    down = "adapter_down.0."
    if config.get("ln_before"):
        down = "adapter_down.1."
        roles |= {"adapter_down.0.weight": "norm_copy", "adapter_down.0.bias": "norm_copy_bias"}
    for name, role in PROJECTION.items():
        roles |= {f"{down}{name}": f"down{role}", f"adapter_up.{name}": f"up{role}"}

    def place(key: Key) -> Place | None:
        if key.holder == "shared_parameters":
            return ("", SHARED[key.rest]) if key.rest in SHARED else None
        if key.holder == "invertible_adapters":
            return _at(f"{key.path}." if key.path else "", EMBEDDINGS, COUPLING.get(key.rest))
        found = place_of(key.path) if key.holder == "adapters" else None
        return None if found is None else _at(*found, roles.get(key.rest))

    return place


def _at(layer: str, name: str, role: str | None) -> Place | None:
    return None if role is None else (f"{layer}{name}", role)


def place_of(path: str) -> tuple[str, str] | None:
    """(layer with a dot behind it, place) of a module that holds bottlenecks or fusions."""
    for pattern, name in PATHS:
        if match := re.fullmatch(pattern, path):
            return f"{match[1]}.", name
    return None


def read(reader: ConfigReader, outer: Outer, paths: Paths) -> BottleneckFields:
    for field in REQUIRED:
        if reader.config.get(field) is None:
            reader.fault(field, "a value, as it is required")
    flags = {"mh_adapter": ATTENTION, "cross_adapter": CROSS, "output_adapter": OUTPUT}
    factors, factor = _factors(reader)
    return BottleneckFields(
        places=tuple(name for flag, name in flags.items() if reader.flag(flag)),
        factor=factor,
        act=activation(reader, "non_linearity", None),
        factors=factors,
        leave_out=reader.integers("leave_out") or (),
        scaling=_scaling(reader),
        norm_before=reader.flag("ln_before"),
        norm_after=reader.flag("ln_after"),
        gate=reader.flag("use_gating"),
        coupling=_coupling(reader),
        wiring=_wiring(reader),
        phm=_phm(reader) if reader.flag("phm_layer") else None,
        width=outer.width,
    )


def _on(reader: ConfigReader, field: str) -> bool:
    """A flag whose default is true."""
    return field not in reader.config or reader.flag(field)


def activation(reader: ConfigReader, field: str, default: str | None) -> str:
    value = reader.config.get(field, default)
    name = value.lower() if isinstance(value, str) else ""
    found = OTHER_NAMES.get(name, name)
    if value is not None and found not in ACTIVATIONS:
        reader.fault(field, f"one of {', '.join(sorted(ACTIVATIONS))}")
    return found


def _factors(reader: ConfigReader) -> tuple[dict[int, float], float | None]:
    """By layer, and for every other."""
    value = reader.config.get("reduction_factor")
    table: dict[str, Any] = value if isinstance(value, dict) else {DEFAULT: value}
    right = all(_is_factor(factor) for factor in table.values()) and all(
        name == DEFAULT or (name.isdecimal() and len(name) < 7) for name in table
    )
    if not right:
        if value is not None:
            reader.fault("reduction_factor", "a positive number, or an object of layer to number")
        return {}, None
    numbers = {name: float(factor) for name, factor in table.items()}
    default = numbers.pop(DEFAULT, None)
    return {int(name): factor for name, factor in numbers.items()}, default


def _is_factor(value: object) -> bool:
    """A size is divided by it; one that is tiny would ask for a network of any size."""
    return is_number(value) and isinstance(value, int | float) and value >= 1 / MAX_RANK


def _scaling(reader: ConfigReader) -> float | str:
    value = reader.config.get("scaling", 1.0)
    if value in ("learned", "channel"):
        return str(value)
    return reader.number("scaling", 1.0)


def _coupling(reader: ConfigReader) -> float | None:
    if reader.config.get("inv_adapter") is None:
        return None
    field = "inv_adapter_reduction_factor"
    if not _is_factor(reader.config.get(field)):
        reader.fault(field, "a positive number, as there is an inv_adapter")
        return None
    return reader.number(field, 1.0)


def _wiring(reader: ConfigReader) -> Wiring:
    residual = reader.config.get("residual_before_ln", True)
    named = {True: "before", False: "after", None: "after", "post_add": "post_add"}
    if not isinstance(residual, bool | str | None) or residual not in named:
        reader.fault("residual_before_ln", "true, false or post_add")
        residual = True
    return Wiring(
        ln_before=reader.flag("original_ln_before"),
        ln_after=_on(reader, "original_ln_after"),
        residual=named[residual],
        residual_inside=reader.flag("adapter_residual_before_ln"),
        parallel=reader.flag("is_parallel"),
    )


def _phm(reader: ConfigReader) -> PhmFields:
    return PhmFields(
        size=reader.count("phm_dim", 4, MAX_RANK),
        rank=reader.count("phm_rank", 1, MAX_RANK),
        shared_rule=_on(reader, "shared_phm_rule"),
        rule_product=reader.flag("factorized_phm_rule"),
        shared_weights=reader.flag("shared_W_phm"),
        weight_product=_on(reader, "factorized_phm_W"),
        bias=_on(reader, "phm_bias"),
    )


def refusals(config: Mapping[str, Any], outer: Outer) -> list[Finding]:
    found = []
    if config.get("inv_adapter") not in (None, "nice"):
        shown = clean(repr(config["inv_adapter"]), 60)
        found.append(unsupported("inv_adapter", f"{shown}; only 'nice' ones are applied"))
    if config.get("residual_before_ln") == "post_add" and not (
        config.get("original_ln_before") or config.get("is_parallel")
    ):
        found.append(unsupported("residual_before_ln", "'post_add' without original_ln_before"))
    return found


BOTTLENECK = Architecture(
    kind=kind,
    place=placing({}),
    placing=placing,
    fields=read,
    known=PHM
    | {
        *REQUIRED, "cross_adapter", "original_ln_before", "original_ln_after", "ln_before",
        "ln_after", "is_parallel", "scaling", "use_gating", "residual_before_ln",
        "adapter_residual_before_ln", "inv_adapter", "inv_adapter_reduction_factor", "leave_out",
        "phm_layer",
    },
    inert=frozenset(
        ["dropout", "init_weights", "init_weights_seed", "stochastic_depth", "phm_c_init",
         "phm_init_range", "hypercomplex_nonlinearity", "learn_phm"]
    ),
    refusals=refusals,
)  # fmt: skip

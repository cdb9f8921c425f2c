"""Does an adapter bind to a base, tensor by tensor?  A pure function of two descriptions."""

from __future__ import annotations

import re
from collections.abc import Mapping

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import EMBEDDING, Base, Module
from adapterkit.hub.findings import ERROR, WARNING, Finding, clean
from adapterkit.hub.headers import Stored
from adapterkit.hub.kinds import kind
from adapterkit.hub.kinds.base import Expected
from adapterkit.hub.task import doubt


def fit(adapter: Adapter, base: Base) -> list[Finding]:
    """All that keeps the adapter from binding to the base, and what is odd about the pair."""
    schema = kind(adapter.kind).schema(adapter, base.modules)
    findings = [*adapter.findings, *schema.findings]
    incomplete = {f.tensor for f in adapter.findings if f.code == "missing-tensor"}
    findings += _missing(adapter, schema.tensors, incomplete)
    for (module, role), stored in adapter.tensors.items():
        expected = schema.tensors.get((module, role))
        if expected is None:
            findings.append(_unexpected(adapter, base, module, role, stored))
        elif expected.shape != stored.shape and not _own_head(base, module, role, stored, expected):
            findings += _misshapen(adapter, base, base.modules[module], role, stored, expected)
    return findings + _untrained_heads(adapter, base) + _made_for(adapter, base)


def _is_created(base: Base, module: Module) -> bool:
    """Whether the checkpoint has nothing for it, so that it starts with random values."""
    return bool(base.tensors) and not module.weight and module.tied_to is None


def _own_head(base: Base, module: str, role: str, stored: Stored, expected: Expected) -> bool:
    """Whether this is the weight or bias of a head that only the adapter has: it brings its own
    number of labels."""
    return (
        _is_created(base, base.modules[module])
        and role.startswith("replace.")
        and len(stored.shape) == len(expected.shape)
        and stored.shape[1:] == expected.shape[1:]
    )


def _untrained_heads(adapter: Adapter, base: Base) -> list[Finding]:
    return [
        Finding(
            WARNING, "untrained-head", name, "weights in the base or the adapter", "neither has any"
        )
        for name, module in base.modules.items()
        if _is_created(base, module) and (name, "replace.weight") not in adapter.tensors
    ]


def _missing(
    adapter: Adapter, expected: Mapping[tuple[str, str], Expected], incomplete: set[str]
) -> list[Finding]:
    """Tensors the config implies and the file lacks; those of a broken pair are named already."""
    return [
        Finding(
            ERROR,
            "missing-tensor",
            module,
            f"a tensor {role} {list(want.shape)}",
            "none, it is missing",
        )
        for (module, role), want in expected.items()
        if want.required and (module, role) not in adapter.tensors and module not in incomplete
    ]


def _unexpected(adapter: Adapter, base: Base, module: str, role: str, stored: Stored) -> Finding:
    if module in base.modules:
        about = f"{module}, which the config does not target"
        if module in adapter.targets.select({module: base.modules[module]}):
            about = f"a tensor {role} for the {base.modules[module].type} module {module}"
        return Finding(ERROR, "not-targeted", stored.key, "a module the config targets", about)
    if layer := _beyond_the_last_layer(module, base.modules):
        number, last = layer
        expected = f"layers 0 to {last} of the base"
        return Finding(ERROR, "layer-out-of-range", stored.key, expected, f"layer {number}")
    hint = "is the adapter made for another architecture, or another task?"
    return Finding(
        ERROR,
        "no-such-module",
        stored.key,
        "a module of the base",
        f"unexpected, no match for {module}",
        hint,
    )


def _beyond_the_last_layer(module: str, modules: Mapping[str, Module]) -> tuple[int, int] | None:
    """(layer asked for, last layer there is) when only the number of the layer is wrong."""
    match = re.match(r"(.*?\.)(\d+)(\..+)", module)
    if match is None:
        return None
    prefix, number, rest = match[1], int(match[2]), match[3]
    layers = [
        int(found[1])
        for name in modules
        if (found := re.fullmatch(rf"{re.escape(prefix)}(\d+){re.escape(rest)}", name))
    ]
    return (number, max(layers)) if layers and number > max(layers) else None


def _misshapen(
    adapter: Adapter, base: Base, module: Module, role: str, stored: Stored, expected: Expected
) -> list[Finding]:
    want = f"shape {list(expected.shape)}"
    found = f"shape {list(stored.shape)}"
    code, hint = "shape-mismatch", ""
    if module.name == _table(base) or role == "table" or module.tied_to or module.name == "lm_head":
        if stored.shape[-1:] == expected.shape[-1:] and len(stored.shape) == 2:
            code = "vocabulary-resized"
            want += f", the vocabulary size of the base ({expected.shape[0]} rows)"
            hint = f"resize the base to {stored.shape[0]} rows: load(..., resize=True)"
    elif _rank_fault(adapter, stored):
        return []
    return [Finding(ERROR, code, stored.key, want, found, hint)]


def _rank_fault(adapter: Adapter, stored: Stored) -> bool:
    """Whether the same fault is named already: the rank against the config, no base needed."""
    return any(f.tensor == stored.key and f.severity == ERROR for f in adapter.findings)


def _table(base: Base) -> str:
    return next((m.name for m in base.modules.values() if m.type == EMBEDDING), "")


def _made_for(adapter: Adapter, base: Base) -> list[Finding]:
    """What the adapter says about its base, compared with this one: doubts, not proof."""
    findings = []
    if adapter.base_name and not _same_name(adapter.base_name, base.name):
        made, here = clean(adapter.base_name), clean(base.name)
        findings.append(Finding(WARNING, "other-base-name", "base_model_name_or_path", made, here))
    return findings + doubt(adapter, base)


def _same_name(made_for: str, base: str) -> bool:
    """Whether two spellings may mean one base: a Hub id, a path, or the tail of a path."""
    a, b = (name.replace("\\", "/").strip("/").split("/") for name in (made_for, base))
    return a[-1].lower() == b[-1].lower()

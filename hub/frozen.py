"""What a checkpoint repeats of its base, compared with the base: equal, or made for another one."""

from __future__ import annotations

from collections.abc import Iterator

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import Base, Module
from adapterkit.hub.findings import ERROR, OTHER_WEIGHTS, WARNING, Finding

ROLE = "frozen."


def frozen(adapter: Adapter, base: Base) -> list[Finding]:
    """One for each tensor that differs from the base's, where the base is a checkpoint."""
    return list(_differing(adapter, base))


def _differing(adapter: Adapter, base: Base) -> Iterator[Finding]:
    for (module, role), stored in adapter.tensors.items():
        if not role.startswith(ROLE) or module not in base.modules:
            continue
        here = base.tensors.get(_key(base.modules[module], role.removeprefix(ROLE)))
        if here is None or here.shape != stored.shape:  # live, or said by `fit`
            continue
        if here.dtype != stored.dtype:
            about = f"{stored.dtype}, not compared with {here.dtype}"
            yield Finding(WARNING, "not-compared", stored.key, "the base's values", about)
        elif here.read() != stored.read():
            want, about = "the base's values, which it repeats", "other values"
            yield Finding(ERROR, OTHER_WEIGHTS, stored.key, want, about)


def _key(module: Module, parameter: str) -> str:
    """The checkpoint's tensor of a parameter."""
    return (module.bias or "") if parameter == "bias" else "".join(module.weight[:1])

"""Keys of LoRA on parameters that are not modules: `target_parameters`.

Several parameters of one module are wrapped one around another, in the order the model registers
them: the first lies innermost (peft 0.21 `tuners/lora/layer.py`, ParamWrapper).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from adapterkit.hub.bases.base import OTHER, Module
from adapterkit.hub.matching import Targets

KEY = re.compile(r"base_model\.model\.(.+?)((?:\.base_layer)*)\.lora_([AB])\.weight")
INNER, WEIGHT = ".base_layer", "weight"
# transformers registers what enters an expert before what leaves it.
ORDER = ("gate_up_proj", "up_proj", "down_proj")
MOST = 1000  # entries that no honest config has more of: all are compared with all paths


def places(keys: Iterable[str], targets: Targets) -> dict[str, tuple[str, str]]:
    """Key -> (parameter or its module, role), of those that the config means by a parameter."""
    if not targets.parameters:
        return {}
    levels: dict[str, dict[int, dict[str, str]]] = {}
    for key in keys:
        if match := KEY.fullmatch(key):
            depth = match[2].count(INNER)
            levels.setdefault(match[1], {}).setdefault(depth, {})[match[3]] = key
    found: dict[str, tuple[str, str]] = {}
    for path, held in levels.items():
        if _is_target(path, targets):
            continue
        parameters = _parameters(path, targets.parameters[:MOST], len(held))
        for parameter, depth in zip(parameters, sorted(held, reverse=True), strict=False):
            for factor, key in held[depth].items():
                found[key] = _place(path, parameter, factor)
    return found


def _is_target(path: str, targets: Targets) -> bool:
    """Whether `target_modules` means the module, so that its factors are ordinary ones."""
    return bool(targets.select({path: Module(path, OTHER, ())})) and not targets.is_parameter(
        Module(path, OTHER, ())
    )


def _place(path: str, parameter: str, factor: str) -> tuple[str, str]:
    if parameter == WEIGHT:  # as good as a module
        return path, factor
    return f"{path}.{parameter}", f"experts_{factor}"


def _parameters(path: str, entries: Collection[str], count: int) -> list[str]:
    """Names of the parameters of this module, innermost first; none unless there are `count`."""
    named: dict[str, bool] = {}
    for entry in entries:
        module, _, parameter = entry.rpartition(".")
        if not module or path == module or path.endswith(f".{module}"):
            named[parameter] = named.get(parameter, False) or bool(module)
    exact = [parameter for parameter, with_module in named.items() if with_module]
    chosen = next((each for each in (list(named), exact) if len(each) == count), [])
    if len(chosen) > 1 and not set(chosen) <= set(ORDER):
        return []
    return sorted(chosen, key=lambda name: ORDER.index(name) if name in ORDER else 0)


def paths(names: Collection[str], targets: Targets) -> dict[str, str]:
    """What patterns over paths see of each module -> its name."""
    weights = {name for name in names if targets.is_parameter(Module(name, OTHER, ()))}
    return {f"{name}.{WEIGHT}" if name in weights else name: name for name in names}

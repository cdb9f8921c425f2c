"""Which modules a config means: PEFT's selection rules, on patterns nobody has vetted.

Rules: peft 0.21 `tuners/tuners_utils.py` (check_target_module_exists) and `utils/other.py`
(get_pattern_key). Patterns come from strangers' files, so they run with a deadline.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from adapterkit.hub.bases.base import CONV1D, EXPERTS, LINEAR, Module
from adapterkit.hub.findings import clean
from adapterkit.registry.errors import DamagedError

# All patterns of one config together; honest ones need milliseconds.
TIME_LIMIT = 3.0
MAX_PATTERN = 20_000
PLAIN = re.compile(r"[\w.-]*")
# Of all counts in braces multiplied: the engine unrolls them.
MAX_REPEATS = 10_000
COUNT = re.compile(r"\{([^}]*)")
RECURSION = re.compile(r"\(\?(?:R|&|P>|[+-]?\d)")


class Patterns:
    """Regular expressions of one config, matched within one common time limit (seconds)."""

    def __init__(self, time_limit: float = TIME_LIMIT) -> None:
        self._limit = self._left = time_limit
        self._compiled: dict[str, Any] = {}

    def match(self, pattern: str, text: str, field: str) -> Any:
        """The match of the whole `text`, or None. DamagedError if it is not a usable regex."""
        import regex

        started = time.monotonic()
        try:
            compiled = self._compile(pattern, field)
            if self._left <= 0:
                raise TimeoutError
            found = compiled.fullmatch(text, timeout=self._left)
        except TimeoutError as error:
            raise DamagedError(
                f"{field} holds a pattern that takes longer than {self._limit:g} s to match"
                f" (catastrophic backtracking): {clean(pattern)}"
            ) from error
        except (regex.error, MemoryError, RecursionError) as error:
            raise _unusable(field, pattern, str(error)) from error
        self._left -= time.monotonic() - started
        return found

    def _compile(self, pattern: str, field: str) -> Any:
        import regex

        if pattern not in self._compiled:
            if reason := _excess(pattern):
                raise _unusable(field, pattern, reason)
            try:
                self._compiled[pattern] = regex.compile(pattern)
            except (regex.error, RecursionError, OverflowError, MemoryError) as error:
                raise _unusable(field, pattern, str(error)) from error
        return self._compiled[pattern]


def _excess(pattern: str) -> str:
    """Why compiling or matching it could take all memory, which no deadline prevents; else ""."""
    if len(pattern) > MAX_PATTERN:
        return f"{len(pattern)} characters long"
    if RECURSION.search(pattern):
        return "recursion"
    repeats = 1
    for count in COUNT.findall(pattern):
        if not re.fullmatch(r"\d{0,4}(?:,\d{0,4})?", count):
            return f"the count {{{count}}}"
        repeats *= max((int(n) for n in count.split(",") if n), default=1) or 1
    return "too many repeats" if repeats > MAX_REPEATS else ""


def _unusable(field: str, pattern: str, reason: str) -> DamagedError:
    reason = clean(reason)
    return DamagedError(f"{field} is not a valid regular expression: {clean(pattern)}: {reason}")


@dataclass(frozen=True)
class Targets:
    """Module selection of a config.

    modules: suffixes, or one regular expression over the whole path, or "all-linear", or None when
    the config names none. layers, layers_pattern: restriction to some layer numbers.
    saved: modules replaced as a whole, which are never targeted. parameters: ends of the paths of
    parameters that are targeted themselves, whatever the other fields say. last: only as many
    layers, counted from the last one. left_out: layers without, those of a decoder counted on from
    the encoder's. loose: an entry of the list may start inside of a name.
    """

    modules: tuple[str, ...] | str | None = None
    exclude: tuple[str, ...] | str | None = None
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    last: int | None = None
    loose: bool = False
    left_out: tuple[int, ...] = ()

    @cached_property
    def _entries(self) -> frozenset[str]:
        return frozenset(self.modules or ())

    @cached_property
    def _barred_entries(self) -> frozenset[str]:
        return frozenset(self.exclude or ())

    def select(self, names: Mapping[str, Module]) -> list[str]:
        """The names that are targeted, in order."""
        patterns = Patterns()
        found = [name for name in names if self._is_target(name, names, patterns)]
        if self.left_out:
            before = 1 + max((_layer(n) or 0 for n in names if _is_in("encoder", n)), default=-1)
            found = [name for name in found if _number(name, before) not in self.left_out]
        if self.last is None:
            return found
        first = 1 + max((_layer(name) or 0 for name in names), default=0) - self.last
        return [name for name in found if (layer := _layer(name)) is None or layer >= first]

    def require_usable(self, names: Iterable[str]) -> None:
        """Raises DamagedError if a pattern is not a regex, or takes too long for any of `names`."""
        patterns = Patterns()
        both = {"target_modules": self.modules, "exclude_modules": self.exclude}
        for field, value in both.items():
            if isinstance(value, str):
                for name in ("", *names):
                    patterns.match(value, name, field)
        for entry in self.layers_pattern:
            patterns.match(_layer_rule(entry), "", "layers_pattern")

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Entries of the target list that no name ends with."""
        if not isinstance(self.modules, tuple):
            return []
        if self.loose:
            held = tuple(names)
            return [e for e in self.modules if not any(name.endswith(e) for name in held)]
        every = {end for name in names for end in _ends(name)}
        return [entry for entry in self.modules if entry not in every]

    def unmatched_parameters(self, modules: Mapping[str, Module]) -> list[str]:
        """Entries of the list of parameters that mean none."""
        every = {end for row in modules.values() for end in _ends(_parameter(row))}
        return [entry for entry in self.parameters if entry not in every]

    def is_parameter(self, module: Module) -> bool:
        """Whether it is targeted as a parameter: a fused one, or the weight of a module."""
        ends = _ends(_parameter(module)) if self.parameters else ()
        return not set(self.parameters).isdisjoint(ends)

    def is_saved(self, name: str) -> bool:
        """Whether a module is replaced as a whole, or lies inside one that is: PEFT takes every
        module whose path ends with an entry, so that "norm" means "input_layernorm" as well."""
        path = f"{name}."
        return any(f"{entry}." in path for entry in self.saved)

    def _is_barred(self, name: str) -> bool:
        """Saved modules are never targeted; here PEFT compares whole names of the path."""
        path = f".{name}."
        return any(f".{entry}." in path for entry in self.saved)

    def _is_target(self, name: str, names: Mapping[str, Module], patterns: Patterns) -> bool:
        if self.is_parameter(names[name]):
            return True
        if names[name].type == EXPERTS:  # not a module, whatever its name
            return False
        if self._is_excluded(name, patterns) or self._is_barred(name):
            return False
        if isinstance(self.modules, str):
            if self.modules.lower() == "all-linear":
                return names[name].type in (LINEAR, CONV1D) and not _is_head(name, names)
            return patterns.match(self.modules, name, "target_modules") is not None
        if name in self._entries:
            return True
        return self._is_listed(name) and self._in_layers(name, patterns)

    def _is_listed(self, name: str) -> bool:
        if self.loose:
            return name.endswith(tuple(self._entries))
        return not self._entries.isdisjoint(_ends(name))

    def _is_excluded(self, name: str, patterns: Patterns) -> bool:
        if isinstance(self.exclude, str):
            return patterns.match(self.exclude, name, "exclude_modules") is not None
        return not self._barred_entries.isdisjoint(_ends(name))

    def _in_layers(self, name: str, patterns: Patterns) -> bool:
        if self.layers is None:
            return True
        if not self.layers_pattern:
            # PEFT's default rule: the first number with two names before and one after it
            found = [part for part in name.split(".")[2:-1] if part.isdecimal()]
            return bool(found) and int(found[0]) in self.layers
        for pattern in self.layers_pattern:
            if match := patterns.match(_layer_rule(pattern), name, "layers_pattern"):
                return (match["layer"] or "").isdecimal() and int(match["layer"]) in self.layers
        return False


def _parameter(module: Module) -> str:
    """The path of its weight as a parameter."""
    return module.name if module.type == EXPERTS else f"{module.name}.weight"


def _is_in(stack: str, name: str) -> bool:
    return stack in name.split(".")


def _number(name: str, before: int) -> int | None:
    """Of a layer over both stacks. before: those of the encoder."""
    layer = _layer(name)
    return layer if layer is None or not _is_in("decoder", name) else before + layer


def _layer(name: str) -> int | None:
    """The first number of a path."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _layer_rule(pattern: str) -> str:
    return rf"(?:|.*?\.)(?:{pattern})\.(?P<layer>\d+)\..*"


def _ends(name: str) -> list[str]:
    """What an entry of a list may say to mean `name`: it, or its last names."""
    return [name] + [name[i + 1 :] for i, c in enumerate(name) if c == "."]


def _is_head(name: str, names: Mapping[str, Module]) -> bool:
    """Output heads are outside of "all-linear": the last linear of a model, outside its layers."""
    return "." not in name or names[name].tied_to is not None


def by_pattern(table: Mapping[str, Any], name: str, patterns: Patterns, field: str) -> Any:
    """The value of the first key that matches the end of `name`, or None (PEFT's get_pattern_key).

    Keys are mostly plain paths, hundreds of them, and need no engine.
    """
    for key, value in table.items():
        if _is_plain(key):
            if _is_end(key, name):
                return value
        elif patterns.match(rf"(?:.*\.)?(?:{key})", name, field) is not None:
            return value
    return None


def first_of(keys: Iterable[str], name: str, patterns: Patterns, field: str) -> str | None:
    """The first key that matches the end of `name` behind a dot, or None: PEFT's rule up to 0.13,
    with one look-up for ranks and alphas together."""
    for key in keys:
        if _is_plain(key):
            if len(key) < len(name) and _is_end(key, name):
                return key
        elif patterns.match(rf".*\.{key}", name, field) is not None:
            return key
    return None


@lru_cache(1 << 14)
def _is_plain(key: str) -> bool:
    return PLAIN.fullmatch(key) is not None


def _is_end(key: str, name: str) -> bool:
    """Whether a key without special characters but the dot, which means any, matches the end."""
    start = len(name) - len(key)
    if start < 0 or (start > 0 and name[start - 1] != ".") or "\n" in name:
        return False
    end = name[start:]
    if end == key or end.count(".") >= key.count("."):  # only a dot of the key matches a dot
        return end == key
    return all(k in (".", c) for k, c in zip(key, end, strict=True))

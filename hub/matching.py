"""Which modules a config means: PEFT's selection rules, on patterns nobody has vetted.

Rules: peft 0.21 `tuners/tuners_utils.py` (check_target_module_exists) and `utils/other.py`
(get_pattern_key). Patterns come from strangers' files, so they run with a deadline.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adapterkit.hub.bases.base import CONV1D, LINEAR, Module
from adapterkit.hub.findings import clean
from adapterkit.registry.errors import DamagedError

# All patterns of one config together; honest ones need milliseconds.
TIME_LIMIT = 3.0
MAX_PATTERN = 20_000


class Patterns:
    """Regular expressions of one config, matched within one common time limit (seconds)."""

    def __init__(self, time_limit: float = TIME_LIMIT) -> None:
        self._left = time_limit
        self._compiled: dict[str, Any] = {}

    def match(self, pattern: str, text: str, field: str) -> Any:
        """The match of the whole `text`, or None. DamagedError if `pattern` is not a usable regex."""
        import regex

        started = time.monotonic()
        try:
            found = self._compile(pattern, field).fullmatch(text, timeout=max(self._left, 0.001))
        except TimeoutError as error:
            raise DamagedError(
                f"{field} holds a pattern that takes longer than {TIME_LIMIT:g} s to match"
                f" (catastrophic backtracking): {clean(pattern)}"
            ) from error
        except regex.error as error:
            raise _unusable(field, pattern, str(error)) from error
        self._left -= time.monotonic() - started
        return found

    def _compile(self, pattern: str, field: str) -> Any:
        import regex

        if len(pattern) > MAX_PATTERN:
            raise _unusable(field, pattern, f"{len(pattern)} characters long")
        if pattern not in self._compiled:
            try:
                self._compiled[pattern] = regex.compile(pattern)
            except (regex.error, RecursionError, OverflowError, MemoryError) as error:
                raise _unusable(field, pattern, str(error)) from error
        return self._compiled[pattern]


def _unusable(field: str, pattern: str, reason: str) -> DamagedError:
    return DamagedError(f"{field} is not a valid regular expression: {clean(pattern)}: {reason}")


@dataclass(frozen=True)
class Targets:
    """Module selection of a config.

    modules: suffixes, or one regular expression over the whole path, or "all-linear", or None when
    the config names none. layers, layers_pattern: restriction to some layer numbers.
    saved: modules replaced as a whole, which are never targeted.
    """

    modules: tuple[str, ...] | str | None = None
    exclude: tuple[str, ...] | str | None = None
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()

    def select(self, names: Mapping[str, Module]) -> list[str]:
        """The names that are targeted, in order."""
        patterns = Patterns()
        return [name for name in names if self._is_target(name, names, patterns)]

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Entries of the target list that no name ends with."""
        if not isinstance(self.modules, tuple):
            return []
        every = list(names)
        return [entry for entry in self.modules if not any(_ends(name, entry) for name in every)]

    def is_saved(self, name: str) -> bool:
        """Whether a module is replaced as a whole, or lies inside one that is: PEFT takes every
        module whose path ends with an entry, so that "norm" means "input_layernorm" as well."""
        parts = name.split(".")
        paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(path.endswith(entry) for entry in self.saved for path in paths)

    def _is_barred(self, name: str) -> bool:
        """Saved modules are never targeted; here PEFT compares whole names of the path."""
        path = f".{name}."
        return any(f".{entry}." in path for entry in self.saved)

    def _is_target(self, name: str, names: Mapping[str, Module], patterns: Patterns) -> bool:
        if self._is_excluded(name, patterns) or self._is_barred(name):
            return False
        if isinstance(self.modules, str):
            if self.modules.lower() == "all-linear":
                return names[name].type in (LINEAR, CONV1D) and not _is_head(name, names)
            return patterns.match(self.modules, name, "target_modules") is not None
        if name in (self.modules or ()):
            return True
        return any(_ends(name, entry) for entry in self.modules or ()) and self._in_layers(
            name, patterns
        )

    def _is_excluded(self, name: str, patterns: Patterns) -> bool:
        if isinstance(self.exclude, str):
            return patterns.match(self.exclude, name, "exclude_modules") is not None
        return any(_ends(name, entry) for entry in self.exclude or ())

    def _in_layers(self, name: str, patterns: Patterns) -> bool:
        if self.layers is None:
            return True
        if not self.layers_pattern:
            # PEFT's default rule: the first number with two names before and one after it
            found = [part for part in name.split(".")[2:-1] if part.isdecimal()]
            return bool(found) and int(found[0]) in self.layers
        for pattern in self.layers_pattern:
            rule = rf"(?:|.*?\.)(?:{pattern})\.(?P<layer>\d+)\..*"
            if match := patterns.match(rule, name, "layers_pattern"):
                return int(match["layer"]) in self.layers
        return False


def _ends(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _is_head(name: str, names: Mapping[str, Module]) -> bool:
    """Output heads are outside of "all-linear": the last linear of a model, outside of its layers."""
    return "." not in name or names[name].tied_to is not None


def by_pattern(table: Mapping[str, Any], name: str, patterns: Patterns, field: str) -> Any:
    """The value of the first key that matches the end of `name`, or None (PEFT's get_pattern_key)."""
    for key, value in table.items():
        if patterns.match(rf"(?:.*\.)?(?:{key})", name, field) is not None:
            return value
    return None

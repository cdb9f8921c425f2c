"""Typed reading of a config somebody else wrote: every fault is collected, then raised at once."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

from adapterkit.hub.findings import ERROR, UNSUPPORTED, WARNING, Finding, clean
from adapterkit.registry.errors import DamagedError

# What no honest config has more of: bounds the work that lists and patterns ask for.
MAX_NAMES = 10_000
LARGEST = sys.float_info.max


# Larger than any alpha or factor that was trained; beyond it products overflow.
MAX_NUMBER = 1e9


class ConfigReader:
    """Takes fields from a JSON object; a missing or null field is its default."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config, self.name = config, name
        self.faults: list[str] = []

    def done(self) -> None:
        """Raises DamagedError with every fault so far."""
        if self.faults:
            raise DamagedError(f"{clean(self.name)}: {'; '.join(self.faults)}")

    def fault(self, field: str, expected: str) -> None:
        found = clean(repr(self.config.get(field)), 80)
        self.faults.append(f"{field} is {found}, expected {expected}")

    def count(self, field: str, default: int, limit: int) -> int:
        """A positive integer up to `limit`; null is a fault."""
        value = self.config.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            self.fault(field, f"an integer from 1 to {limit}")
            return default
        return value

    def number(self, field: str, default: float) -> float:
        """A finite number of a size that training can give; null is a fault."""
        value = self.config.get(field, default)
        if not is_number(value) or abs(value) > MAX_NUMBER:
            self.fault(field, f"a finite number up to {MAX_NUMBER:g}")
            return default
        return float(value)

    def flag(self, field: str) -> bool:
        value = self.config.get(field)
        if value is not None and not isinstance(value, bool):
            self.fault(field, "true or false")
        return value is True

    def text(self, field: str, limit: int = 4096) -> str | None:
        value = self.config.get(field)
        if value is not None and (not isinstance(value, str) or len(value) > limit):
            self.fault(field, "a string")
            return None
        return value

    def choice(self, field: str, default: str, choices: tuple[str, ...]) -> str:
        value = self.config.get(field)
        if value is None:
            return default
        if value not in choices:
            self.fault(field, f"one of {', '.join(choices)}")
            return default
        return str(value)

    def names(self, field: str) -> tuple[str, ...]:
        """A list of non-empty strings, or one string."""
        value = self.config.get(field)
        if value is None or value == "":
            return ()
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
            self.fault(field, "a list of names")
            return ()
        if len(names) > MAX_NAMES:
            self.fault(field, f"{MAX_NAMES} names at most")
            return ()
        return tuple(names)

    def names_or_pattern(self, field: str) -> tuple[str, ...] | str | None:
        """A list of names stays one; a string is a regular expression."""
        value = self.config.get(field)
        if value is None or isinstance(value, str):
            return value or None
        if not isinstance(value, list):
            self.fault(field, "a list of names or a regular expression")
            return None
        return self.names(field)

    def integers(self, field: str) -> tuple[int, ...] | None:
        """Non-negative integers: a list, or one; None for an empty list."""
        value = self.config.get(field)
        if value is None:
            return None
        values = [value] if not isinstance(value, list) else value
        if not all(is_index(item) for item in values):
            self.fault(field, "non-negative integers")
            return None
        return tuple(values) or None

    def numbers_by_pattern(self, field: str, *, integer: bool) -> dict[str, Any]:
        """pattern -> positive integer (a rank), or finite number (an alpha)."""
        value = self.config.get(field)
        if value is None:
            return {}
        right = isinstance(value, dict) and all(
            is_index(item) and item > 0
            if integer
            else is_number(item) and abs(item) <= MAX_NUMBER
            for item in value.values()
        )
        if not right:
            kind = "positive integers" if integer else "numbers"
            self.fault(field, f"an object of pattern to {kind}")
            return {}
        if len(value) > MAX_NAMES:
            self.fault(field, f"{MAX_NAMES} patterns at most")
            return {}
        return dict(value)


def is_number(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= LARGEST  # false for NaN; an integer may be too large for any float
    )


def is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_blank(value: object) -> bool:
    """Null, false or empty: a field that asks for nothing."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def unknown_fields(
    config: Mapping[str, Any], known: Collection[str], allowed: Collection[str]
) -> tuple[list[str], list[Finding]]:
    """Fields this program does not know: a warning when they ask for nothing, else an error."""
    names = sorted(config.keys() - known)
    findings = []
    for name in names:
        harmless = is_blank(config[name]) or name in allowed
        findings.append(
            Finding(
                WARNING if harmless else ERROR,
                "unknown-field",
                name,
                "a known config field",
                clean(repr(config[name]), 80),
                "" if harmless else f"--allow-field {clean(name)} if it changes nothing",
            )
        )
    return names, findings


def unsupported(field: str, why: str) -> Finding:
    """A field that would have to be applied and is not supported."""
    return Finding(ERROR, UNSUPPORTED, field, f"no {field}", why)

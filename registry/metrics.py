"""Metrics: named numbers attached to a version."""

from __future__ import annotations

import math
from collections.abc import Iterable

from adapterkit.registry.errors import DamagedError
from adapterkit.registry.strictjson import parse_object


def parse_metrics(data: bytes) -> dict[str, float]:
    """Raises DamagedError unless it is an object of finite numbers."""
    found = parse_object(data, "metrics")
    for name, value in found.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise DamagedError(f"the metric {name[:80]!r} is {ascii(value)[:80]}, not a number")
    return found


def merged(metrics: Iterable[bytes]) -> dict[str, float]:
    """Later values replace earlier ones."""
    found: dict[str, float] = {}
    for data in metrics:
        found |= parse_metrics(data)
    return found

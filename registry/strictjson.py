"""JSON as data from strangers: strict in, canonical (RFC 8785) out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from adapterkit.registry.errors import DamagedError

# Deeper nesting than any adapter or model config; well under Python's recursion limit.
MAX_DEPTH = 64
MAX_SIZE = 64 << 20


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """The JSON object in `data`; `name` is the file the message shows.

    A UTF-8 byte order mark is accepted. Raises DamagedError for any other encoding, text that is
    not JSON, a value that is not an object, a repeated key, and nesting deeper than MAX_DEPTH.
    NaN and Infinity parse to floats (Python writes them); whoever reads the field refuses them.
    """
    if len(data) > MAX_SIZE:
        raise DamagedError(f"{name} has {len(data)} bytes, more than the {MAX_SIZE} allowed for JSON")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedError(f"{name} is not UTF-8 encoded JSON: {error}") from error
    repeated: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            keys = [key for key, _ in items]
            repeated.extend(sorted({key for key in keys if keys.count(key) > 1}))
        return found

    try:
        value = json.loads(text, object_pairs_hook=pairs)
    except (json.JSONDecodeError, RecursionError) as error:
        detail = error if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise DamagedError(f"{name} is not JSON: {detail}") from error
    if repeated:
        raise DamagedError(f"{name} has duplicate keys: {', '.join(map(repr, repeated))}")
    if not isinstance(value, dict):
        raise DamagedError(f"{name} holds {_kind(value)}, expected a JSON object")
    if depth(value) > MAX_DEPTH:
        raise DamagedError(f"{name} is nested deeper than {MAX_DEPTH} levels")
    return value


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def depth(value: object) -> int:
    """Levels of nesting; a scalar has none."""
    deepest = 0
    stack: list[tuple[object, int]] = [(value, 0)]
    while stack:
        item, level = stack.pop()
        deepest = max(deepest, level)
        if isinstance(item, Mapping):
            stack.extend((child, level + 1) for child in item.values())
        elif isinstance(item, list | tuple):
            stack.extend((child, level + 1) for child in item)
    return deepest


def canonical(value: object) -> bytes:
    """RFC 8785 bytes of `value`: equal data has equal bytes, whatever wrote it."""
    import rfc8785

    return rfc8785.dumps(value)  # type: ignore[arg-type]


def digest_of(data: bytes) -> str:
    """Lower-case hex sha256, as digests are stored everywhere here."""
    return hashlib.sha256(data).hexdigest()

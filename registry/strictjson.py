"""JSON as data from strangers: strict in, canonical (RFC 8785) out."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from adapterkit.registry.errors import DamagedError

# Deeper nesting than any adapter or model config; well under Python's recursion limit.
MAX_DEPTH = 64
MAX_SIZE = 64 << 20
# 1e30 is in every tokenizer's config.
MAX_DIGITS = 100
# The largest integer that JSON readers agree on.
MAX_INTEGER = 2**53 - 1
# A number that may be larger, or a text that looks like one.
_LONG = re.compile(rb"[:,\[-]\d{16}")
_WRITER = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """The JSON object in `data`; `name` is the file the message shows.

    A UTF-8 byte order mark is accepted. Raises DamagedError for any other encoding, text that is
    not JSON, a value that is not an object, a repeated key, nesting deeper than MAX_DEPTH, and half
    of a surrogate pair, which no UTF-8 can hold.
    NaN and Infinity parse to floats (Python writes them); whoever reads the field refuses them.
    """
    check_size(len(data), name)
    repeated: list[str] = []
    try:
        value = loads(data.decode("utf-8-sig"), repeated)
    except UnicodeDecodeError as error:
        raise DamagedError(f"{name} is not UTF-8 encoded JSON: {error}") from error
    except (ValueError, RecursionError) as error:
        detail = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DamagedError(f"{name} is not JSON: {detail}") from error
    if repeated:
        shown = ", ".join(repr(key[:80]) for key in repeated[:20])
        raise DamagedError(f"{name} has duplicate keys: {shown}")
    if not isinstance(value, dict):
        raise DamagedError(f"{name} holds {_kind(value)}, expected a JSON object")
    opened = data.count(b"{") + data.count(b"[")
    if opened > MAX_DEPTH and depth(value) > MAX_DEPTH:
        raise DamagedError(f"{name} is nested deeper than {MAX_DEPTH} levels")
    if b"\\u" in data and not is_text(value):
        raise DamagedError(f"{name} holds half of a surrogate pair, which is not text")
    return value


def parse_canonical(data: bytes) -> dict[str, Any] | None:
    """The object in `data` if it is in canonical form and simple; None: parse_object has to look.

    Several times faster: bytes that are written again as they were hold no repeated key, no
    surrogate and nothing that RFC 8785 writes in another way than Python.
    """
    opened = data.count(b"{") + data.count(b"[")
    if len(data) > MAX_SIZE or opened > MAX_DEPTH or not data.isascii() or _LONG.search(data):
        return None
    try:
        value = _READER.decode(data.decode())
        good = type(value) is dict and _WRITER.encode(value).encode() == data
    except ValueError:
        return None
    return value if good else None


def _same_float(text: str) -> float:
    """Python writes it as JavaScript does, when it has a fraction and no exponent."""
    value = float(text)
    if repr(value) != text or "e" in text or text.endswith(".0"):
        raise ValueError(f"{text} is not simple")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


_READER = json.JSONDecoder(parse_float=_same_float, parse_constant=_no_constant)


def check_size(size: int, name: str) -> None:
    """Raises DamagedError if a file of `size` bytes is too large to be parsed."""
    if size > MAX_SIZE:
        raise DamagedError(f"{name} has {size} bytes, more than the {MAX_SIZE} allowed for JSON")


def loads(text: str, repeated: list[str]) -> Any:
    """The value in `text`; keys that an object repeats are appended to `repeated`.

    Raises ValueError, also for integers no config has, as reading digits takes quadratic time;
    RecursionError.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            counts = Counter(key for key, _ in items)
            repeated.extend(sorted(key for key, n in counts.items() if n > 1))
        return found

    return json.loads(text, object_pairs_hook=pairs, parse_int=_integer)


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def is_text(value: object) -> bool:
    """Whether every string in `value` can be encoded."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


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
    if is_simple(value):  # the same bytes, ten times faster: a catalog is made of many
        return _WRITER.encode(value).encode()
    import rfc8785

    return rfc8785.dumps(value)  # type: ignore[arg-type]


def is_simple(value: object) -> bool:
    """Whether Python writes it as RFC 8785 wants it: not so floats, large integers, and keys that
    UTF-16 sorts in another way."""
    stack: list[Any] = [value]
    while stack:
        item = stack.pop()
        kind = type(item)
        if kind is dict:
            if not _are_ascii(item):
                return False
            stack += item.values()
        elif kind is list:
            stack += item
        elif kind is int:
            if not -MAX_INTEGER <= item <= MAX_INTEGER:
                return False
        elif kind is not str and item is not None and kind is not bool:
            return False
    return True


def _are_ascii(keys: Iterable[Any]) -> bool:
    try:
        return "".join(keys).isascii()
    except TypeError:  # one that is no text
        return False


def digest_of(data: bytes) -> str:
    """Lower-case hex sha256, as digests are stored everywhere here."""
    return hashlib.sha256(data).hexdigest()

"""Where the members of an uncompressed zip archive lie. Nothing is extracted.

Format: PKWARE APPNOTE 6.3, sections 4.3 (records) and 4.5.3 (zip64).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from adapterkit.hub.findings import clean
from adapterkit.hub.sources import ByteSource
from adapterkit.registry.errors import DamagedError

LOCAL = b"PK\x03\x04"
# signature, then what is needed of the record; x: skipped
END = struct.Struct("<4s4x2H2LH")
LOCATOR = struct.Struct("<4s4xQ4x")
END64 = struct.Struct("<4s20x4Q")
ENTRY = struct.Struct("<4s4x2H8x2L3H8xL")
HEAD = struct.Struct("<4s22x2H")
MAX_DIRECTORY = 1 << 23
MAX_COMMENT = 1 << 16
MANY = 0xFFFF
FAR = 0xFFFFFFFF
ENCRYPTED = 1


def members(source: ByteSource) -> dict[str, tuple[int, int]]:
    """name -> (start, stop) of its bytes in `source`. Raises DamagedError for an archive that is
    damaged, compressed or encrypted, or whose members overlap or share a name."""
    shown = clean(source.name)
    try:
        found: dict[str, tuple[int, int]] = {}
        start, size = _directory(source)
        for name, offset, length in _entries(source.read(start, size)):
            if name in found:
                raise ValueError(f"two members are called {clean(name)}")
            found[name] = _bytes(source, name, offset, length, start)
        _check_disjoint(found)
    except (ValueError, struct.error) as error:
        raise DamagedError(f"{shown} is a damaged archive: {clean(str(error))}") from error
    return found


def _directory(source: ByteSource) -> tuple[int, int]:
    """(offset, size) of the central directory."""
    tail = source.read(*_tail(source))
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < END.size:
        raise ValueError("it has no directory at its end, so it is truncated")
    _, _, count, size, start, comment = END.unpack_from(tail, at)
    if at + END.size + comment != len(tail):
        raise ValueError("bytes follow its directory")
    end = source.size - len(tail) + at
    if count == MANY or FAR in (size, start):
        place = end - LOCATOR.size
        mark, far = LOCATOR.unpack(source.read(place, LOCATOR.size))
        if mark != b"PK\x06\x07" or far + END64.size > place:
            raise ValueError("its directory is not where it should be")
        mark, _, count, size, start = END64.unpack(source.read(far, END64.size))
        end = far
    if start + size > end or size > MAX_DIRECTORY:
        raise ValueError(f"its directory of {size} bytes at {start} is out of range")
    return start, size


def _tail(source: ByteSource) -> tuple[int, int]:
    size = min(source.size, END.size + MAX_COMMENT)
    return source.size - size, size


def _entries(data: bytes) -> Iterator[tuple[str, int, int]]:
    """(name, offset of its local header, length)."""
    at = 0
    while at < len(data):
        fields = ENTRY.unpack_from(data, at)
        mark, flags, method, packed, length, n_name, n_extra, n_comment, offset = fields
        end = at + ENTRY.size + n_name + n_extra + n_comment
        if mark != b"PK\x01\x02" or end > len(data):
            raise ValueError("an entry of its directory is cut off")
        name = data[at + ENTRY.size :][:n_name].decode()
        extra = data[at + ENTRY.size + n_name :][:n_extra]
        length, packed, offset = _wide(extra, [length, packed, offset])
        if method or packed != length or flags & ENCRYPTED:
            raise ValueError(f"{clean(name)} is compressed or encrypted")
        yield name, offset, length
        at = end


def _wide(extra: bytes, values: list[int]) -> list[int]:
    """The values, those that did not fit in 32 bits from the zip64 field."""
    while len(extra) >= 4 and FAR in values:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{values.count(FAR)}Q", extra, 4))
            return [next(wide) if value == FAR else value for value in values]
        extra = extra[4 + size :]
    return values


def _bytes(
    source: ByteSource, name: str, offset: int, length: int, limit: int
) -> tuple[int, int]:
    """The range of a member, behind its local header, which has a name and padding of its own."""
    wanted = name.encode()
    if offset + HEAD.size + len(wanted) > limit:
        raise ValueError(f"{clean(name)} starts at {offset}, out of range")
    head = source.read(offset, HEAD.size + len(wanted))
    mark, n_name, n_extra = HEAD.unpack_from(head)
    start = offset + HEAD.size + n_name + n_extra
    if mark != LOCAL or start + length > limit:
        raise ValueError(f"{clean(name)} of {length} bytes at {offset} is out of range")
    if n_name != len(wanted) or not head.endswith(wanted):
        raise ValueError(f"{clean(name)} has another name in front of its bytes")
    return start, start + length


def _check_disjoint(found: dict[str, tuple[int, int]]) -> None:
    end = 0
    for name, (start, stop) in sorted(found.items(), key=lambda item: item[1]):
        if start < end:
            raise ValueError(f"{clean(name)} overlaps the member before it")
        end = max(end, stop)

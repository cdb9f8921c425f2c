"""The log: one line of JSON per change of state. What stands in it has happened.

A line is {"author", "digest", "kind", "payload", "prev", "seq", "time"} in canonical form; `digest`
is the sha256 of the line without it, `prev` the digest of the line before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from adapterkit.registry.errors import AdapterError, DamagedError
from adapterkit.registry.files import Files, storage_errors
from adapterkit.registry.strictjson import canonical, digest_of, parse_canonical, parse_object

_FIELDS = {"author", "digest", "kind", "payload", "prev", "seq", "time"}
NO_DIGEST = "0" * 64


@dataclass(frozen=True)
class Record:
    """One line. time: UTC, ISO 8601. author: user@host."""

    seq: int
    kind: str
    payload: Mapping[str, Any]
    time: str
    author: str
    prev: str
    digest: str

    def line(self) -> bytes:
        return canonical(self._fields() | {"digest": self.digest}) + b"\n"

    def _fields(self) -> dict[str, Any]:
        return {
            "seq": self.seq,
            "kind": self.kind,
            "payload": self.payload,
            "time": self.time,
            "author": self.author,
            "prev": self.prev,
        }


@dataclass(frozen=True)
class Place:
    """A point between two lines. start: where the line before it begins; seq, digest: of that."""

    offset: int = 0
    start: int = 0
    seq: int = 0
    digest: str = NO_DIGEST


class Log:
    """The file `path`. Only the holder of the registry's lock appends."""

    def __init__(self, path: Path, files: Files) -> None:
        self.path, self.files = path, files

    def size(self) -> int:
        try:
            return self.files.stat(self.path).st_size
        except FileNotFoundError:
            return 0

    def holds(self, place: Place) -> bool:
        """Whether `place` is a point of this log, and not of another one or of a longer one."""
        if not place.offset:
            return True
        if self.size() < place.offset:
            return False
        with self.files.open(self.path) as file:
            file.seek(place.start)
            line = file.read(place.offset - place.start)
        try:
            return parse_line(line, place.seq).digest == place.digest
        except DamagedError:
            return False

    def read(self, place: Place) -> Iterator[tuple[Record, Place]]:
        """The whole lines after `place`, each with the point behind it.

        A last line that was cut off, by a crash or because it is being written, is left out.
        Raises DamagedError for any other line that is not what was written.
        """
        if self.size() <= place.offset:
            return
        with self.files.open(self.path) as file:
            file.seek(place.offset)
            while line := file.readline():
                if is_torn(line, file):
                    return
                record = parse_line(line, place.seq + 1)
                if record.prev != place.digest:
                    raise DamagedError(
                        f"line {record.seq} of the log does not follow the line before it"
                    )
                end = place.offset + len(line)
                place = Place(end, place.offset, record.seq, record.digest)
                yield record, place

    def append(self, record: Record, place: Place) -> Place:
        """Write `record` after `place`, the end of the whole lines; durable on return.

        On an error nothing has been added.
        """
        line = record.line()
        with storage_errors("the log cannot be written"), self.files.open_update(self.path) as file:
            self.files.truncate(file, place.offset)
            file.seek(place.offset)
            try:
                self.files.write(file, line)
                self.files.fsync(file)
            except OSError:
                self._undo(file, place.offset)
                raise
        return Place(place.offset + len(line), place.offset, record.seq, record.digest)

    def _undo(self, file: BinaryIO, offset: int) -> None:
        try:
            self.files.truncate(file, offset)
            self.files.fsync(file)
        except OSError as error:
            raise AdapterError(
                f"the log cannot be written, nor put back to {offset} bytes: {error.strerror}",
                hint="adapter list shows whether the last change took effect",
            ) from error


def make_record(place: Place, kind: str, payload: Mapping[str, Any], when: str, who: str) -> Record:
    draft = Record(place.seq + 1, kind, payload, when, who, place.digest, "")
    return Record(**(draft._fields() | {"digest": digest_of(canonical(draft._fields()))}))


def parse_line(line: bytes, seq: int) -> Record:
    """Raises DamagedError that names line `seq`."""
    name = f"line {seq} of the log"
    known = parse_canonical(line[:-1]) if line.endswith(b"\n") else None
    value = known or parse_object(line, name)
    if set(value) != _FIELDS or not isinstance(value["payload"], dict):
        raise DamagedError(f"{name} is not a record")
    record = Record(**value)
    if record.seq != seq:
        raise DamagedError(f"{name} has the number {record.seq!r}")
    try:
        same = (known is not None or record.line() == line) and _has_digest(line, record)
    except ValueError as error:  # NaN, a lone surrogate: nothing a record can hold
        raise DamagedError(f"{name} is not a record: {error}") from error
    if not same:
        raise DamagedError(f"{name} has been changed: its digest is another one")
    return record


def _has_digest(line: bytes, record: Record) -> bool:
    """Whether a line in canonical form has its digest. It can be cut out: no key before it but the
    author's, and within a text quotes are written otherwise."""
    cut = b'"digest":"%s",' % str(record.digest).encode()
    return digest_of(line[:-1].replace(cut, b"", 1)) == record.digest


def is_torn(line: bytes, file: BufferedReader) -> bool:
    """Whether `line`, just read from `file`, is the last one and was never whole: it lacks its end,
    or a block.

    A power cut can keep the end of a write and lose its middle, which then reads as zeros. No
    record holds a zero byte.
    """
    return not line.endswith(b"\n") or (b"\0" in line and not file.peek(1))

"""Every line of the log looked at, also those behind a damaged one."""

from __future__ import annotations

from dataclasses import dataclass, field

from adapterkit.registry.errors import DamagedError
from adapterkit.registry.log import Log, Place, Record, is_torn, parse_line
from adapterkit.registry.strictjson import parse_object


@dataclass
class LogState:
    """faults: number of a line -> what is wrong with it. end: of the lines before the first of
    them. torn: number of a last line that was cut off, 0 when there is none."""

    faults: dict[int, str] = field(default_factory=dict)
    end: Place = Place()
    n_good: int = 0
    torn: int = 0


def scan(log: Log) -> LogState:
    state, seq, offset = LogState(), 0, 0
    digest: str | None = state.end.digest
    with log.files.open(log.path) as file:
        while line := file.readline():
            seq, start, offset = seq + 1, offset, offset + len(line)
            if is_torn(line, file):
                state.torn = seq
                break
            record = _record(line, seq, state)
            if record is None:
                digest = None
                continue
            _lost(state, seq, record.seq)
            if digest is not None and record.seq == seq and record.prev != digest:
                state.faults.setdefault(record.seq, "does not follow the line before it")
            seq, digest = record.seq, record.digest
            state.n_good += seq not in state.faults
            if not state.faults:
                state.end = Place(offset, start, seq, digest)
    return state


def _record(line: bytes, seq: int, state: LogState) -> Record | None:
    """The record; None, and a fault, when it is none. A line that was lost or split before it has
    shifted its number."""
    try:
        return parse_line(line, seq)
    except DamagedError as error:
        try:
            return parse_line(line, parse_object(line, "the line").get("seq", 0))
        except DamagedError:
            state.faults[seq] = str(error).removeprefix(f"line {seq} of the log ")
            return None


def _lost(state: LogState, expected: int, found: int) -> None:
    """Tell lines that are gone from one that was split into two."""
    for seq in range(expected, min(found, expected + 1000)):
        state.faults.setdefault(seq, "is missing")
    for seq in [seq for seq in state.faults if seq >= found]:
        del state.faults[seq]
    if found < expected and not state.faults:
        state.faults[found] = "stands behind later ones"

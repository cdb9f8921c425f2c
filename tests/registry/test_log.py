from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterkit.registry.errors import AdapterError, DamagedError
from adapterkit.registry.files import Files
from adapterkit.registry.log import Log, Place, make_record


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log"
    path.touch()
    return Log(path, Files())


def append(log: Log, payload: dict, place: Place) -> Place:
    return log.append(make_record(place, "tag", payload, "2026-01-01T00:00:00Z", "a@b"), place)


def fill(log: Log, n: int) -> list[Place]:
    places = [Place()]
    for number in range(n):
        places.append(append(log, {"n": number}, places[-1]))
    return places


def payloads(log: Log) -> list[dict]:
    return [record.payload for record, _ in log.read(Place())]


def test_what_was_appended_is_read_in_order(log):
    places = fill(log, 3)
    assert payloads(log) == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert [place for _, place in log.read(Place())] == places[1:]
    assert [record.payload["n"] for record, _ in log.read(places[2])] == [2]


def test_each_line_holds_the_digest_of_the_one_before(log):
    fill(log, 3)
    records = [record for record, _ in log.read(Place())]
    assert [r.prev for r in records[1:]] == [r.digest for r in records[:-1]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, 400), tail=st.binary(max_size=50).filter(lambda b: b"\n" not in b))
def test_a_torn_last_line_is_left_out_and_then_overwritten(log, cut, tail):
    log.path.write_bytes(b"")
    places = fill(log, 3)
    whole = log.path.read_bytes()
    start = places[2].offset
    keep = start + min(cut, len(whole) - start - 1)
    log.path.write_bytes(whole[:keep] + tail)
    assert payloads(log) == [{"n": 0}, {"n": 1}]
    append(log, {"n": 9}, places[2])
    assert payloads(log) == [{"n": 0}, {"n": 1}, {"n": 9}]


def test_a_torn_line_that_is_longer_than_the_next_record_leaves_nothing(log):
    (_, place) = fill(log, 1)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + b"{" * 5000)
    append(log, {"n": 1}, place)
    assert log.path.read_bytes().startswith(whole) and log.path.read_bytes().endswith(b"}\n")
    assert payloads(log) == [{"n": 0}, {"n": 1}]


def test_a_last_line_with_an_unwritten_block_is_torn(log):
    places = fill(log, 2)
    whole = bytearray(log.path.read_bytes())
    whole[places[1].offset + 10 : places[1].offset + 40] = bytes(30)
    log.path.write_bytes(whole)
    assert payloads(log) == [{"n": 0}]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_a_changed_line_is_named(log, place, flip):
    log.path.write_bytes(b"")
    places = fill(log, 4)
    data = bytearray(log.path.read_bytes())
    spot = place % places[3].offset  # not in the last line, which could pass for a torn one
    data[spot] ^= flip
    log.path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"line \d"):
        payloads(log)


def test_a_removed_line_is_found(log):
    fill(log, 3)
    first, _, third = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(first + third)
    with pytest.raises(DamagedError, match="line 2"):
        payloads(log)


def test_a_line_of_another_log_does_not_fit_in(log, tmp_path):
    fill(log, 3)
    other = Log(tmp_path / "other", Files())
    other.path.touch()
    append(other, {"n": "x"}, append(other, {"n": "y"}, Place()))
    lines = log.path.read_bytes().splitlines(keepends=True)
    lines[1] = other.path.read_bytes().splitlines(keepends=True)[1]
    log.path.write_bytes(b"".join(lines))
    with pytest.raises(DamagedError, match="line 2 of the log does not follow"):
        payloads(log)


def test_a_changed_last_line_is_damage_not_a_torn_one(log):
    """It was complete: cutting it off would lose what was promised to be kept."""
    fill(log, 2)
    data = log.path.read_bytes().replace(b'"n":1', b'"n":7')
    log.path.write_bytes(data)
    with pytest.raises(DamagedError, match="line 2"):
        payloads(log)


def test_a_place_of_another_log_is_recognised(log, tmp_path):
    places = fill(log, 3)
    assert all(log.holds(place) for place in places)
    other = Log(tmp_path / "other", Files())
    other.path.touch()
    append(other, {"n": "other"}, Place())
    assert not other.holds(places[1]) and not other.holds(places[3])


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_an_append_that_fails_adds_nothing(log, failing):
    places = fill(log, 1)
    before = log.path.read_bytes()

    class Full(Files):
        def write(self, file, data):
            super().write(file, data[:20] if failing == "write" else data)
            if failing == "write":
                raise OSError(28, "No space left on device")

        def fsync(self, file):
            super().fsync(file)
            if failing == "fsync" and self.armed:
                self.armed = False
                raise OSError(5, "Input/output error")

        armed = True

    with pytest.raises(AdapterError):
        append(Log(log.path, Full()), {"n": 1}, places[1])
    assert log.path.read_bytes() == before

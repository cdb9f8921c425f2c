"""The header of a safetensors file: what is valid is read, everything else is DamagedError."""

from __future__ import annotations

import json
import math
import pickle
import struct
import time
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from adapterkit.hub.headers import DTYPE_BITS, Header, read_header
from adapterkit.hub.sources import FileSource
from adapterkit.registry.errors import DamagedError

settings.register_profile("here", deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("here")


@dataclass
class Bytes:
    """A file in memory that refuses to be read outside of itself."""

    data: bytes
    name: str = "model.safetensors"
    reads: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, start: int, size: int) -> bytes:
        assert start >= 0 <= size and start + size <= len(self.data)
        self.reads.append(size)
        return self.data[start : start + size]


def file(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(start: int = 0, stop: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


GOOD = {"a": entry(), "b": entry(8, 16)}
BODY = bytes(16)
HUGE = 1 << 62

# id -> (bytes, what the message must name)
ATTACKS: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["empty"]),
    "shorter than its length": (b"\x08\0\0\0", ["truncated"]),
    "length of zero": (file(b"", BODY), ["header length", "0 bytes"]),
    "length past the end": (file(GOOD, length=10_000), ["truncated", "10000"]),
    "length of 2^64-1": (file(GOOD, BODY, length=(1 << 64) - 1), ["header length"]),
    "length of 2^63": (file(GOOD, BODY, length=1 << 63), ["header length"]),
    "length just too large": (file(GOOD, BODY, length=100_000_001), ["header length"]),
    "length cut": (file(GOOD, BODY, length=20), ["JSON"]),
    "cut in the header": (file(GOOD, BODY)[:40], ["truncated"]),
    "cut after the header": (file(GOOD), ["a has", "b has", "truncated"]),
    "cut in the data": (file(GOOD, BODY[:-1]), ["b has", "truncated", "expected at least"]),
    "trailing byte": (file(GOOD, BODY + b"\0"), ["trailing"]),
    "not UTF-8": (file(b'{"\xff": 1}'), ["JSON"]),
    "a byte order mark": (file(b"\xef\xbb\xbf{}"), ["JSON"]),
    "an array": (file([]), ["not a JSON object"]),
    "a number": (file(b"12"), ["not a JSON object"]),
    "deep arrays": (file(b"[" * 500_000), ["JSON"]),
    "deep entry": (file(b'{"a":' + b"[" * 500_000), ["JSON"]),
    "two values": (file(b"{}{}"), ["JSON"]),
    "a number of many digits": (file(b'{"a":' + b"9" * 200_000 + b"}"), ["JSON", "digits"]),
    "duplicate tensor": (
        file(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
        ["duplicate", "a"],
    ),
    "duplicate field": (
        file(b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        ["duplicate", "dtype"],
    ),
    "half a character": (file({"\ud800": entry()}, bytes(8)), ["surrogate"]),
    "metadata of numbers": (file({"__metadata__": {"x": 1}, **GOOD}, BODY), ["__metadata__"]),
    "metadata nested": (file({"__metadata__": {"x": {}}, **GOOD}, BODY), ["__metadata__"]),
    "metadata null": (file({"__metadata__": None, **GOOD}, BODY), ["__metadata__"]),
    "entry null": (file({"a": None}), ["a is not a tensor entry"]),
    "entry incomplete": (file({"a": {"dtype": "F32", "shape": []}}), ["a is not a tensor entry"]),
    "entry with more": (file({"a": entry() | {"x": 1}}, bytes(8)), ["a is not a tensor entry"]),
    "unknown dtype": (file({"a": entry(dtype="F128")}, bytes(8)), ["a has", "dtype", "F128"]),
    "dtype in lower case": (file({"a": entry(dtype="f32")}, bytes(8)), ["dtype", "f32"]),
    "dtype a list": (file({"a": entry(dtype=["F32"])}, bytes(8)), ["dtype"]),
    "negative size": (file({"a": entry(shape=[-2])}, bytes(8)), ["shape", "negative"]),
    "fractional size": (file({"a": entry(shape=[2.0])}, bytes(8)), ["shape", "non-integer"]),
    "boolean size": (file({"a": entry(shape=[True, 2])}, bytes(8)), ["shape"]),
    "shape a number": (file({"a": entry(shape=2)}, bytes(8)), ["shape"]),
    "shape overflows": (file({"a": entry(shape=[HUGE, HUGE])}, bytes(8)), ["shape", "overflow"]),
    "shape wraps to 2": (file({"a": entry(shape=[(1 << 63) + 1, 2])}, bytes(8)), ["overflow"]),
    "zero times too much": (file({"a": entry(0, 0, [0, HUGE])}), ["shape", "overflow"]),
    "shape and bytes differ": (file({"a": entry(shape=[3])}, bytes(8)), ["shape", "12", "8"]),
    "half a byte": (file({"a": entry(0, 1, [3], "F4")}, bytes(1)), ["a has shape"]),
    "offsets reversed": (file({"a": entry(8, 0)}, bytes(8)), ["data_offsets", "end before"]),
    "offset negative": (file({"a": entry(-8, 0)}, bytes(8)), ["malformed data_offsets"]),
    "offsets three": (
        file({"a": entry() | {"data_offsets": [0, 8, 8]}}, bytes(8)),
        ["malformed data_offsets"],
    ),
    "offset too large": (file({"a": entry(0, 1 << 64)}, bytes(8)), ["data_offsets", "range"]),
    "offset of 90 digits": (file({"a": entry(0, 10**90)}, bytes(8)), ["data_offsets", "range"]),
    "overlap": (file({"a": entry(), "b": entry(4, 12)}, bytes(12)), ["b overlap"]),
    "the same bytes": (file({"a": entry(), "b": entry()}, bytes(8)), ["overlap"]),
    "nothing inside a tensor": (file({"a": entry(), "b": entry(4, 4, [0])}, bytes(8)), ["overlap"]),
    "hole": (file({"a": entry(), "b": entry(12, 20)}, bytes(20)), ["hole of 4 bytes", "b"]),
    "hole at the start": (file({"a": entry(4, 12)}, bytes(12)), ["hole of 4 bytes"]),
    "data without tensors": (file({}, bytes(4)), ["trailing"]),
    "a pickle": (pickle.dumps({"a": list(range(99))}), ["pickle"]),
    "a torch archive": (b"PK\x03\x04" + bytes(100), ["pickle"]),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["LFS"]),
    "a page": (b"\n <!DOCTYPE html><html></html>", ["HTML"]),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_damage_that_names_the_file_and_the_fault(name: str) -> None:
    data, words = ATTACKS[name]
    with pytest.raises(DamagedError) as caught:
        read_header(Bytes(data))
    message = str(caught.value)
    assert "model.safetensors" in message
    assert [word for word in words if word not in message] == [], message
    assert len(message) < 10_000


def test_every_region_a_file_is_cut_in_is_named_as_cut() -> None:
    data = file(GOOD, BODY)
    for size in range(1, len(data)):
        with pytest.raises(DamagedError, match=r"truncated|header length"):
            read_header(Bytes(data[:size]))


def test_all_faults_are_said_at_once() -> None:
    tensors = {
        "one": entry(dtype="F7"),
        "two": entry(8, 4),
        "three": entry(shape=[-1]),
        "four": entry(0, 4),
        "five": 5,
    }
    with pytest.raises(DamagedError) as caught:
        read_header(Bytes(file(tensors, BODY)))
    for name in tensors:
        assert f"{name} " in str(caught.value)


def test_two_faults_of_one_tensor_are_both_said() -> None:
    with pytest.raises(DamagedError, match=r"dtype 'F7'.*malformed data_offsets"):
        read_header(Bytes(file({"a": entry(-1, 4, dtype="F7")})))


def test_a_long_list_of_faults_is_cut_and_counted() -> None:
    tensors = {f"t{i}\x1b" + "x" * 5000: entry(0, 0, dtype="F7") for i in range(500)}
    with pytest.raises(DamagedError, match="480 more") as caught:
        read_header(Bytes(file(tensors)))
    assert len(str(caught.value)) < 10_000
    assert "\x1b" not in str(caught.value)


def test_tensors_without_values_are_fine() -> None:
    tensors = {"a": entry(0, 0, [0]), "b": entry(), "c": entry(8, 8, [3, 0]), "d": entry(8, 12, [])}
    header = read_header(Bytes(file(tensors, bytes(12))))
    assert [stored.size for stored in header.tensors.values()] == [0, 8, 0, 4]


def test_a_file_without_tensors_is_fine() -> None:
    assert read_header(Bytes(file({}))) == Header({}, {})


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_is_as_large_as_its_bits(dtype: str) -> None:
    size = 8 * DTYPE_BITS[dtype] // 8
    header = read_header(Bytes(file({"a": entry(0, size, [8], dtype)}, bytes(size))))
    stored = header.tensors["a"]
    assert (stored.dtype, stored.shape, stored.size) == (dtype, (8,), size)


def test_metadata_and_padding_are_read() -> None:
    text = json.dumps({"__metadata__": {"format": "pt"}, **GOOD}).encode() + b" " * 9
    assert read_header(Bytes(file(text, BODY))).metadata == {"format": "pt"}


@pytest.mark.parametrize(
    "header",
    [
        b"{" + b",".join(b'"k%d":0' % (i // 2) for i in range(200_000)) + b"}",
        b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}'
        % b",".join([b"9" * 90] * 50_000),
        b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % b",".join([b"1"] * 500_000),
    ],
    ids=["duplicates", "large sizes", "many sizes"],
)
def test_a_large_header_is_refused_in_linear_time(header: bytes) -> None:
    started = time.process_time()
    with pytest.raises(DamagedError) as caught:
        read_header(Bytes(file(header, BODY)))
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 10_000


def test_nothing_is_allocated_by_the_word_of_a_header() -> None:
    claims = [
        file(GOOD, BODY, length=99_999_999),
        file({"a": entry(0, 1 << 40, [1 << 38])}, BODY),
        file({"a": entry(0, 8, [1 << 47])}, BODY),
    ]
    tracemalloc.start()
    for data in claims:
        with pytest.raises(DamagedError):
            read_header(Bytes(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_only_the_header_is_read() -> None:
    source = Bytes(file({"a": entry(0, 1 << 20, [1 << 18])}, bytes(1 << 20)))
    read_header(source)
    assert sum(source.reads) < 1000


DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2,
]  # fmt: skip
NAMES = st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4)


@settings(max_examples=60)
@given(
    wanted=st.dictionaries(NAMES, st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=8),
    metadata=st.dictionaries(NAMES, st.text(max_size=10), max_size=3),
)
def test_whatever_safetensors_writes_is_read_back(
    wanted: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str]
) -> None:
    tensors = {
        name: (torch.arange(math.prod(shape)) % 2).reshape(shape).to(dtype)
        for name, (dtype, shape) in wanted.items()
    }
    # Of nothing at all with empty metadata the library writes a file it cannot read itself.
    header = read_header(Bytes(save(tensors, metadata or None)))
    assert header.metadata == metadata
    assert header.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        stored = header.tensors[name]
        assert stored.shape == tuple(tensor.shape)
        assert DTYPE_BITS[stored.dtype] == 8 * tensor.element_size()
        assert stored.read() == tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def check_ranges(data: bytes) -> None:
    """Either damage, or ranges that tile the data of the file."""
    try:
        header = read_header(Bytes(data))
    except DamagedError as error:
        assert "model.safetensors" in str(error)
        return
    place = 8 + int.from_bytes(data[:8], "little")
    for stored in sorted(header.tensors.values(), key=lambda t: (t.start, t.stop)):
        assert stored.start == place
        assert stored.size * 8 == math.prod(stored.shape) * DTYPE_BITS[stored.dtype]
        assert len(stored.read()) == stored.size
        place = stored.stop
    assert place == len(data)


VALID = save(
    {"x.weight": torch.ones(2, 3), "y": torch.zeros(0), "z": torch.ones(4).half()}, {"a": "b"}
)


@settings(max_examples=400)
@given(st.data())
def test_a_mutated_file_is_damage_or_stays_inside_itself(data: st.DataObject) -> None:
    changed = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(changed) - 1))
        kind = data.draw(st.sampled_from(["set", "digit", "insert", "delete"]))
        if kind == "delete":
            del changed[place : place + data.draw(st.integers(1, 9))]
        elif kind == "insert":
            changed[place:place] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            alphabet = st.sampled_from(b"0123456789") if kind == "digit" else st.integers(0, 255)
            changed[place] = data.draw(alphabet)
        if not changed:
            break
    check_ranges(bytes(changed))


SCALARS = st.none() | st.booleans() | st.integers(-5, 1 << 70) | st.floats()
JSON = st.recursive(
    SCALARS | st.sampled_from(["F32", "x"]),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]),
        JSON | st.fixed_dictionaries({"dtype": JSON, "shape": JSON, "data_offsets": JSON}),
    )
)
def test_any_json_as_a_header_is_damage_or_stays_inside(header: dict[str, Any]) -> None:
    check_ranges(file(header, BODY))


def test_a_file_on_disk_is_read_the_same(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(VALID)
    source = FileSource.open(tmp_path / "x.safetensors")
    header = read_header(source)
    assert header.tensors["z"].read() == torch.ones(4).half().numpy().tobytes()
    assert str(header.tensors["x.weight"]) == "F32 [2, 3]"


def test_the_file_is_named_where_a_name_is_hostile() -> None:
    with pytest.raises(DamagedError) as caught:
        read_header(Bytes(file(GOOD), "\x1b[31m" + "n" * 5000))
    assert str(caught.value).startswith("\\x1b[31mnnn") and len(str(caught.value)) < 2000



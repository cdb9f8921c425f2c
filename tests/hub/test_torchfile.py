"""Files of torch.save are read as torch reads them, and nothing in them is ever run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit.hub import torchfile
from adapterkit.hub.sources import FileSource
from adapterkit.hub.tensors import DTYPES, read_tensor
from adapterkit.hub.torchfile import TorchFile, read_torch
from adapterkit.registry.errors import DamagedError

TYPES = list(DTYPES.values())
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=5)
KEYS = st.text("abc_0", min_size=1, max_size=4)


def read(path: Path) -> TorchFile:
    return read_torch(FileSource.open(path))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "weights.bin"


def made(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, shape, generator=random).to(dtype)


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    """Whole tensors, and every way to look at a part of one."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    whole = made(draw(st.sampled_from(TYPES)), shape, draw(st.integers(0, 99)))
    how = draw(st.sampled_from(["whole", "turned", "stepped", "part", "parameter"]))
    if how == "turned":
        return whole.permute(list(reversed(range(whole.dim()))))
    if how == "stepped" and whole.dim():
        return whole[::2]
    if how == "part" and whole.dim() > 1:
        return whole[:, 1:]
    if how == "parameter" and whole.is_floating_point():
        return torch.nn.Parameter(whole)
    return whole


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    dictionaries = st.dictionaries(KEYS, leaves, min_size=1, max_size=3)
    return dictionaries | dictionaries.map(OrderedDict)


VALUES = st.recursive(
    tensors() | SCALARS | st.lists(SCALARS, max_size=3), nested, max_leaves=8
)  # fmt: skip


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from flat(child, f"{path}.{key}" if path else key)
    else:
        yield path, value


def same(found: TorchFile, value: Any) -> None:
    expected = dict(flat(value))
    held = {key: read_tensor(stored) for key, stored in found.tensors.items()}
    assert held.keys() | found.values.keys() == expected.keys()
    for key, want in expected.items():
        if isinstance(want, torch.Tensor):
            assert held[key].dtype == want.dtype and torch.equal(held[key], want), key
        else:
            assert found.values[key] == want and type(found.values[key]) is type(want)


@settings(max_examples=150, deadline=None)
@given(value=nested(VALUES), legacy=st.booleans(), share=st.booleans())
def test_what_torch_saves_is_read_back_equal(
    value: dict[str, Any], legacy: bool, share: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("t") / "x.bin"
    if share:  # the same storage under two names
        value = {**value, "again": next((t for _, t in flat(value)), None)}
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    same(read(file), value)


def test_shared_and_expanded_tensors_are_read_as_they_look(file: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    value = {"a": whole, "b": whole.t(), "row": whole[1], "all": whole[:1].expand(4, 6)}
    torch.save(value, file)
    same(read(file), value)
    for start in range(0, 96, 7):  # in pieces, as a digest reads it
        stored = read(file).tensors["b"]
        piece = stored.source.read(stored.start + start, min(7, 96 - start))
        assert piece == whole.t().contiguous().numpy().tobytes()[start : start + 7]


def test_the_newest_dtypes_are_read(file: Path) -> None:
    value = {"f8": torch.ones(3).to(torch.float8_e4m3fn), "u": torch.ones(2, dtype=torch.uint16)}
    torch.save(value, file)
    assert {key: t.dtype for key, t in read(file).tensors.items()} == {"f8": "F8_E4M3", "u": "U16"}


def test_a_state_dict_is_read_without_its_versions(file: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    torch.save({"model_state_dict": model.state_dict(), "epoch": 3, "args": ["a", 1.5]}, file)
    found = read(file)
    assert list(found.tensors) == [f"model_state_dict.{key}" for key in model.state_dict()]
    assert found.values == {"epoch": 3, "args": ["a", 1.5]}


MARKER = "EXECUTED"


class Runs:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def archive(pickled: bytes, members: dict[str, bytes] | None = None, method: int = 0) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        file.writestr("a/data.pkl", pickled)
        for name, data in (members or {}).items():
            file.writestr(name, data)
    return out.getvalue()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage(key: str = "0", numel: int = 4, kind: bytes = b"ctorch\nFloatStorage\n") -> bytes:
    number = b"\x8a\x08" + struct.pack("<q", numel)
    return b"(" + text("storage") + kind + text(key) + text("cpu") + number + b"tQ"


def tensor(
    size: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85", held: bytes | None = None
) -> bytes:
    """{"w": tensor}"""
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + (held or storage()) + b"K\x00" + size + stride
    return b"\x80\x02}" + text("w") + call + b"\x89ccollections\nOrderedDict\n)RtRs."


def deep(levels: int) -> bytes:
    return b"\x80\x02" + b"}" + text("a") + b"".join([b"}" + text("a")] * levels) + (
        b"K\x01" + b"s" * (levels + 1) + b"."
    )


def laughs() -> bytes:
    """Thirty lists of ten times the list before: 10^30 entries in a few hundred bytes."""
    parts = [b"\x80\x02}" + text("a") + b"]K\x01aq\x00"]
    for level in range(30):
        parts.append(b"]" + (b"h" + bytes([level])) * 0 + b"(" + (b"h" + bytes([level])) * 10)
        parts.append(b"eq" + bytes([level + 1]))
    return b"".join(parts) + b"s."


GOOD = {"a/data/0": bytes(16)}
MANY = b"N" * 3_000_000
HOSTILE: dict[str, bytes | Callable[[], bytes]] = {
    "os.system": pickle.dumps({"a": Runs(os.system, f"touch {MARKER}")}),
    "eval": pickle.dumps({"a": Runs(eval, f"open('{MARKER}', 'w')")}, protocol=4),
    "a path": pickle.dumps({"a": Runs(Path(MARKER).touch)}, protocol=2),
    "in an archive": archive(pickle.dumps({"a": Runs(os.system, f"touch {MARKER}")}, protocol=2)),
    "text opcodes": b"cos\nsystem\n(S'touch EXECUTED'\ntR.",
    "instance": b"\x80\x02(X\x08\x00\x00\x00EXECUTEDios\nsystem\n.",
    "object": b"\x80\x02cos\nsystem\n)\x81.",
    "extension": b"\x80\x02\x82\x01.",
    "getattr": b"\x80\x02cbuiltins\ngetattr\n.",
    "loads": b"\x80\x02ctorch\nload\n.",
    "from torch": b"\x80\x02ctorch._utils\n_import_dotted_name\n.",
    "no memo": b"\x80\x02j\xff\xff\xff\xff.",
    "huge memo": b"\x80\x02}r\xff\xff\xff\xff0.",
    "claims 2 GB": b"\x80\x02B\xff\xff\xff\x7fab.",
    "claims 2 GB of text": b"\x80\x02X\xff\xff\xff\x7fab.",
    "claims an exabyte": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x0fab.",
    "long integer": b"\x80\x02}" + text("a") + b"\x8b\x00\x10\x00\x00" + bytes(4095) + b"\x01s.",
    "empty stack": b"\x80\x02.",
    "underflow": b"\x80\x02R.",
    "mark as value": b"\x80\x02(.",
    "cut": tensor()[:-20],
    "surrogates": b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80K\x01s.",
    "a tuple as key": b"\x80\x02}K\x01\x85K\x01s.",
    "contains itself": archive(b"\x80\x02}q\x00" + text("a") + b"h\x00s."),
    "a list in itself": archive(b"\x80\x02}" + text("a") + b"]q\x00h\x00as."),
    "deep": archive(deep(500)),
    "billion laughs": lambda: archive(laughs()),
    "many operations": lambda: archive(b"\x80\x02}" + text("a") + b"](" + MANY + b"es."),
    "a large pickle": lambda: archive(b"\x80\x02" + bytes(torchfile.MAX_PICKLE)),
    "no storage": archive(tensor()),
    "storage elsewhere": archive(tensor(held=storage("../0")), GOOD),
    "storage too short": archive(tensor(held=storage(numel=8)), GOOD),
    "storage of 2^62": archive(tensor(held=storage(numel=1 << 62)), GOOD),
    "negative storage": archive(tensor(held=storage(numel=-1)), GOOD),
    "odd storage": archive(tensor(held=storage(kind=b"ctorch\nQInt8Storage\n")), GOOD),
    "no storage at all": archive(tensor(held=b"K\x05"), GOOD),
    "not a storage": archive(b"\x80\x02" + text("x") + b"Q."),
    "too large": archive(tensor(size=b"K\x05\x85"), GOOD),
    "strides too far": archive(tensor(stride=b"K\x02\x85"), GOOD),
    "negative stride": archive(tensor(stride=b"J\xff\xff\xff\xff\x85"), GOOD),
    "expanded": archive(tensor(size=b"J\xff\xff\xff\x7f\x85", stride=b"K\x00\x85"), GOOD),
    "no value": archive(b"\x80\x02ccollections\nOrderedDict\n."),
    "a bare list": archive(b"\x80\x02]."),
    "a name as value": archive(b"\x80\x02}" + text("a") + b"ctorch\nFloatStorage\ns."),
    "attributes": archive(b"\x80\x02}}" + text("x") + b"K\x01sb."),
    "compressed": archive(tensor(), GOOD, zipfile.ZIP_DEFLATED),
    "two pickles": archive(tensor(), {**GOOD, "b/data.pkl": b"."}),
    "no pickle": archive(b".").replace(b"data.pkl", b"data.xyz"),
    "big-endian": archive(tensor(), {**GOOD, "a/byteorder": b"big"}),
    "cut archive": archive(tensor(), GOOD)[:-10],
    "bytes behind": archive(tensor(), GOOD) + b"x",
    "another name inside": archive(tensor(), GOOD).replace(b"a/data/0", b"a/data/1", 1),
    "an offset out of range": archive(tensor(), GOOD)[:-6] + b"\xff\xff\xff\x7f\0\0",
    "legacy without storages": pickle.dumps(torchfile.MAGIC, 2) + pickle.dumps(1001, 2),
    "another pickle": pickle.dumps({"a": 1}, protocol=2),
    "empty": b"",
    "text": b"hello, this is not a file of torch",
    "safetensors": b"\x02\0\0\0\0\0\0\0{}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_and_runs_nothing(
    name: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = HOSTILE[name]
    file.write_bytes(data() if callable(data) else data)
    monkeypatch.chdir(file.parent)
    started = time.monotonic()
    with pytest.raises(DamagedError) as caught:
        read(file)
    assert time.monotonic() - started < 10
    assert "weights.bin" in str(caught.value) and len(str(caught.value)) < 1000
    assert not (file.parent / MARKER).exists()


def test_two_members_of_one_name_are_refused(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as out, pytest.warns(UserWarning, match="Duplicate"):
        out.writestr("a/data.pkl", tensor())
        out.writestr("a/data/0", bytes(16))
        out.writestr("a/data/0", bytes(16))
    with pytest.raises(DamagedError, match="two members are called a/data/0"):
        read(file)


def test_the_handmade_file_that_others_are_variations_of_is_read(file: Path) -> None:
    file.write_bytes(archive(tensor(), GOOD))
    assert torch.equal(read_tensor(read(file).tensors["w"]), torch.zeros(4))


def test_what_is_refused_is_named(file: Path) -> None:
    file.write_bytes(pickle.dumps({"a": Runs(os.system, "x")}, protocol=2))
    with pytest.raises(DamagedError, match=r"holds posix\.system, which is not a tensor.*unsafe"):
        read(file)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 5000), byte=st.integers(0, 255), legacy=st.booleans())
def test_a_changed_byte_gives_tensors_or_an_error(
    at: int, byte: int, legacy: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("t") / "x.bin"
    value = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": {"c": torch.ones(2), "d": [1, "x"]}}
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    data = bytearray(file.read_bytes())
    data[at % len(data)] = byte
    file.write_bytes(data)
    try:
        found = read(file)
    except DamagedError:
        return
    for stored in found.tensors.values():
        assert len(stored.read()) == stored.size


def test_large_archives_of_zip64_are_read(file: Path) -> None:
    """The same archive with every offset written in the 64-bit fields."""
    with zipfile.ZipFile(file, "w") as out:
        for name, data in {"a/data.pkl": tensor(), **GOOD}.items():
            with out.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                member.write(data)
    whole = file.read_bytes()
    end = whole.rindex(b"PK\x05\x06")
    count, size, start = struct.unpack_from("<10xH2L", whole, end)
    far = b"PK\x06\x06" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, count, count, size, start)
    locator = b"PK\x06\x07" + struct.pack("<LQL", 0, end, 1)
    last = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, *[0xFFFF] * 2, *[0xFFFFFFFF] * 2, 0)
    file.write_bytes(whole[:end] + far + locator + last)
    assert torch.equal(read_tensor(read(file).tensors["w"]), torch.zeros(4))

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.registry.errors import DamagedError, InvalidError
from adapterkit.registry.manifest import FileEntry, Manifest, Meaning
from adapterkit.registry.strictjson import canonical

DIGEST = "ab" * 32
ROW = {"path": "w.bin", "digest": f"sha256:{DIGEST}", "size": 3, "role": "weights"}
GOOD = {
    "schema": "adapter-manifest/1",
    "files": [ROW],
    "adapter": {"kind": "LORA"},
    "base": None,
    "quantization": None,
    "parents": [],
    "recipe": None,
}


def test_worked_example():
    made = Manifest.of([FileEntry("w.bin", DIGEST, 3, "weights")], Meaning({"kind": "LORA"}))
    assert made.dump() == (
        b'{"adapter":{"kind":"LORA"},"base":null,'
        b'"files":[{"digest":"sha256:' + DIGEST.encode() + b'",'
        b'"path":"w.bin","role":"weights","size":3}],"parents":[],"quantization":null,'
        b'"recipe":null,"schema":"adapter-manifest/1"}'
    )  # fmt: skip
    assert Manifest.parse(canonical(GOOD)) == made
    assert made.size == 3 and made.blobs() == {DIGEST: 3}


def test_the_sketch_of_the_base_is_one_of_its_blobs():
    sketch = {"digest": f"sha256:{'cd' * 32}", "size": 9}
    made = Manifest.of([FileEntry("w", DIGEST, 3)], Meaning({}, base={"sketch": sketch}))
    assert made.blobs() == {DIGEST: 3, "cd" * 32: 9}


def test_the_order_of_files_does_not_change_the_id():
    rows = [FileEntry("a", DIGEST, 1), FileEntry("b", DIGEST, 1)]
    assert Manifest.of(rows, Meaning({})).id == Manifest.of(rows[::-1], Meaning({})).id


scalars = st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=9)
json_values = st.recursive(
    scalars | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=5), json_values, max_size=3)


@given(objects, st.none() | objects, st.none() | objects)
def test_dump_and_parse_are_inverse(adapter, quantization, recipe):
    made = Manifest((), adapter, None, quantization, (), recipe)
    try:
        data = made.dump()
    except InvalidError:  # a lone surrogate
        return
    assert Manifest.parse(data).dump() == data
    assert Manifest.parse(data).id == made.id


@given(
    st.binary(max_size=60) | st.recursive(scalars, st.lists).map(lambda v: json.dumps(v).encode())
)
def test_other_bytes_are_damaged(data):
    with pytest.raises(DamagedError):
        Manifest.parse(data)


HOSTILE_PATHS = [
    "../x", "a/../../x", "/etc/passwd", "a\\b", "..\\x", "C:/x", "a\0b", "", ".", "a//b", "a/",
    "./a", "a\nb", "a/.", "..", "nul.", "x ", "a\u202eb", "a" * 300,
    "/".join(["d" * 90] * 20),
]  # fmt: skip


@pytest.mark.parametrize("path", HOSTILE_PATHS, ids=ascii)
def test_paths_that_leave_the_folder_or_confuse_are_named(path):
    data = json.dumps(GOOD | {"files": [ROW | {"path": path}]}).encode()
    with pytest.raises(DamagedError) as caught:
        Manifest.parse(data)
    assert ascii(path)[:60] in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": "adapter-manifest/2"}, "adapter-manifest/2"),
        ({"schema": None}, "None"),
        ({"extra": 1}, "'extra' is not a field"),
        ({"files": {}}, "files is not a list"),
        ({"files": [ROW, ROW]}, "listed twice"),
        ({"files": [ROW, ROW | {"path": "W.BIN"}]}, "listed twice"),
        ({"files": [ROW, ROW | {"path": "w.bin/x"}]}, "a file and a folder"),
        ({"files": [ROW | {"digest": "sha256:xyz"}]}, "sha256:xyz"),
        ({"files": [ROW | {"digest": DIGEST}]}, "expected sha256:"),
        ({"files": [ROW | {"digest": 5}]}, "digest 5"),
        ({"files": [ROW | {"size": -1}]}, "size -1"),
        ({"files": [ROW | {"size": True}]}, "size True"),
        ({"files": [ROW | {"size": 2**60}]}, "size"),
        ({"files": [ROW | {"size": 1.5}]}, "size 1.5"),
        ({"files": [ROW | {"role": "../x"}]}, "role"),
        ({"files": [ROW | {"more": 1}]}, "is not an object of"),
        ({"files": ["x"]}, "is not an object of"),
        ({"adapter": None}, "adapter is not an object"),
        ({"base": []}, "base is neither"),
        ({"quantization": "nf4"}, "quantization is neither"),
        ({"parents": None}, "parents is not a list"),
        ({"parents": [{"version": "x", "relation": "y"}]}, "expected a digest"),
        ({"parents": [5]}, "parents[0]"),
        ({"base": {"sketch": "x"}}, "base.sketch"),
        ({"base": {"sketch": {"digest": "sha256:..", "size": 1}}}, "base.sketch"),
        ({"adapter": {"x": float("nan")}}, "malformed"),
        ({"adapter": {"x": 2**70}}, "malformed"),
        ({"adapter": {"x": "\ud800"}}, "the manifest"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_what_is_wrong_is_named(change, said):
    with pytest.raises(DamagedError) as caught:
        Manifest.parse(json.dumps(GOOD | change).encode(), "the manifest of sql@1.0")
    assert said in str(caught.value)
    assert str(caught.value).startswith("the manifest of sql@1.0")


def test_all_that_is_wrong_is_named_at_once():
    rows = [ROW | {"path": "../x"}, ROW | {"path": "b", "digest": "?"}]
    with pytest.raises(DamagedError) as caught:
        Manifest.parse(json.dumps(GOOD | {"files": rows, "adapter": 1}).encode())
    for part in ("../x", "'?'", "adapter"):
        assert part in str(caught.value)


def test_missing_fields_are_named():
    value = {name: field for name, field in GOOD.items() if name != "parents"}
    with pytest.raises(DamagedError, match="parents is missing"):
        Manifest.parse(canonical(value))


def test_other_bytes_of_the_same_data_are_refused():
    """Else one meaning would have two ids."""
    with pytest.raises(DamagedError, match="canonical"):
        Manifest.parse(json.dumps(GOOD).encode())


@pytest.mark.parametrize("value", [{"x": float("inf")}, {"x": 2**60}, {"x": "\ud800"}], ids=ascii)
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises(InvalidError):
        Manifest.of([], Meaning(value))


def test_bad_paths_given_by_the_caller_are_invalid():
    with pytest.raises(InvalidError, match=r"\.\./x"):
        Manifest.of([FileEntry("../x", DIGEST, 1)], Meaning({}))

"""JSON from strangers."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import rfc8785
from hypothesis import assume, given
from hypothesis import strategies as st

from adapterkit.registry.errors import DamagedError
from adapterkit.registry.strictjson import MAX_DEPTH, MAX_SIZE, canonical, depth, parse_object

HALF = "half of a surrogate pair"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 1,}', "not JSON"),
        (b'{"a": 1} x', "not JSON"),
        (b'{"a": 1}\0', "not JSON"),
        (b'{"a": "\n"}', "not JSON"),
        (b"[]", "an array, expected a JSON object"),
        (b'"x"', "a string, expected"),
        (b"true", "a boolean, expected"),
        (b"null", "null, expected"),
        (b"3", "a number, expected"),
        ('{"a": "\xe9"}'.encode("latin-1"), "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": 1, "a": 1}', "duplicate keys: 'a'"),
        (b'{"x": [{"b": 1, "c": 0, "b": 2}], "d": 1, "d": 1}', "duplicate keys: 'b', 'd'"),
        (b'{"a":' + b"[" * 300_000, "nested too deeply"),
        (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", f"deeper than {MAX_DEPTH} levels"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, f"deeper than {MAX_DEPTH} levels"),
        (b'{"a": "\\ud800"}', HALF),
        (b'{"\\udc00": 1}', HALF),
        (b'{"a": [{"b": "\\udc00\\ud800"}]}', HALF),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON: a number of 5000 digits"),
    ],
)
def test_what_is_no_strict_object_is_damage_that_names_the_file(data: bytes, message: str) -> None:
    with pytest.raises(DamagedError) as caught:
        parse_object(data, "config.json")
    assert str(caught.value).startswith("config.json ")
    assert message in str(caught.value) and len(str(caught.value)) < 1000


def test_too_large_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(DamagedError, match="more than the 67108864 allowed"):
        parse_object(b" " * (MAX_SIZE + 1), "config.json")


def test_a_byte_order_mark_is_accepted() -> None:
    assert parse_object(b'\xef\xbb\xbf{"a": 1}', "x") == {"a": 1}


def test_what_python_writes_is_read() -> None:
    value = parse_object(json.dumps({"n": float("nan"), "i": -float("inf")}).encode(), "x")
    assert value["n"] != value["n"] and value["i"] == -float("inf")
    assert parse_object(b'{"max": 1000000000000000019884624838656}', "x")["max"] > 1e29


def test_a_whole_surrogate_pair_is_one_character() -> None:
    assert parse_object(b'{"a": "\\ud83d\\ude42"}', "x") == {"a": "\N{SLIGHTLY SMILING FACE}"}


def test_depth_up_to_the_limit_is_read() -> None:
    text = b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH
    assert depth(parse_object(text, "x")) == MAX_DEPTH


@pytest.mark.parametrize(
    "text",
    [
        "{" + ",".join(f'"k{i // 2}":0' for i in range(300_000)) + "}",
        '{"a":[' + ",".join(["9" * 4000] * 3000) + "]}",
        '{"a":"' + "\\ud800" * 1_000_000 + '"}',
    ],
    ids=["duplicates", "digits", "surrogates"],
)
def test_hostile_text_is_refused_in_linear_time_and_few_words(text: str) -> None:
    started = time.process_time()
    with pytest.raises(DamagedError) as caught:
        parse_object(text.encode(), "x")
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 2000


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=5), VALUES), st.booleans())
def test_every_object_of_json_is_read_back(value: dict[str, Any], plain: bool) -> None:
    assert parse_object(json.dumps(value, ensure_ascii=plain).encode(), "x") == value
    assert parse_object(canonical(value), "x") == value


KEYS = st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)  # fmt: skip


@given(value=VALUES)
def test_canonical_bytes_are_those_of_rfc_8785(value):
    """Also where Python writes them itself."""
    try:
        expected = rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeEncodeError):
        assume(False)
    assert canonical(value) == expected


@pytest.mark.parametrize("value", [2**53, -(2**53), [2**60], {"a": 10**30}])
def test_integers_that_json_cannot_hold_are_refused(value):
    with pytest.raises(rfc8785.CanonicalizationError):
        canonical(value)

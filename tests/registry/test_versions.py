from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from adapterkit.registry.errors import InvalidError
from adapterkit.registry.versions import following, is_release, normal, sort_key

numbers = st.from_regex(
    r"[0-9]{1,12}(\.[0-9]{1,3}){0,3}((a|b|rc)[0-9]{1,2})?(\.post[0-9]{1,2})?(\.dev[0-9]{1,2})?",
    fullmatch=True,
).filter(str.isascii)


@given(numbers, numbers)
def test_text_order_is_pep_440_order(one, other):
    a, b = normal(one), normal(other)
    assert (sort_key(a) < sort_key(b)) == (Version(a) < Version(b))
    assert (sort_key(a) == sort_key(b)) == (Version(a) == Version(b))


@pytest.mark.parametrize(
    ("have", "expected"),
    [
        ([], "1.0"),
        (["1.0"], "1.1"),
        (["1.9", "1.10"], "1.11"),
        (["1.2.3"], "1.3"),
        (["2.0rc1", "1.5"], "2.1"),
        (["3"], "3.1"),
    ],
)
def test_the_next_version_is_the_next_minor(have, expected):
    assert following(have) == expected


@pytest.mark.parametrize("text", ["", "x", "1!2", "1+a", "1..2", "9" * 70, "١"])
def test_other_numbers_are_refused(text):
    with pytest.raises(InvalidError):
        normal(text)


def test_pre_releases_are_no_releases():
    assert is_release("1.0") and is_release("1.0.post1")
    assert not is_release("1.0rc1") and not is_release("1.0.dev1")

"""Version numbers: PEP 440 without epoch and local part, written in its normal form."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from adapterkit.registry.errors import InvalidError

if TYPE_CHECKING:
    from packaging.version import Version

MAX_LENGTH = 64
FIRST = "1.0"


@lru_cache(4096)  # few numbers are in use, and each is asked for again and again
def _parse(text: str) -> Version | None:
    from packaging.version import InvalidVersion, Version

    # The length first: int() refuses thousands of digits with an error of its own.
    if len(text) > MAX_LENGTH or not text.isascii():
        return None
    try:
        version = Version(text)
    except InvalidVersion:
        return None
    return None if version.epoch or version.local else version


def _strict(text: str) -> Version:
    version = _parse(text)
    if version is None:
        raise InvalidError(
            f"{text[:80]!r} is not a version number",
            hint="versions follow PEP 440 without epoch and local part: 1.0, 1.2.1, 2.0rc1",
        )
    return version


def is_version(text: str) -> bool:
    return _parse(text) is not None


def normal(text: str) -> str:
    """The normal form, such as 1.0rc1 for 1.0-RC.1. Raises InvalidError."""
    return str(_strict(text))


def is_release(version: str) -> bool:
    found = _parse(version)
    return found is not None and not found.is_prerelease


@lru_cache(4096)
def sort_key(version: str) -> str:
    """Text that sorts as PEP 440 orders versions, equal for equal ones (1.0 and 1.0.0)."""
    found = _strict(version)
    release = list(found.release)
    while len(release) > 1 and not release[-1]:
        release.pop()
    early = found.dev is not None and found.pre is None and found.post is None
    letter, number = found.pre or ("", 0)
    stage = "0" if early else {"a": "1", "b": "2", "rc": "3", "": "4"}[letter]
    post = "0" if found.post is None else "1" + _digits(found.post)
    dev = "1" if found.dev is None else "0" + _digits(found.dev)
    # The blank ends the release: it sorts before the dot of a further component.
    return f"{'.'.join(map(_digits, release))} {stage}{_digits(number)}.{post}.{dev}"


def _digits(number: int) -> str:
    """Decimal digits behind their count, so that text order is number order."""
    digits = str(number)
    return f"{len(digits):02d}{digits}"


def following(versions: Iterable[str]) -> str:
    """The next minor version after all of `versions`; 1.0 is the first."""
    highest = max(versions, key=sort_key, default=None)
    found = _parse(highest) if highest is not None else None
    return FIRST if found is None else f"{found.major}.{found.minor + 1}"


def shortest(version: str) -> str:
    """The same text for equal numbers: 1 for 1.0 and 1.0.0."""
    from packaging.utils import canonicalize_version

    return canonicalize_version(_strict(version))

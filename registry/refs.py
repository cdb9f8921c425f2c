"""References to adapters and bases: the one parser.

In this order: a text with `://` is a URL; one that looks like a path is a path; every other one is
a reference, even when a folder of that name exists.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from adapterkit.registry.errors import InvalidError
from adapterkit.registry.urls import Url, check_repo, parse_url
from adapterkit.registry.versions import is_version, normal

LOCAL = "local"
LATEST = "latest"
_PATH = re.compile(r"\.\.?$|\.\.?[/\\]|[/~]|[A-Za-z]:[/\\]")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{12,64}")
_ALIAS = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,62}[A-Za-z0-9])?")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class Ref:
    """NAME, NAME@VERSION, NAME:TAG or NAME@sha256:HEX; at most one of the last three is set.

    digest: 12 to 64 lower-case hex digits.
    """

    namespace: str
    name: str
    version: str | None = None
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Ref:
        if _PATH.match(text):
            raise InvalidError(
                f"{text[:200]!r} is not a name, but a path",
                hint="adapter add PATH NAME stores a folder; adapter inspect PATH shows one",
            )
        if "=" in text:
            raise InvalidError(
                f"{text[:200]!r} is not a name", hint="a weight is a finite number: NAME=0.5"
            )
        name, at, version = text.partition("@")
        tag: str | None = None
        if not at:
            name, colon, tagged = text.partition(":")
            tag = check_tag(tagged) if colon else None
        namespace, _, last = check_repo(name).rpartition("/")
        found = cls(namespace or LOCAL, last, tag=tag)
        if not at:
            return found
        if version.startswith("sha256:"):
            return replace(found, digest=_digest(version.removeprefix("sha256:")))
        return replace(found, version=normal(version))

    @property
    def full_name(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def short_name(self) -> str:
        """As users write it: without the namespace where that is `local`."""
        return self.name if self.namespace == LOCAL else self.full_name

    def at(self, version: str) -> Ref:
        return Ref(self.namespace, self.name, version=version)

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.short_name}@{self.version}"
        if self.digest is not None:
            return f"{self.short_name}@sha256:{self.digest}"
        return self.short_name if self.tag is None else f"{self.short_name}:{self.tag}"


@dataclass(frozen=True)
class PathSource:
    """A folder or file of this machine; `~` is expanded."""

    path: Path

    def __str__(self) -> str:
        text = str(self.path)
        return text if _PATH.match(text) and not text.startswith("~") else f"./{text}"


@dataclass(frozen=True)
class UrlSource:
    """An adapter of a remote. remote: a URL in normal form, or the alias of one.

    ref: which adapter of a store; None for a URL that is one adapter.
    """

    remote: str
    ref: Ref | None = None

    @property
    def is_alias(self) -> bool:
        return "://" not in self.remote

    def __str__(self) -> str:
        return self.remote if self.ref is None else f"{self.remote}#{self.ref}"


Source = Ref | PathSource | UrlSource


def parse_source(text: str) -> Source:
    """An adapter: URL, ALIAS#NAME, path or reference. Raises InvalidError."""
    if "://" not in text and _PATH.match(text):
        return _path(text)
    if "://" not in text and "#" not in text:
        return Ref.parse(text)
    source = parse_remote(text)
    if source.ref is None and (source.is_alias or parse_url(source.remote).is_store):
        raise InvalidError(f"{source} holds many adapters", hint=f"name one of them: {source}#NAME")
    return source


def parse_remote(text: str) -> UrlSource:
    """A remote, URL or ALIAS, with or without #NAME. Raises InvalidError, and NotFoundError for
    an unknown scheme."""
    place, mark, name = text.partition("#")
    if "://" not in place:
        ref = Ref.parse(name) if mark else None
        return UrlSource(check_alias(place), ref)
    url = parse_url(place)
    if mark and not url.is_store:
        raise InvalidError(f"{url} is one adapter, and takes no '#{name[:80]}'")
    return UrlSource(str(url), Ref.parse(name) if mark else None)


def parse_base(text: str) -> PathSource | Url:
    """A base model: path, URL, or a bare `org/name[@revision]`, which is a Hub id."""
    if "://" in text:
        url = parse_url(text)
        if url.is_store and url.scheme != "file":
            raise InvalidError(f"{url} is a store of adapters, not a base model")
        return PathSource(Path(url.path)) if url.scheme == "file" else url
    if _PATH.match(text):
        return _path(text)
    name, _, revision = text.partition("@")
    check_repo(name)
    if revision and "/" not in name:
        raise InvalidError(
            f"{text[:200]!r} has a revision, but no organization",
            hint=f"write ORG/{name}@{revision[:80]}",
        )
    return parse_url(f"hf://{text}")


def split_weight(text: str) -> tuple[str, float | None]:
    """`SRC=WEIGHT` at its last '=' if a finite number follows; else the text and None."""
    source, _, number = text.rpartition("=")
    if not source or not _NUMBER.fullmatch(number) or not math.isfinite(float(number)):
        return text, None
    return source, float(number)


def check_tag(text: str) -> str:
    if not _TAG.fullmatch(text):
        raise InvalidError(
            f"{text[:80]!r} is not a tag", hint="tags are letters, digits, '_', '.' and '-'"
        )
    if is_version(text):
        raise InvalidError(
            f"the tag {text!r} reads as a version", hint=f"write @{normal(text)} for it"
        )
    return text


def check_alias(text: str) -> str:
    if not _ALIAS.fullmatch(text):
        raise InvalidError(
            f"{text[:80]!r} is neither a URL nor the alias of a remote",
            hint="aliases are letters, digits, '-' and '_'",
        )
    return text


def _digest(text: str) -> str:
    if not _DIGEST.fullmatch(text.lower()):
        raise InvalidError(f"{text[:80]!r} is not a digest of 12 to 64 hex digits")
    return text.lower()


def _path(text: str) -> PathSource:
    if "\0" in text:
        raise InvalidError("a path holds a NUL character")
    try:
        return PathSource(Path(text).expanduser())
    except RuntimeError as error:
        raise InvalidError(f"{text[:200]!r} has no home folder") from error

"""URLs of remotes: one adapter (hf, oci, hf+https with a repository) or a whole store.

Credentials never stand in a URL. A message about one that holds them does not repeat them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote, unquote

from adapterkit.registry.errors import InvalidError, NotFoundError

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]*")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_OCI_PATH = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*")
_OCI_REVISION = re.compile(
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(?P<digest>@sha256:[0-9a-f]{64})?"
)
_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_LOOPBACK = re.compile(r"localhost|127(?:\.\d{1,3}){3}|\[::1\]")
MAX_NAME = 96


@dataclass(frozen=True)
class Url:
    """host is `host[:port]`, or empty. path has no leading slash, save that of a file URL, where
    it is the folder. revision: a Hub revision; for oci a tag, `sha256:...`, or `tag@sha256:...`.
    """

    scheme: str
    host: str = ""
    path: str = ""
    revision: str = ""

    @property
    def is_file(self) -> bool:
        return self.scheme == "file"

    @property
    def is_store(self) -> bool:
        """Whether it holds many adapters, so that one of them is URL#NAME."""
        return self.scheme in ("file", "s3") or (self.scheme.startswith("hf+") and not self.path)

    def __str__(self) -> str:
        path = re.sub("[%?#]", lambda m: quote(m[0]), self.path) if self.is_file else self.path
        mark = ":" if self.scheme == "oci" and not self.revision.startswith("sha256:") else "@"
        between = "/" if self.host and self.path else ""
        revision = mark + self.revision if self.revision else ""
        return f"{self.scheme}://{self.host}{between}{path}{revision}"


def parse_url(text: str) -> Url:
    """Raises InvalidError, and NotFoundError for a scheme that no remote speaks."""
    scheme, mark, rest = text.partition("://")
    scheme = scheme.lower()
    if not mark or not _SCHEME.fullmatch(scheme):
        raise InvalidError(f"{text.partition('@')[0][:200]!r} is not a URL")
    parse = _SCHEMES.get(scheme)
    if parse is None:
        hint = "write hf+https://HOST" if scheme in ("http", "https") else None
        raise NotFoundError(
            f"no remote speaks {scheme[:40]!r}", hint=hint or f"known: {', '.join(_SCHEMES)}"
        )
    if scheme != "file" and "@" in re.split(r"[/?#]", rest, maxsplit=1)[0]:
        raise InvalidError(
            f"a {scheme} URL holds credentials before its '@'",
            hint="leave them out: they belong to the host, not to the URL",
        )
    if "?" in rest or "#" in rest:
        raise InvalidError(f"{text[:200]!r} has a query or a fragment, which this URL cannot have")
    if any(not c.isprintable() for c in rest):
        raise InvalidError(f"{text[:200]!r} holds control characters")
    return parse(scheme, rest)


def _file(scheme: str, rest: str) -> Url:
    if rest.lower().startswith("localhost/"):
        rest = rest[len("localhost") :]
    path = unquote(rest)
    if not path.startswith("/") or not path.isprintable():
        raise InvalidError(
            f"'file://{rest[:200]}' is not an absolute folder", hint="write file:///folder"
        )
    return Url(scheme, path=re.sub("/+", "/", path).rstrip("/") or "/")


def _s3(scheme: str, rest: str) -> Url:
    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise InvalidError(f"{bucket[:80]!r} is not a bucket name", hint="write s3://bucket/prefix")
    parts = [part for part in prefix.split("/") if part]
    if any(part in (".", "..") or "\\" in part for part in parts):
        raise InvalidError(f"{prefix[:200]!r} is not a prefix in a bucket")
    return Url(scheme, bucket, "/".join(parts))


def _hub(scheme: str, rest: str) -> Url:
    """hf://org/name[@revision]; a legacy name without an organization has no revision here."""
    path, revision = _split_revision(rest)
    return Url(scheme, path=check_repo(path), revision=revision)


def _hub_host(scheme: str, rest: str) -> Url:
    host, _, path = rest.partition("/")
    host = _check_host(host)
    if scheme == "hf+http" and not _LOOPBACK.fullmatch(re.sub(r":\d+$", "", host)):
        raise InvalidError(
            f"{host} is not this machine, and hf+http is not encrypted",
            hint=f"write hf+https://{host}",
        )
    if not path.strip("/"):
        return Url(scheme, host)
    path, revision = _split_revision(path)
    if path.count("/") != 1:
        raise InvalidError(
            f"{path[:200]!r} is not a repository", hint=f"write {scheme}://{host}/org/name"
        )
    return Url(scheme, host, check_repo(path), revision)


def _oci(scheme: str, rest: str) -> Url:
    host, _, path = rest.partition("/")
    name = re.split("[:@]", path, maxsplit=1)[0]
    found = _OCI_REVISION.fullmatch(path[len(name) :])
    if not name or found is None or not all(_OCI_PATH.fullmatch(part) for part in name.split("/")):
        raise InvalidError(
            f"{path[:200]!r} is not a repository of an OCI registry",
            hint="write oci://host/repo:tag",
        )
    revision = (found["tag"] or "") + (found["digest"] or "")
    return Url(scheme, _check_host(host), name, revision.removeprefix("@"))


def _split_revision(text: str) -> tuple[str, str]:
    path, mark, revision = text.rstrip("/").partition("@")
    if mark and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise InvalidError(f"{revision[:80]!r} is not a revision")
    return path, revision


def _check_host(host: str) -> str:
    if not _HOST.fullmatch(host):
        raise InvalidError(f"{host[:80]!r} is not a host or host:port")
    return host.lower()


def check_repo(text: str) -> str:
    """`[namespace/]name` by the Hub's rules for repository ids. Raises InvalidError."""
    parts = text.split("/")
    good = (
        0 < len(parts) <= 2
        and len(text) <= MAX_NAME
        and all(_REPO_PART.fullmatch(part) for part in parts)
        and "--" not in text
        and ".." not in text
        and not text.endswith((".git", ".ipynb"))
    )
    if not good:
        raise InvalidError(
            f"{text[:200]!r} is not a name",
            hint="names are NAME or NAMESPACE/NAME of letters, digits, '-', '_' and '.',"
            f" {MAX_NAME} characters at most",
        )
    return text


_SCHEMES: dict[str, Callable[[str, str], Url]] = {
    "file": _file,
    "s3": _s3,
    "hf": _hub,
    "hf+https": _hub_host,
    "hf+http": _hub_host,
    "oci": _oci,
}

"""The manifest: what the bytes of one version mean, and nothing else.

Its canonical JSON (RFC 8785) is stored as a blob; the digest of that is the version's id.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterkit.registry.errors import DamagedError, InvalidError
from adapterkit.registry.strictjson import canonical, digest_of, parse_object

SCHEMA = "adapter-manifest/1"
_FIELDS = ("schema", "files", "adapter", "base", "quantization", "parents", "recipe")
_FILE_FIELDS = ("path", "digest", "size", "role")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ROLE = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_MAX_PATH, _MAX_SEGMENT = 1024, 255
# The largest integer that JSON readers agree on; RFC 8785 refuses larger ones.
_MAX_SIZE = 2**53 - 1


@dataclass(frozen=True)
class Meaning:
    """What `add` is told about the files. parents: {"version": "sha256:...", "relation": ...}.

    extra: bytes of further blobs that the manifest refers to (the sketch of the base).
    """

    adapter: Mapping[str, Any]
    base: Mapping[str, Any] | None = None
    quantization: Mapping[str, Any] | None = None
    parents: tuple[Mapping[str, Any], ...] = ()
    recipe: Mapping[str, Any] | None = None
    extra: Sequence[bytes] = ()


@dataclass(frozen=True, order=True)
class FileEntry:
    """path: relative, POSIX. digest: 64 hex digits. role: weights, config, card, ..."""

    path: str
    digest: str
    size: int
    role: str = "file"


@dataclass(frozen=True)
class Manifest:
    """files: sorted by path. The rest as in Meaning."""

    files: tuple[FileEntry, ...]
    adapter: Mapping[str, Any]
    base: Mapping[str, Any] | None = None
    quantization: Mapping[str, Any] | None = None
    parents: tuple[Mapping[str, Any], ...] = ()
    recipe: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, files: Sequence[FileEntry], meaning: Meaning) -> Manifest:
        """Raises InvalidError when it is not a manifest."""
        made = cls(
            tuple(sorted(files)),
            meaning.adapter,
            meaning.base,
            meaning.quantization,
            tuple(meaning.parents),
            meaning.recipe,
        )
        try:
            return cls.parse(made.dump())
        except DamagedError as error:
            raise InvalidError(str(error)) from error

    def dump(self) -> bytes:
        """Canonical bytes. Raises InvalidError for what JSON cannot hold (NaN, 2**60, a set)."""
        from rfc8785 import CanonicalizationError

        value = {
            "schema": SCHEMA,
            "files": [
                {"path": f.path, "digest": f"sha256:{f.digest}", "size": f.size, "role": f.role}
                for f in sorted(self.files)
            ],
            "adapter": self.adapter,
            "base": self.base,
            "quantization": self.quantization,
            "parents": list(self.parents),
            "recipe": self.recipe,
        }
        try:
            return canonical(_plain(value))
        except (CanonicalizationError, UnicodeEncodeError) as error:
            raise InvalidError(f"a manifest cannot hold this value: {error}") from error

    @classmethod
    def parse(cls, data: bytes, name: str = "the manifest") -> Manifest:
        """Raises DamagedError that lists everything wrong with it; `name` is its subject."""
        value = parse_object(data, name)
        problems = list(_problems(value))
        if problems:
            raise DamagedError(f"{name} is malformed: {'; '.join(problems)}")
        files = [
            FileEntry(row["path"], row["digest"].removeprefix("sha256:"), row["size"], row["role"])
            for row in value["files"]
        ]
        found = cls(
            tuple(sorted(files)),
            value["adapter"],
            value["base"],
            value["quantization"],
            tuple(value["parents"]),
            value["recipe"],
        )
        # One meaning, one id: other bytes for the same data would be a second id.
        try:
            same = found.dump() == data
        except InvalidError as error:
            raise DamagedError(f"{name} is malformed: {error}") from error
        if not same:
            raise DamagedError(f"{name} is not in canonical form")
        return found

    @property
    def id(self) -> str:
        return digest_of(self.dump())

    @property
    def size(self) -> int:
        """Bytes of its files together."""
        return sum(file.size for file in self.files)

    def blobs(self) -> dict[str, int]:
        """Digest and size of every blob it refers to: files, and the sketch of the base."""
        found = {file.digest: file.size for file in self.files}
        sketch = (self.base or {}).get("sketch")
        if sketch is not None:
            found[sketch["digest"].removeprefix("sha256:")] = sketch["size"]
        return found


def _plain(value: object) -> object:
    """Mappings and sequences as the dicts and lists that rfc8785 knows."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _problems(value: dict[str, Any]) -> list[str]:
    if value.get("schema") != SCHEMA:
        return [f"its schema is {_shown(value.get('schema'))}, expected {SCHEMA!r}"]
    found = [f"{field} is missing" for field in _FIELDS if field not in value]
    found += [f"{_shown(field)} is not a field of it" for field in value if field not in _FIELDS]
    if found:
        return found
    found += _wrong_types(value)
    if isinstance(value["files"], list):
        found += _wrong_files(value["files"])
    if isinstance(value["parents"], list):
        found += [p for i, row in enumerate(value["parents"]) for p in _wrong_parent(i, row)]
    if isinstance(value["base"], dict):
        found += _wrong_sketch(value["base"].get("sketch"))
    return found


def _wrong_types(value: dict[str, Any]) -> list[str]:
    found = [
        f"{name} is not a list"
        for name in ("files", "parents")
        if not isinstance(value[name], list)
    ]
    if not isinstance(value["adapter"], dict):
        found.append("adapter is not an object")
    for name in ("base", "quantization", "recipe"):
        if not isinstance(value[name], dict | None):
            found.append(f"{name} is neither an object nor null")
    return found


def _wrong_files(rows: list[Any]) -> list[str]:
    found = [problem for i, row in enumerate(rows) for problem in _wrong_file(i, row)]
    if found:
        return found
    # Compared without case: on some file systems these are one file.
    paths = [row["path"].casefold() for row in rows]
    found += [f"{_shown(path)} is listed twice" for path, n in Counter(paths).items() if n > 1]
    folders = {
        "/".join(path.split("/")[:n]) for path in paths for n in range(1, path.count("/") + 1)
    }
    found += [f"{_shown(path)} is a file and a folder" for path in sorted(folders & set(paths))]
    return found


def _wrong_file(index: int, row: object) -> list[str]:
    name = f"files[{index}]"
    if not isinstance(row, dict) or set(row) != set(_FILE_FIELDS):
        return [f"{name} is not an object of {', '.join(_FILE_FIELDS)}"]
    found = []
    if not isinstance(row["path"], str) or (problem := path_problem(row["path"])):
        problem = problem if isinstance(row["path"], str) else "is not text"
        found.append(f"the path {_shown(row['path'])} {problem}")
    if not _is_digest(row["digest"]):
        found.append(
            f"{name} has the digest {_shown(row['digest'])}, expected sha256: and 64 hex digits"
        )
    if not _is_size(row["size"]):
        found.append(f"{name} has the size {_shown(row['size'])}")
    if not isinstance(row["role"], str) or not _ROLE.fullmatch(row["role"]):
        found.append(f"{name} has the role {_shown(row['role'])}")
    return found


def path_problem(path: str) -> str:
    """Why `path` cannot be a file inside a folder on every system, or ''."""
    segments = path.split("/")
    if path.startswith("/"):
        return "is absolute"
    if ".." in segments:
        return "leaves its folder"
    if "\\" in path or ":" in path:
        return "holds a backslash or a colon"
    if not all(c.isprintable() for c in path):
        return "holds control characters"
    if any(segment in ("", ".") or segment.endswith((".", " ")) for segment in segments):
        return "has an empty part, or one that ends in a dot or a blank"
    if len(path) > _MAX_PATH or any(
        len(s.encode(errors="replace")) > _MAX_SEGMENT for s in segments
    ):
        return "is too long"
    return ""


def _wrong_parent(index: int, row: object) -> list[str]:
    if not isinstance(row, dict) or set(row) != {"version", "relation"}:
        return [f"parents[{index}] is not an object of version and relation"]
    if not _is_digest(row["version"]) or not isinstance(row["relation"], str):
        return [f"parents[{index}] is {_shown(row)}, expected a digest and a text"]
    return []


def _wrong_sketch(sketch: object) -> list[str]:
    good = sketch is None or (
        isinstance(sketch, dict)
        and set(sketch) == {"digest", "size"}
        and _is_digest(sketch["digest"])
        and _is_size(sketch["size"])
    )
    return [] if good else ["base.sketch is not an object of digest and size"]


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_SIZE


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:117]}..."

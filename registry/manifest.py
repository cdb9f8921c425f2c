"""The manifest: what the bytes of one version mean, and nothing else.

Its canonical JSON (RFC 8785) is stored as a blob; the digest of that is the version's id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterkit.registry.errors import DamagedError, InvalidError
from adapterkit.registry.strictjson import canonical, digest_of, parse_canonical, parse_object
from adapterkit.registry.wellformed import MAX_SIZE, SCHEMA, problems_of


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
        from rfc8785 import CanonicalizationError

        known = parse_canonical(data)
        value = known or parse_object(data, name)
        problems = problems_of(value)
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
            same = known is not None or canonical(_plain(value)) == data
            same = same and files == sorted(files)
        except (InvalidError, CanonicalizationError, UnicodeEncodeError) as error:
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
    # Written without exponent, and so read back as an integer that is too large.
    if isinstance(value, float) and value.is_integer() and MAX_SIZE < abs(value) < 1e21:
        raise InvalidError(f"a manifest cannot hold the number {value}")
    return value

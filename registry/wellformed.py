"""What makes a manifest well formed: all rules for data that may come from a stranger."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

SCHEMA = "adapter-manifest/1"
_FIELDS = ("schema", "files", "adapter", "base", "quantization", "parents", "recipe")
_FILE_FIELDS = ("path", "digest", "size", "role")
_FILE_KEYS = set(_FILE_FIELDS)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ROLE = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_MAX_PATH, _MAX_SEGMENT = 1024, 255
# The largest integer that JSON readers agree on; RFC 8785 refuses larger ones.
MAX_SIZE = 2**53 - 1


def problems_of(value: dict[str, Any]) -> list[str]:
    """Everything wrong with a manifest as parsed JSON; safe to print."""
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
    if not isinstance(row, dict) or row.keys() != _FILE_KEYS:
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
    if not path.isprintable():
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
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:117]}..."

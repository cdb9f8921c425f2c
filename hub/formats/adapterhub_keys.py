"""Tensor keys of an AdapterHub file -> (path, role); the adapter's name is inside every one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from adapterkit.hub.findings import ERROR, INFO, Finding, clean
from adapterkit.hub.formats.adapterhub_type import HOLDERS, OLD_HOLDERS, Architecture, Place, split
from adapterkit.hub.headers import Stored


@dataclass
class Keys:
    """tensors: place -> tensor. strays: keys nothing could be made of."""

    tensors: dict[Place, Stored] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def put(self, place: Place, stored: Stored, repeated: bool) -> None:
        """Of tensors that the library writes several times, the first stands for all."""
        first = self.tensors.setdefault(place, stored)
        if first is stored:
            return
        if repeated and same(first, stored):
            self.findings.append(
                Finding(INFO, "repeated-tensor", stored.key, "", f"the values of {first.key} again")
            )
            return
        self.strays.append(stored.key)
        about = f"other values than {first.key}" if repeated else f"also {first.key}"
        self.findings.append(Finding(ERROR, "duplicate-tensor", stored.key, "one tensor", about))


def read_keys(files: Sequence[Mapping[str, Stored]], row: Architecture, name: str) -> Keys:
    """Every key placed, or in `strays` with a finding that says what is wrong with it."""
    found = Keys()
    for key, stored in (item for tensors in files for item in tensors.items()):
        parts = split(key, name)
        place = None if parts is None else row.place(parts)
        if place is None:
            found.strays.append(key)
            found.findings.append(_stray(key, name))
        else:
            found.put(place, stored, place[1] in row.repeated)
    return found


def same(one: Stored, other: Stored) -> bool:
    """Whether two tensors hold the same values; where they lie in one place, nothing is read."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    where = (one.source, one.start, one.stop) == (other.source, other.start, other.stop)
    return where or one.read() == other.read()


def _stray(key: str, name: str) -> Finding:
    parts = key.split(".")
    holders = HOLDERS | OLD_HOLDERS.keys()
    named = [after for part, after in zip(parts, parts[1:], strict=False) if part in holders]
    if named and name not in named:
        want = f"a key of the adapter {clean(name)}"
        return Finding(ERROR, "other-adapter", key, want, f"one of {clean(named[0])}")
    want, about = "a tensor of this adapter's config", "an extra tensor that belongs to nothing"
    return Finding(ERROR, "unexpected-tensor", key, want, about)

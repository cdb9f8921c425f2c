"""An adapter in canonical form: formats translate to it, kinds are lowered from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from adapterkit.hub.findings import ERROR, UNSUPPORTED, Finding, clean, listing
from adapterkit.hub.headers import Stored
from adapterkit.hub.matching import Targets
from adapterkit.registry.errors import DamagedError, NotFoundError


@dataclass(frozen=True)
class Adapter:
    """One adapter, its tensors still on disk.

    kind: a row of `kinds.KINDS`; fields: that kind's dataclass.
    tensors: (module path, role) -> where its bytes are; no file key past this point.
    unconsumed: keys of the file that the format could not place.
    findings: everything that is wrong or odd in the folder itself, no base needed.
    files: path -> role ("config", "weights", "head", ...) of those it was read from.
    hints: those of the folder's that were needed.
    requires: fields of the base's config -> what they have to be; None where it does not matter.
    portable: its modules may be named as in a class with a head or in one without.
    """

    name: str
    kind: str
    format: str
    fields: Any
    targets: Targets
    tensors: Mapping[tuple[str, str], Stored]
    config: Mapping[str, Any]
    unconsumed: tuple[str, ...] = ()
    unknown_fields: tuple[str, ...] = ()
    base_name: str | None = None
    revision: str | None = None
    task: str | None = None
    writer: str | None = None
    findings: tuple[Finding, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    hints: Mapping[str, Any] = field(default_factory=dict)
    requires: Mapping[str, Any] = field(default_factory=dict)
    portable: bool = False

    @cached_property
    def modules(self) -> dict[str, dict[str, Stored]]:
        """module path -> role -> tensor."""
        grouped: dict[str, dict[str, Stored]] = {}
        for (module, role), stored in self.tensors.items():
            if module:
                grouped.setdefault(module, {})[role] = stored
        return grouped

    @property
    def shared(self) -> dict[str, Stored]:
        """role -> tensor, of those that belong to all modules; their module path is ""."""
        return {role: stored for (module, role), stored in self.tensors.items() if not module}

    def require_sound(self, also: Iterable[Finding] = ()) -> None:
        """Raises with everything that is wrong with the folder itself: DamagedError, or
        NotFoundError when all that is wrong is a feature this program does not have.

        also: what is wrong beside that, to be said at the same time."""
        errors = [finding for finding in self.findings if finding.severity == ERROR]
        if not errors:
            return
        name = clean(self.name)
        shown = listing([*errors, *(f for f in also if f.severity == ERROR)])
        if all(finding.code == UNSUPPORTED for finding in errors):
            raise NotFoundError(f"{name} needs what is not supported:\n{shown}")
        raise DamagedError(f"{name} is not a complete, sound adapter:\n{shown}")


@dataclass(frozen=True)
class AdapterInfo:
    """What `describe` tells of an adapter; every value is derived from its files.

    variant: the kind in the field's words ("DoRA"). ranks: rank -> number of modules that have it.
    targets: last names of the modules it changes. size: bytes of all tensors. hints: what its
    files do not say and the user did.
    root: sha256 over (module, role, dtype, shape, bytes) of all tensors, "" if not asked for.
    """

    name: str
    kind: str
    variant: str
    format: str
    ranks: Mapping[int, int]
    alphas: tuple[float, ...]
    targets: tuple[str, ...]
    n_modules: int
    n_tensors: int
    n_parameters: int
    size: int
    dtypes: Mapping[str, int]
    base: str | None
    revision: str | None
    task: str | None
    writer: str | None
    unknown_fields: Mapping[str, Any]
    root: str = ""
    trained_on: Mapping[str, Any] | None = None
    base_record: Mapping[str, Any] | None = None
    hints: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = field(default=(), compare=False)

    @property
    def rank(self) -> int | None:
        """The largest rank of any module."""
        return max(self.ranks, default=None)

    def record(self) -> dict[str, Any]:
        """The `adapter` entry of a manifest: canonical JSON data, derived from the files alone."""
        hints = {"hints": dict(self.hints)} if self.hints else {}
        return {
            "kind": self.kind,
            "variant": self.variant,
            "format": self.format,
            "rank": self.rank,
            "ranks": {str(rank): n for rank, n in sorted(self.ranks.items())},
            "alphas": list(self.alphas),
            "target_modules": list(self.targets),
            "modules": self.n_modules,
            "tensors": {
                "count": self.n_tensors,
                "parameters": self.n_parameters,
                "size": self.size,
                "dtypes": dict(sorted(self.dtypes.items())),
                "root": f"sha256:{self.root}",
            },
            "task": self.task,
            "writer": self.writer,
            "unknown_fields": dict(self.unknown_fields),
            **hints,
        }


def count_dtypes(tensors: Mapping[tuple[str, str], Stored]) -> dict[str, int]:
    return dict(Counter(stored.dtype for stored in tensors.values()))

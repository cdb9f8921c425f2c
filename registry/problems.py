"""What verify finds: plain values, never exceptions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

CHANGED, TRUNCATED, MISSING = "changed", "truncated", "missing"
MISNAMED, UNREADABLE, MALFORMED = "misnamed", "unreadable", "malformed"
LOG, CATALOG, FORMAT = "log", "catalog", "format"
# Not damage: what an interruption leaves, and what nothing needs.
ORPHAN, STRAY, TORN = "orphan", "stray", "torn"
NOTES = (ORPHAN, STRAY, TORN)


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is not as it should be.

    what: one of the words above. where: the file, line or table. affects: what cannot be had, or
    is not to be trusted, because of it. repair: what to do.
    """

    what: str
    where: str
    detail: str = ""
    affects: tuple[str, ...] = ()
    repair: str = ""

    @property
    def is_damage(self) -> bool:
        return self.what not in NOTES


@dataclass(frozen=True)
class Health:
    """The answer of verify. n_blobs, n_bytes: read; n_records: lines of the log that are good."""

    problems: tuple[Problem, ...]
    n_blobs: int = 0
    n_bytes: int = 0
    n_records: int = 0

    @property
    def damage(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.is_damage)

    @property
    def notes(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if not problem.is_damage)


def health(problems: Iterable[Problem], n_blobs: int, n_bytes: int, n_records: int) -> Health:
    """Damage first."""
    ordered = sorted(set(problems), key=lambda problem: (not problem.is_damage, problem))
    return Health(tuple(ordered), n_blobs, n_bytes, n_records)

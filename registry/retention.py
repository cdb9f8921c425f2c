"""Which versions are old enough, and unimportant enough, to be removed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby

from adapterkit.registry.errors import InvalidError
from adapterkit.registry.records import Version
from adapterkit.registry.versions import is_release


@dataclass(frozen=True)
class Retention:
    """A version is removed when it is none of the highest `keep_last` of its name, was added longer
    ago than `older_than`, and, with `keep_tagged`, has no tag. What is not given asks nothing; the
    version that the bare name means stays always."""

    keep_last: int | None = None
    older_than: timedelta | None = None
    keep_tagged: bool = False

    def __post_init__(self) -> None:
        if self.keep_last is None and self.older_than is None:
            raise InvalidError("--keep-tagged alone does not say what is old enough to be removed",
                               hint="add --keep-last N or --older-than TIME")  # fmt: skip
        if self.keep_last is not None and self.keep_last < 0:
            raise InvalidError(f"{self.keep_last} versions cannot be kept")

    def outdated(self, versions: Iterable[Version], now: datetime) -> list[Version]:
        """versions: by name and number, as Registry.list gives them."""
        return [
            version
            for _, group in groupby(versions, key=lambda version: version.name)
            for version in self._of_one(list(group), now)
        ]

    def _of_one(self, versions: Sequence[Version], now: datetime) -> list[Version]:
        kept = {latest(versions)} | set(versions[len(versions) - (self.keep_last or 0) :])
        return [v for v in versions if v not in kept and self._may_go(v, now)]

    def _may_go(self, version: Version, now: datetime) -> bool:
        if self.keep_tagged and version.tags:
            return False
        return self.older_than is None or now - _moment(version.created) > self.older_than


def latest(versions: Sequence[Version]) -> Version:
    """What the bare name means; the highest where all were yanked."""
    good = [version for version in versions if version.yanked is None] or versions
    return max(good, key=lambda version: (is_release(version.version), good.index(version)))


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)

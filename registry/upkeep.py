"""What keeps a registry sound and small. What it takes is imported when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from adapterkit.registry import commit, queries
from adapterkit.registry.errors import ConflictError
from adapterkit.registry.naming import NamingSide

if TYPE_CHECKING:
    from adapterkit.registry.blobs import Progress
    from adapterkit.registry.gc import Plan
    from adapterkit.registry.problems import Health
    from adapterkit.registry.records import Version
    from adapterkit.registry.refs import Ref
    from adapterkit.registry.repair import Repaired, Source
    from adapterkit.registry.retention import Retention

GRACE = timedelta(days=1)


class UpkeepSide(NamingSide):
    def verify(self, ref: str | Ref | None = None, progress: Progress | None = None) -> Health:
        """Read everything, or the blobs of one version, and say what is not as it should be.

        progress: told the bytes read, from several threads.
        """
        from adapterkit.registry.verify import verify, verify_version

        if ref is not None:
            return verify_version(self.home, self.resolve(ref).ref, progress)
        return verify(self.home.path, self.home.files, progress)

    def repair(self, sources: Sequence[Source], progress: Progress | None = None) -> Repaired:
        """Replace damaged and missing blobs by good ones of `sources` (remotes), each hashed first.

        progress: told the bytes read and received, from several threads.
        """
        from adapterkit.registry.repair import repair

        told, alone = progress or (lambda size: None), self.home.locking.single_writer
        return repair(self.home.path, sources, self.home.files, told, single_writer=alone)

    def rebuild(self) -> None:
        """Make the catalog anew from the log and the blobs."""
        self.home.rebuild()

    def gc(self, grace: timedelta = GRACE, *, dry_run: bool = False) -> Plan:
        """Move what no version needs into the trash, and delete what has been there for `grace`.

        What was stored or removed within `grace` stays, and so does, whatever its age, what a
        running add or pull may need. Raises DamagedError when it is not known what is needed.
        """
        from adapterkit.registry.gc import collect

        return collect(self.home, grace, dry_run)

    def outdated(self, retention: Retention, pattern: str | None = None) -> Sequence[Version]:
        """The versions that `retain` would remove."""
        return retention.outdated(self.list(pattern), datetime.now(UTC))

    def retain(self, retention: Retention, pattern: str | None = None) -> Sequence[Version]:
        """Remove versions; those that were. One with a protected tag, or in a recipe, stays.

        Name by name it is decided and done in one step: what is tagged meanwhile is seen.
        """
        names = dict.fromkeys(version.name for version in self.outdated(retention, pattern))
        return [version for name in names for version in self._retain(retention, name)]

    def _retain(self, retention: Retention, name: str) -> list[Version]:
        gone = []
        with self.home.write() as change:
            have = queries.versions(change.catalog, name)
            for version in retention.outdated(have, datetime.now(UTC)):
                try:
                    commit.remove(change, version)
                except ConflictError:
                    continue
                gone.append(version)
        return gone

"""Taking away what no version needs: first into the trash, and after a second grace for good.

It trusts no catalog on disk: what is needed is read anew from the log and the manifests.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from adapterkit.registry import blobcheck, leases
from adapterkit.registry.blobs import Stamp
from adapterkit.registry.catalog import Catalog
from adapterkit.registry.change import Change
from adapterkit.registry.errors import DamagedError
from adapterkit.registry.home import Home
from adapterkit.registry.needs import Needs, removed_since, unreadable
from adapterkit.registry.trash import Thrown

# Of leftovers in tmp/ nobody knows whose they are.
_LEFT = timedelta(days=1)


@dataclass(frozen=True)
class Plan:
    """thrown: blobs to the trash, with their sizes. deleted: from the trash. revived: back from it,
    as a version needs them after all. spared: blobs that nothing needs, but that are too young or
    that a running add or pull may need. leftovers: files in tmp/ that interruptions left."""

    thrown: dict[str, int]
    deleted: tuple[Thrown, ...] = ()
    revived: tuple[str, ...] = ()
    spared: int = 0
    leftovers: tuple[str, ...] = ()

    @property
    def freed(self) -> int:
        return sum(each.size for each in self.deleted)

    @property
    def trashed(self) -> int:
        return sum(self.thrown.values())


def collect(home: Home, grace: timedelta, dry_run: bool) -> Plan:
    """grace: how long ago a blob must have been stored, the last version that had it removed, and,
    to be deleted, thrown away.

    Raises DamagedError when it is not known what is needed; then nothing is taken away.
    """
    fresh = Catalog(None)
    try:
        with home.errors():
            return _collect(home, fresh, grace, dry_run)
    finally:
        fresh.close()


def _collect(home: Home, fresh: Catalog, grace: timedelta, dry_run: bool) -> Plan:
    if not home.exists():
        return Plan({})
    with fresh.transaction():
        fresh.catch_up(home.log, home.blobs.read)
    if dry_run:
        return _plan(home, fresh, grace)
    with home.write() as change:
        with fresh.transaction():
            fresh.catch_up(home.log, home.blobs.read)
        plan = _plan(home, fresh, grace)
        _carry_out(home, change, fresh, plan)
        return plan


def _plan(home: Home, fresh: Catalog, grace: timedelta) -> Plan:
    lost = unreadable(fresh)
    if lost:
        raise DamagedError(
            f"the manifest of {lost[0][0]} cannot be read: what it needs is not known, and nothing"
            " is taken away",
            hint="adapter verify says how to repair it",
        )
    cutoff = time.time() - grace.total_seconds()
    needed = Needs(fresh).sizes
    recent = removed_since(fresh, datetime.fromtimestamp(max(cutoff, 0), UTC))
    # The blobs first: whatever is stored by now had its lease taken before.
    names = [name for name in blobcheck.stored(home.blobs) if name not in needed]
    held = leases.held(home.leases.path, home.files)
    garbage = {name: stamp for name in names if (stamp := home.blobs.stamp(name)) is not None}
    kept = held | recent
    thrown = {
        digest: stamp.size
        for digest, stamp in garbage.items()
        if digest not in kept and _is_old(stamp, cutoff)
    }
    trash = home.trash.contents()
    revived = {e.digest for e in trash if e.digest in needed and home.blobs.stamp(e.digest) is None}
    deleted = [e for e in trash if e.since <= cutoff and e.digest not in held | revived]
    spared = len(garbage) - len(thrown)
    left = _leftovers(home, min(cutoff, time.time() - _LEFT.total_seconds()))
    return Plan(thrown, tuple(deleted), tuple(sorted(revived)), spared, tuple(left))


def _is_old(stamp: Stamp, cutoff: float) -> bool:
    return stamp.mtime_ns <= cutoff * 1e9


def _leftovers(home: Home, cutoff: float) -> Iterable[str]:
    folder = home.path / "tmp"
    for name in home.files.listdir(folder):
        try:
            if home.files.lstat(folder / name).st_mtime <= cutoff:
                yield name
        except FileNotFoundError:  # renamed to its place just now
            continue


def _carry_out(home: Home, change: Change, fresh: Catalog, plan: Plan) -> None:
    for digest in plan.revived:
        home.trash.revive(digest)
    home.trash.delete(plan.deleted)
    for name in plan.leftovers:
        home.files.unlink(home.path / "tmp" / name)
    if plan.thrown:
        epoch = max([*home.trash.epochs(), _last_epoch(fresh)]) + 1
        payload = {"epoch": epoch, "n_blobs": len(plan.thrown), "n_bytes": plan.trashed}
        change.append("gc", payload)
        home.trash.throw(epoch, plan.thrown)


def _last_epoch(fresh: Catalog) -> int:
    query = "SELECT max(json_extract(payload, '$.epoch')) AS last FROM events WHERE kind = 'gc'"
    row = fresh.row(query)
    return int(row["last"] or 0) if row else 0

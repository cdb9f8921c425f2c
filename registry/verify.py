"""Everything a registry holds, compared with what it should be. Nothing is changed, and nothing
that is found is raised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from adapterkit.registry import blobcheck, catalogcheck, layout, problems
from adapterkit.registry.blobcheck import Found, Need, see
from adapterkit.registry.blobs import Blobs, Progress
from adapterkit.registry.catalog import Catalog
from adapterkit.registry.errors import AdapterError, DamagedError
from adapterkit.registry.files import Files, storage_errors
from adapterkit.registry.home import Home
from adapterkit.registry.log import Log
from adapterkit.registry.logcheck import LogState, scan
from adapterkit.registry.needs import Needs, unreadable
from adapterkit.registry.problems import Health, Problem
from adapterkit.registry.refs import Ref
from adapterkit.registry.strayfiles import leftovers, misnamed
from adapterkit.registry.strictjson import digest_of
from adapterkit.registry.tables import ReadBlob

FROM_BACKUP = "restore the file 'log' from a backup"


@dataclass(frozen=True)
class Examined:
    """What can be repaired. lost: needed blobs that are not there with their bytes. astray: digest
    -> a file that holds the bytes of a needed blob under a wrong name. kept: digest -> a lost
    manifest that the catalog remembers."""

    health: Health
    lost: Mapping[str, Need]
    astray: Mapping[str, Path]
    kept: Mapping[str, bytes]


def verify(home: Path, files: Files | None = None, progress: Progress | None = None) -> Health:
    """Read all there is. progress: told the bytes read, from several threads."""
    return examine(home, files or Files(), progress or _silent).health


def examine(home: Path, files: Files, progress: Progress) -> Examined:
    check = _Check(home.absolute(), files, progress)
    with storage_errors(f"the registry {home}"):
        health = check.run()
    return Examined(health, check.lost, check.astray, check.kept)


def verify_version(home: Home, ref: Ref, progress: Progress | None = None) -> Health:
    """Read the blobs of one version."""
    needs, found = home.read(lambda catalog: Needs(catalog).of(ref)), Found()
    there = blobcheck.there(home.blobs, needs.sizes)
    seen = blobcheck.look(home.blobs, there, progress or _silent)
    faults = list(blobcheck.judge(home.blobs, needs, found, seen))
    return problems.health(faults, found.n_blobs, found.n_bytes, 0)


def to_read(home: Path) -> int:
    """Bytes that verify will read, for a progress bar."""
    blobs = Blobs(home / "blobs", home / "tmp", Files())
    return sum(_size(blobs.path(name)) for name in blobcheck.walk(blobs, Found()))


def _size(path: Path) -> int:
    """0 where it cannot be told: verify says why."""
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _silent(size: int) -> None:
    pass


class _Check:
    def __init__(self, home: Path, files: Files, progress: Progress) -> None:
        self.home, self.files, self.progress = home, files, progress
        self.log = Log(home / "log", files)
        self.blobs = Blobs(home / "blobs", home / "tmp", files)
        self.faults: list[Problem] = []
        self.failed: set[str] = set()
        self.kept: dict[str, bytes] = {}
        self.lost: dict[str, Need] = {}
        self.astray: dict[str, Path] = {}

    def run(self) -> Health:
        if not self._format():
            return Health(())
        # In this order, what others do meanwhile cannot look like damage: a catalog is never ahead
        # of the log, nor the log of the blobs.
        disk = self._disk()
        state = self._scan()
        fresh = Catalog(None)
        try:
            if disk is not None:
                self._lost_lines(state, disk)
            self._lines(state, disk)
            self._fill(fresh, state, disk)
            needs = Needs(fresh if not state.faults or disk is None else disk)
            if disk is not None and not state.faults:
                self._compare(state, disk, fresh, needs)
            found = self._blobs(state, needs)
        finally:
            for catalog in (disk, fresh):
                if catalog is not None:
                    catalog.close()
        self.faults += leftovers(self.home, self.files)
        return problems.health(self.faults, found.n_blobs, found.n_bytes, state.n_good)

    def _add(self, what: str, where: str, detail: str, repair: str) -> None:
        self.faults.append(Problem(what, where, detail, (), repair))

    def _format(self) -> bool:
        """Whether there is something to look at."""
        repair = f"write {layout.line().decode()!r} into it, if all else is good"
        try:
            if not layout.check(self.home, self.files):
                return False
            with self.files.open(self.home / "FORMAT") as file:
                if file.read(100) != layout.line():
                    self._add(problems.FORMAT, "FORMAT", "is not what was written", repair)
        except (AdapterError, OSError) as error:
            self._add(problems.FORMAT, "FORMAT", str(error), repair)
        return True

    def _scan(self) -> LogState:
        try:
            state = scan(self.log)
        except OSError as error:
            self._add(problems.LOG, "log", f"cannot be read: {error.strerror}", FROM_BACKUP)
            return LogState({1: "cannot be read"})
        return state

    def _disk(self) -> Catalog | None:
        """A copy of the catalog on disk; None where there is none, or one that the next command
        makes or migrates, or one too broken to read."""
        path = self.home / "catalog.db"
        if not path.exists():
            return None
        try:
            copy = catalogcheck.copy_of(path)
        except FileNotFoundError:  # just now: it is about to be replaced
            return None
        except catalogcheck.UNREADABLE as error:
            self.faults.append(catalogcheck.damaged(f"cannot be read: {error}"))
            return None
        try:
            faults = []
            if copy.is_current():
                faults = catalogcheck.sound(copy)
                copy.place()
        except catalogcheck.UNREADABLE as error:
            faults = [catalogcheck.damaged(f"cannot be read: {error}")]
        self.faults += faults
        if not faults and copy.is_current():
            return copy
        copy.close()
        return None

    def _lost_lines(self, state: LogState, disk: Catalog) -> None:
        """Lines that the catalog has seen and the log no longer has."""
        place = disk.place()
        if state.faults or place.offset <= state.end.offset:
            return
        for seq in range(state.end.seq + 1, min(place.seq, state.end.seq + 1000) + 1):
            state.faults[seq] = "is missing or cut off; the catalog has seen it"
        state.torn = 0

    def _lines(self, state: LogState, disk: Catalog | None) -> None:
        for seq, text in sorted(state.faults.items()):
            where, affects = f"log, line {seq}", _event(disk, seq)
            self.faults.append(Problem(problems.LOG, where, text, affects, FROM_BACKUP))
        if state.torn:
            detail = "was cut off while it was written; it was never confirmed"
            where, repair = f"log, line {state.torn}", "the next change cuts it off"
            self._add(problems.TORN, where, detail, repair)

    def _fill(self, fresh: Catalog, state: LogState, disk: Catalog | None) -> None:
        """Make a catalog from the good beginning of the log."""
        with fresh.transaction():
            try:
                fresh.catch_up(self.log, self._reader(disk), state.end.offset)
            except (AdapterError, OSError) as error:
                seq = fresh.place().seq + 1
                state.faults[seq] = str(error)
                self._add(problems.LOG, f"log, line {seq}", str(error), FROM_BACKUP)

    def _reader(self, disk: Catalog | None) -> ReadBlob:
        """Reads a blob; of a manifest that has rotted, the copy that the catalog keeps."""

        def read(digest: str) -> bytes:
            try:
                return self.blobs.read(digest)
            except AdapterError as error:
                kept = _kept(disk, digest)
                if kept is not None:
                    self.kept[digest] = kept
                    return kept
                self.failed.add(digest)
                raise DamagedError(f"blob {digest[:12]} is missing or damaged") from error

        return read

    def _compare(self, state: LogState, disk: Catalog, fresh: Catalog, needs: Needs) -> None:
        """To be behind the log is no fault: the copy follows it first."""
        try:
            if not self.log.holds(disk.place()):
                self.faults.append(catalogcheck.damaged("was made from another log"))
                return
            with disk.transaction():
                disk.catch_up(self.log, self._reader(disk), state.end.offset)
            readable = not self.failed & needs.sizes.keys()
            self.faults += catalogcheck.differences(disk, fresh, readable)
        except (*catalogcheck.UNREADABLE, AdapterError) as error:
            self.faults.append(catalogcheck.damaged(f"cannot be read: {error}"))

    def _blobs(self, state: LogState, needs: Needs) -> Found:
        known, found = not state.faults and not unreadable(needs.catalog), Found()
        seen = blobcheck.look(self.blobs, list(blobcheck.walk(self.blobs, found)), self.progress)
        faults = list(blobcheck.judge(self.blobs, needs, found, seen))
        if found.lost and self.log.size() > state.end.offset:
            faults = self._still_needed(faults, found, needs.catalog)
        # Where it is not known what is needed, nothing can be said to be needed by nobody.
        self.faults += [f for f in faults if known or f.what != problems.ORPHAN]
        self.faults += self._malformed(needs.catalog)
        strange = [(path, see(self.blobs, path, "", _silent)) for path in found.strange]
        self.faults += misnamed(self.blobs, strange, needs, self._shown)
        self.lost = {d: Need(needs.sizes[d], needs.by(d)) for d in sorted(found.lost)}
        self.astray = {seen.digest: path for path, seen in strange if seen.digest in needs.sizes}
        return found

    def _still_needed(
        self, faults: list[Problem], found: Found, catalog: Catalog
    ) -> list[Problem]:
        """Without what is missing because its version was removed, and it collected, meanwhile."""
        with catalog.transaction():
            catalog.catch_up(self.log, self._reader(None))
        sizes = Needs(catalog).sizes
        gone = {self._shown(digest) for digest in found.lost if digest not in sizes}
        found.lost &= sizes.keys()
        return [f for f in faults if f.what != problems.MISSING or f.where not in gone]

    def _malformed(self, catalog: Catalog) -> Iterator[Problem]:
        """Manifests with the right digest that are none all the same."""
        for ref, id, text in unreadable(catalog):
            if self.blobs.intact(id):
                where, repair = self._shown(id), f"adapter rm {ref}"
                yield Problem(problems.MALFORMED, where, text, (f"{ref}: manifest",), repair)

    def _shown(self, digest: str) -> str:
        return self.blobs.path(digest).relative_to(self.home).as_posix()


def _event(disk: Catalog | None, seq: int) -> tuple[str, ...]:
    """What a lost line said, as far as the catalog remembers it."""
    row = disk and disk.row("SELECT kind, name FROM events WHERE seq = ?", [seq])
    return (f"{row['name']} ({row['kind']})",) if row else ()


def _kept(disk: Catalog | None, digest: str) -> bytes | None:
    row = disk and disk.row("SELECT data FROM manifests WHERE id = ?", [digest])
    same = row and isinstance(row["data"], bytes) and digest_of(row["data"]) == digest
    return row["data"] if row and same else None

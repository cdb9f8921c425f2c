"""A registry copied into one file, while others write, and made anew from one."""

from __future__ import annotations

import hashlib
import sqlite3
import uuid
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from adapterkit.registry import layout
from adapterkit.registry.archive import LOG, REMOTES, Archive, Entry, Writer
from adapterkit.registry.blobs import Progress
from adapterkit.registry.catalog import Catalog
from adapterkit.registry.errors import ConflictError, DamagedError, InvalidError
from adapterkit.registry.files import storage_errors
from adapterkit.registry.hashing import CHUNK
from adapterkit.registry.home import Home
from adapterkit.registry.log import Log, Place
from adapterkit.registry.needs import Needs, unreadable
from adapterkit.registry.refs import Ref, check_tag
from adapterkit.registry.strictjson import parse_object

# What a restore that was interrupted may have left.
_LEFTOVERS = {"blobs", "tmp", "lock", "leases", "trash"}
MAX_REMOTES = 1 << 20


@dataclass(frozen=True)
class Copied:
    """size: of the file."""

    n_versions: int
    n_blobs: int
    size: int


def backup(home: Home, path: Path, progress: Progress) -> Copied:
    """The state at one moment: a prefix of the log, and every blob that it needs.

    Read again when it is written. Raises DamagedError, which names every version concerned, when a
    blob has rotted: then there is no file.
    """
    target = path.absolute()
    if target.exists():
        raise ConflictError(f"{path} exists", hint="name a new file")
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    with _leased(home), storage_errors(f"the backup {path} cannot be written"):
        try:
            n_versions, wanted = _write(home, part, progress)
            _read_again(home, part)
            home.files.rename(part, target)
        finally:
            home.files.unlink(part)
        home.files.fsync_folder(target.parent)
    return Copied(n_versions, wanted, home.files.stat(target).st_size)


def _leased(home: Home) -> AbstractContextManager[None]:
    """Nothing that is taken inside is collected; where nothing can be written, nothing is."""
    return home.leases.session() if home.files.writable(home.path) else nullcontext()


def _write(home: Home, part: Path, progress: Progress) -> tuple[int, int]:
    place, wanted, n_versions = home.read(_moment)
    if home.files.writable(home.path) and home.exists():
        home.take(wanted)
    with home.files.create(part) as file:
        writer = Writer(home.files, file)
        if place.offset:
            with home.files.open(home.log.path) as log:
                writer.add(LOG, place.offset, log, progress)
        else:
            writer.add(LOG, 0, file, progress)
        remotes = home.path / REMOTES
        if remotes.exists():
            with home.files.open(remotes) as source:
                writer.add(REMOTES, home.files.stat(remotes).st_size, source, progress)
        _add_blobs(home, writer, wanted, progress)
        writer.end()
        home.files.fsync(file)
    return n_versions, len(wanted)


def _moment(catalog: Catalog) -> tuple[Place, dict[str, int | None], int]:
    with catalog.snapshot():
        return catalog.place(), Needs(catalog).sizes, _n_versions(catalog)


def _n_versions(catalog: Catalog) -> int:
    rows = catalog.rows("SELECT count(*) AS n FROM versions WHERE removed IS NULL")
    return int(rows[0]["n"])


def _add_blobs(home: Home, writer: Writer, wanted: Iterable[str], progress: Progress) -> None:
    bad = []
    for digest in sorted(wanted):
        stamp = home.blobs.stamp(digest)
        if stamp is None and home.revive(digest):
            stamp = home.blobs.stamp(digest)
        if stamp is None:
            bad.append(digest)
            continue
        with home.files.open(home.blobs.path(digest)) as source:
            if writer.add(digest, stamp.size, source, progress) != digest:
                bad.append(digest)
    if bad:
        by = home.read(lambda catalog: [Needs(catalog).by(digest) for digest in bad])
        affected = sorted({text for texts in by for text in texts})
        raise DamagedError(
            f"{len(bad)} blobs are missing or damaged: {'; '.join(affected[:20])}",
            hint="adapter verify names all of them and how to repair them",
        )


def _read_again(home: Home, part: Path) -> None:
    with home.files.open(part) as file:
        for entry in Archive(file, part).entries():
            hasher = hashlib.sha256()
            while data := entry.read(CHUNK):
                hasher.update(data)
            if entry.name not in (LOG, REMOTES, hasher.hexdigest()):
                raise DamagedError(f"the backup holds other bytes than were written: {entry.name}")


def restore(home: Home, path: Path, progress: Progress) -> Copied:
    """Make the registry that `path` holds, in an empty folder, all or nothing.

    Raises ConflictError when there is something, DamagedError when the file is not a whole backup
    of which every blob is what it says and every version has its own.
    """
    with storage_errors(f"the backup {path} cannot be restored"):
        _must_be_free(home)
        with home.files.open(path) as file:
            archive = Archive(file, path)
            home.blobs.create()
            with home.lock(), home.leases.session():
                _must_be_free(home)
                try:
                    found = _receive(home, archive, progress)
                except BaseException:
                    if not (home.path / "FORMAT").exists():
                        for name in ("blobs", "tmp", "log", REMOTES):
                            _remove(home, home.path / name)
                    raise
        return Copied(*found, home.files.stat(path).st_size)


def _must_be_free(home: Home) -> None:
    there = home.files.listdir(home.path) if home.path.is_dir() else []
    if set(there) - _LEFTOVERS:
        raise ConflictError(
            f"{home.path} is not empty", hint="restore into a new registry: adapter --home FOLDER"
        )


def _remove(home: Home, path: Path) -> None:
    home.files.remove_tree(path)
    home.files.unlink(path)


def _receive(home: Home, archive: Archive, progress: Progress) -> tuple[int, int]:
    n_blobs, parts = 0, {}
    for entry in archive.entries():
        if entry.name not in (LOG, REMOTES):
            home.blobs.put(entry.stream(), entry.name, entry.size)
            n_blobs += 1
        elif entry.name in parts or (entry.name == REMOTES and entry.size > MAX_REMOTES):
            raise archive.damaged(f"holds two of {entry.name}, or one that is too large")
        else:
            parts[entry.name] = _spool(home, entry)
        progress(entry.size)
    if LOG not in parts:
        raise archive.damaged("holds no log")
    n_versions = _check(home, archive, parts[LOG])
    if REMOTES in parts:
        parse_object(parts[REMOTES].read_bytes(), f"{REMOTES} in {archive.name}")
        home.files.rename(parts[REMOTES], home.path / REMOTES)
    home.files.rename(parts[LOG], home.path / "log")
    layout.create(home.path, home.files)
    home.exists()
    return n_versions, n_blobs


def _spool(home: Home, entry: Entry) -> Path:
    part = home.path / "tmp" / f"{uuid.uuid4().hex}.part"
    with home.files.create(part) as file:
        while data := entry.read(CHUNK):
            home.files.write(file, data)
        home.files.fsync(file)
    return part


def _check(home: Home, archive: Archive, log: Path) -> int:
    """How many versions there are. Raises DamagedError unless the log is whole and so are they."""
    catalog = Catalog(None)
    try:
        with catalog.transaction():
            catalog.catch_up(Log(log, home.files), home.blobs.read)
        if catalog.place().offset != home.files.stat(log).st_size:
            raise archive.damaged("holds a log that ends in the middle of a line")
        _check_words(catalog)
        needs = Needs(catalog)
        lost = [digest for digest, size in needs.sizes.items() if not _has(home, digest, size)]
        lacking = [label for digest in lost for label in needs.by(digest)]
        lacking += [f"{ref}: {what}" for ref, _, what in unreadable(catalog)]
        if lacking:
            raise archive.damaged(f"lacks {'; '.join(sorted(lacking)[:20])}")
        return _n_versions(catalog)
    except (InvalidError, sqlite3.Error, ValueError, OverflowError) as error:
        raise archive.damaged(f"holds what no registry does: {error}") from error
    finally:
        catalog.close()


def _has(home: Home, digest: str, size: int | None) -> bool:
    stamp = home.blobs.stamp(digest)
    return stamp is not None and size in (None, stamp.size)


def _check_words(catalog: Catalog) -> None:
    """Names, numbers and tags are such as could have been given. Raises InvalidError."""
    for row in catalog.rows("SELECT name, version FROM versions"):
        Ref.parse(f"{row['name']}@{row['version']}")
    for row in catalog.rows("SELECT tag FROM tags UNION SELECT tag FROM protected"):
        check_tag(row["tag"])
    for row in catalog.rows("SELECT name FROM redirects UNION SELECT target FROM redirects"):
        Ref.parse(row["name"])

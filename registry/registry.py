"""The registry: named, versioned adapters that never change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.registry import attaching, commit, queries, wholes
from adapterkit.registry.blobs import Blob, Content, Fetch, Progress
from adapterkit.registry.errors import DamagedError
from adapterkit.registry.manifest import FileEntry, Manifest, Meaning
from adapterkit.registry.reading import as_ref, bare_name
from adapterkit.registry.records import Added, Attachment
from adapterkit.registry.refs import Ref
from adapterkit.registry.upkeep import UpkeepSide
from adapterkit.registry.versions import normal

if TYPE_CHECKING:
    from adapterkit.registry.backup import Copied


class Registry(UpkeepSide):
    """One folder of adapters. Threads may share it; close it, or use it in a `with`."""

    def add(  # noqa: PLR0913
        self,
        name: str,
        files: Mapping[str, Path | bytes],
        meaning: Meaning,
        *,
        version: str | None = None,
        tags: Sequence[str] = (),
        attachments: Mapping[str, bytes] | None = None,
        roles: Mapping[str, str] | None = None,
    ) -> Added:
        """Store `files` (path in the version -> content) as a version of `name`, all or nothing.

        version: the next minor one when left out; the same content again is the version it was.
        attachments: `KIND` or `KIND/NAME` -> content. roles: path -> role.
        Raises ConflictError when `version` is taken by other content, NotFoundError when it is made
        of parts that are not here.
        """
        ref = bare_name(name)
        wanted = ref if version is None else ref.at(normal(version))
        for tag in tags:
            commit.movable(tag)
        entries = [attaching.entry(key, data) for key, data in (attachments or {}).items()]
        self.home.create()
        with self.home.leases.session():
            blobs = self._put(files)
            rows = [
                FileEntry(path, blob.digest, blob.size, (roles or {}).get(path, "file"))
                for path, blob in blobs.items()
            ]
            manifest = Manifest.of(rows, meaning)
            put = [*blobs.values(), *map(self.home.blobs.put, meaning.extra)]
            put += [self.home.blobs.put(data) for data in (attachments or {}).values()]
            commit.check_complete(manifest, put)
            put.append(self.home.blobs.put(manifest.dump()))
            with self.home.write() as change:
                change.require(blob.digest for blob in put)
                wholes.require_parts(change, manifest)
                for blob in put:
                    commit.stamp(change, blob.digest)
                found, created = commit.version(change, wanted, manifest.id, tags, entries)
        stored = sum(blob.size for blob in put if blob.new)
        return Added(found, manifest.id, created, manifest.size, stored)

    def _put(self, files: Mapping[str, Path | bytes]) -> dict[str, Blob]:
        """A file of a size that is here already may be here too: it is looked for before it is
        copied."""
        paths = {path: content for path, content in files.items() if isinstance(content, Path)}
        sizes = {path: file.stat().st_size for path, file in paths.items() if file.is_file()}
        known = self.home.read(lambda catalog: queries.sizes(catalog, sizes.values()))
        found = {
            path: self.home.blobs.find(paths[path]) for path, size in sizes.items() if size in known
        }
        return {
            path: found.get(path) or self.home.blobs.put(content) for path, content in files.items()
        }

    def attach(self, ref: str | Ref, kind: str, data: bytes, name: str = "") -> Attachment:
        """Add a fact about a version without changing it; the same again changes nothing.

        kind: "metrics" (a JSON object of numbers), "note" (text), or another word.
        """
        wanted, entry = as_ref(ref), attaching.entry(f"{kind}/{name}" if name else kind, data)
        self.resolve(wanted)
        with self.home.leases.session():
            self.home.blobs.put(data)
            with self.home.write() as change:
                change.require([entry.digest])
                target = queries.resolve(change.catalog, wanted)
                attaching.append(change, target, entry)
        return next(a for a in self.attachments(target.ref) if attaching.same(a, entry))

    def backup(self, path: Path, progress: Progress = lambda size: None) -> Copied:
        """Copy everything into one new file, as it is at one moment, while others may write.

        Raises DamagedError when something has rotted; then there is no file.
        """
        from adapterkit.registry import backup

        return backup.backup(self.home, path, progress)

    def restore(self, path: Path, progress: Progress = lambda size: None) -> Copied:
        """Make this registry, which must be empty, what `path` holds, all or nothing."""
        from adapterkit.registry import backup

        return backup.restore(self.home, path, progress)

    def put_blob(self, content: Content, digest: str, size: int | None = None) -> Blob:
        """Store bytes that arrived from elsewhere. Raises DamagedError when they are not those.

        gc leaves them until they are published or this registry is closed.
        """
        self.home.create()
        return self.home.blobs.put(content, digest, size)

    def receive(
        self, digest: str, size: int, fetch: Fetch, progress: Progress = lambda size: None
    ) -> Blob:
        """As put_blob, from `fetch(start)`; goes on where an earlier call was interrupted."""
        self.home.create()
        return self.home.blobs.receive(digest, size, fetch, progress)

    def publish(
        self,
        name: str,
        version: str,
        manifest: bytes,
        tags: Sequence[str] = (),
        attachments: Iterable[Attachment] = (),
    ) -> Added:
        """Make a version of which every blob is already here; its id stays what it was.

        Raises DamagedError when the manifest is malformed or a blob is not here, ConflictError
        when that version is other content.
        """
        ref, number = bare_name(name), normal(version)
        movable = [commit.movable(tag) for tag in tags]
        parsed = Manifest.parse(manifest, f"the manifest of {ref.at(number)}")
        entries = list(attachments)
        sizes = parsed.blobs() | {entry.digest: entry.size for entry in entries}
        with self.home.leases.session():
            self._must_have(ref.at(number), sizes)
            blob = self.put_blob(manifest, parsed.id)
            with self.home.errors():
                self.home.blobs.settle(sizes)
            with self.home.write() as change:
                change.require([*sizes, parsed.id])
                wholes.require_parts(change, parsed)
                found, new = commit.version(change, ref.at(number), parsed.id, movable, entries)
        self.home.leases.release(sizes)  # since they were received
        return Added(found, parsed.id, new, parsed.size, blob.size if blob.new else 0)

    def _must_have(self, ref: Ref, sizes: Mapping[str, int]) -> None:
        self.home.take(sizes)
        for digest in sizes:
            self.home.revive(digest)
        absent = [digest for digest, size in sizes.items() if not self.intact(digest, size)]
        if absent:
            raise DamagedError(f"{ref} lacks its blobs {', '.join(d[:12] for d in absent)}")

"""file:// - a remote that is a plain folder, such as a shared disk. Its layout: docs/store.md."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from adapterkit.hub.findings import clean
from adapterkit.hub.remotes import entries
from adapterkit.hub.remotes.base import Progress, Published
from adapterkit.registry import layout
from adapterkit.registry.blobs import Blobs, bare
from adapterkit.registry.errors import (
    ConflictError,
    DamagedError,
    RemoteError,
    UnreachableError,
)
from adapterkit.registry.files import Files, storage_errors, write_new
from adapterkit.registry.records import Attachment, Yank
from adapterkit.registry.refs import Ref
from adapterkit.registry.strictjson import canonical, digest_of, parse_object
from adapterkit.registry.urls import Url
from adapterkit.registry.versions import shortest, sort_key

# A version, a tag or an attachment is a few hundred bytes.
MAX_ENTRY = 1 << 16


class FolderRemote:
    """The first push creates the folder."""

    def __init__(self, url: Url, files: Files | None = None) -> None:
        self.url = str(url)
        self.root, self.files = Path(url.path), files or Files()
        self.temp = self.root / "tmp"
        self.blobs = Blobs(self.root / "blobs", self.temp, self.files, RemoteError)

    def _errors(self) -> AbstractContextManager[None]:
        return storage_errors(clean(self.url), RemoteError)

    def exists(self) -> bool:
        with self._errors():
            return layout.check(self.root, self.files, layout.REMOTE)

    def _check(self) -> None:
        if not self.exists():
            raise UnreachableError(
                f"{clean(self.url)} is not a remote: there is no such folder, or it is empty",
                hint="the first push makes one",
            )

    def _create(self) -> None:
        with self._errors():
            if not self.exists():
                self.files.make_folder(self.temp)
                self.blobs.create()
                layout.create(self.root, self.files, layout.REMOTE)

    def has(self, digest: str, size: int) -> bool:
        with self._errors():
            found = self.blobs.stamp(digest)
            if found is None or found.size != size:
                return False
            self.blobs.settle([digest])
            return True

    def send(self, digest: str, size: int, source: Path, progress: Progress) -> None:
        def read(start: int) -> BinaryIO:
            file = source.open("rb")
            file.seek(start)
            return file

        self._create()
        self.blobs.receive(digest, size, read, progress)

    def fetch(self, digest: str, start: int) -> BinaryIO:
        with self._errors():
            self._check()
            if self.blobs.stamp(digest) is None:
                raise DamagedError(f"{clean(self.url)} lacks the blob {bare(digest)[:12]}")
            file = self.files.open(self.blobs.path(digest))
            file.seek(start)
            return file

    def names(self) -> Sequence[str]:
        with self._errors():
            self._check()
            spaces = [(s, self.root / "refs" / s) for s in self._listing(self.root / "refs")]
            # One without versions only leads elsewhere.
            found = [
                f"{space}/{name}"
                for space, path in spaces
                for name in self._listing(path)
                if (path / name / "versions").is_dir()
            ]
        return [name for name in found if entries.is_name(name)]

    def versions(self, name: str) -> Sequence[Published]:
        with self._errors():
            self._check()
            folder = self._place(name) / "versions"
            found = [self._version(name, folder / number) for number in self._listing(folder)]
        return sorted(found, key=lambda v: sort_key(v.version))

    def _version(self, name: str, folder: Path) -> Published:
        value, shown = self._read(folder / "version.json")
        found = entries.published(value, name, shown)
        if shortest(found.version) != folder.name:
            raise DamagedError(f"{shown} is about {found.ref}")
        return found

    def tags(self, name: str) -> dict[str, Published]:
        with self._errors():
            self._check()
            folder = self._place(name) / "tags"
            paths = [folder / entry for entry in self._listing(folder) if entry.endswith(".json")]
            return dict(self._tag(name, path) for path in paths)

    def _tag(self, name: str, path: Path) -> tuple[str, Published]:
        value, shown = self._read(path)
        tag, target = entries.tagged(value, name, shown)
        found = self._version(name, self._place(name) / "versions" / shortest(target.version))
        if (tag, found.id) != (path.stem, target.id):
            raise DamagedError(f"{shown} is not about {path.stem}, or about another {found.ref}")
        return tag, found

    def attachments(self, id: str) -> Sequence[Attachment]:
        with self._errors():
            folder = self.root / "attachments" / bare(id)
            paths = [folder / entry for entry in self._listing(folder) if entry.endswith(".json")]
            found = [entries.attachment(*self._read(path), id) for path in paths]
        return sorted(found, key=lambda a: (a.created, a.kind, a.name, a.digest))

    def publish(self, version: Published) -> bool:
        """A folder made beside it and renamed: that is one step, and never replaces another."""
        self._create()
        target = self._folder(version)
        part = self.temp / f"{uuid.uuid4().hex}.version"
        with self._errors():
            try:
                self.files.make_folder(target.parent)
                self.files.mkdir(part)
                data = canonical(entries.of_version(version))
                write_new(self.files, part / "version.json", data, part)
                self.files.rename(part, target)
                self.files.fsync_folder(target.parent)
                return True
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            finally:
                self.files.remove_tree(part)
            found = self._version(version.name, target)
        if found.id != version.id:
            raise ConflictError(
                f"{version.ref} in {clean(self.url)} is {found.id[:12]}, here it is"
                f" {version.id[:12]}: they have diverged",
                hint="give yours another number: a published version never changes",
            )
        return False

    def attach(self, attachment: Attachment) -> None:
        value = entries.of_attachment(attachment)
        same = digest_of(canonical(value["attachment"]))
        self._write(self.root / "attachments" / bare(attachment.subject) / f"{same}.json", value)

    def tag(self, tag: str, target: Published) -> None:
        path = self._place(target.name) / "tags" / f"{tag}.json"
        self._write(path, entries.of_version(target) | {"tag": tag})

    def yank(self, version: Published) -> Yank | None:
        with self._errors():
            found = self._read_if_there(self._folder(version) / "yank.json")
        return None if found is None else entries.yank(found[0], version, found[1])

    def set_yank(self, version: Published, said: Yank) -> None:
        self._write(self._folder(version) / "yank.json", entries.of_yank(version, said))

    def target(self, name: str) -> str | None:
        with self._errors():
            found = self._read_if_there(self._place(name) / "moved.json")
        return None if found is None else entries.redirect(found[0], name, found[1])

    def redirect(self, name: str, target: str) -> None:
        self._write(self._place(name) / "moved.json", entries.of_redirect(name, target))

    def _folder(self, version: Published) -> Path:
        return self._place(version.name) / "versions" / shortest(version.version)

    def _place(self, name: str) -> Path:
        ref = Ref.parse(name)
        return self.root / "refs" / ref.namespace / ref.name

    def _listing(self, folder: Path) -> list[str]:
        try:
            return self.files.listdir(folder)
        except FileNotFoundError:
            return []

    def _read_if_there(self, path: Path) -> tuple[dict[str, Any], str] | None:
        return self._read(path) if os.path.lexists(path) else None

    def _read(self, path: Path) -> tuple[dict[str, Any], str]:
        """The JSON object in a small file, and how messages call it. Links are not followed."""
        shown = f"{path.relative_to(self.root).as_posix()} in {clean(self.url)}"
        try:
            status = self.files.lstat(path)
        except FileNotFoundError as error:
            raise DamagedError(f"{shown} is missing") from error
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_ENTRY:
            raise DamagedError(f"{shown} is not a small file")
        with self.files.open(path) as file:
            return parse_object(file.read(MAX_ENTRY), shown), shown

    def _write(self, path: Path, value: dict[str, Any]) -> None:
        self._create()
        with self._errors():
            self.files.make_folder(path.parent)
            write_new(self.files, path, canonical(value), self.temp)

"""What gc has taken away and not yet deleted: `trash/<epoch>/<64 hex>`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from adapterkit.registry.blobs import Blobs
from adapterkit.registry.files import Files


@dataclass(frozen=True)
class Thrown:
    """since: when it was thrown away, in seconds since 1970."""

    digest: str
    path: Path
    size: int
    since: float


class Trash:
    def __init__(self, root: Path, blobs: Blobs, files: Files) -> None:
        self.root, self.blobs, self.files = root, blobs, files

    def epochs(self) -> list[int]:
        names = self.files.listdir(self.root) if self.root.is_dir() else []
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    def contents(self) -> list[Thrown]:
        found = []
        for epoch in self.epochs():
            folder = self.root / str(epoch)
            since = self.files.stat(folder).st_mtime
            for name in self.files.listdir(folder):
                size = self.files.lstat(folder / name).st_size
                found.append(Thrown(name, folder / name, size, since))
        return found

    def throw(self, epoch: int, digests: Iterable[str]) -> None:
        """Move blobs away. Call it with the registry's lock held, as what follows here."""
        folder = self.root / str(epoch)
        self.files.make_folder(folder)
        touched = {folder}
        for digest in digests:
            path = self.blobs.path(digest)
            self.files.rename(path, folder / digest)
            touched.add(path.parent)
        for each in touched:
            self.files.fsync_folder(each)

    def delete(self, gone: Iterable[Thrown]) -> None:
        for thrown in gone:
            self.files.unlink(thrown.path)
        for epoch in self.epochs():
            folder = self.root / str(epoch)
            if not self.files.listdir(folder):
                self.files.remove_tree(folder)

    def revive(self, digest: str) -> bool:
        """Bring a blob back, if it is there and the blob is not. Needs no lock: whoever relies on
        it looks again."""
        if not self.root.is_dir() or self.blobs.stamp(digest) is not None:
            return False
        path = self.blobs.path(digest)
        for epoch in reversed(self.epochs()):
            self.files.mkdir(path.parent)
            try:
                self.files.rename(self.root / str(epoch) / digest, path)
            except FileNotFoundError:
                continue
            self.blobs.settle([digest])
            return True
        return False

    def revive_all(self, digests: Collection[str]) -> list[str]:
        return [thrown.digest for thrown in self.contents() if thrown.digest in digests
                and self.revive(thrown.digest)]  # fmt: skip

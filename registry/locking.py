"""The lock of a registry, and whether the file system it lies on keeps it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterkit.registry.errors import AdapterError, AdapterWarning, ConflictError
from adapterkit.registry.files import Files

LOCK_SECONDS = 60.0
# On these, locks are kept on one machine only, or not at all, and SQLite's shared memory is not
# shared.
NETWORK = frozenset(
    ("9p", "afp", "afpfs", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "fuse.ceph")
    + ("fuse.gcsfuse", "fuse.glusterfs", "fuse.mergerfs", "fuse.moosefs", "fuse.rclone")
    + ("fuse.s3fs", "fuse.sshfs", "gfs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs")
    + ("nfs4", "ocfs2", "orangefs", "pvfs2", "smb2", "smb3", "smbfs", "vboxsf")
)


class Locking:
    """doubt: why the lock cannot be trusted; '' where it can. single_writer: the user says that no
    other process writes, so that no lock is needed."""

    def __init__(self, path: Path, files: Files, single_writer: bool) -> None:
        self.path, self.files, self.single_writer = path, files, single_writer
        kind = files.file_system(path)
        self.doubt = f"it lies on {kind}" if kind in NETWORK else ""
        self.probed = False
        self.warned = False

    @property
    def only_reading(self) -> bool:
        return bool(self.doubt) and not self.single_writer

    def warn(self) -> None:
        """Once."""
        if self.doubt and not self.warned:
            self.warned = True
            state = "without a lock" if self.single_writer else "read-only"
            warnings.warn(
                f"the registry {self.path} is opened {state}: {self.doubt}, whose locks cannot be"
                " trusted",
                AdapterWarning,
                stacklevel=4,
            )

    def check(self) -> None:
        """Raises AdapterError where nothing may be written."""
        if self.only_reading:
            raise AdapterError(
                f"the registry {self.path} is read-only: {self.doubt}, whose locks cannot be"
                " trusted, and two writers would lose each other's work",
                hint="keep it on a local disk and push to a shared folder; or, while no other"
                " process uses it, give --single-writer",
            )

    def probe(self) -> None:
        """Try a lock, once, in the folder that is there by now."""
        if not self.probed:
            self.probed = True
            if not self.files.locks_work(self.path / "tmp"):
                self.doubt = self.doubt or "it lies on a file system without working locks"
        self.warn()
        self.check()

    @contextmanager
    def hold(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        if self.doubt:
            self.check()
            yield
            return
        try:
            held = FileLock(self.path / "lock", timeout=LOCK_SECONDS)
            held.acquire()
        except Timeout as error:
            raise ConflictError(f"the registry {self.path} is locked by another process") from error
        try:
            yield
        finally:
            held.release()

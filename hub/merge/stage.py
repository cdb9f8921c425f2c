"""A merged folder in the making: beside its place, resumable, and there only when it is whole.

    .NAME.merge/plan.json      what is being made; a merge that goes on has to have the same
    .NAME.merge/journal        one line for each file that is finished, with its digest
    .NAME.merge/correction/    what each file adds to the correction, where there is one
    .NAME.merge/files/         what becomes NAME at the end, by one rename
"""

from __future__ import annotations

import errno
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapterkit.hub.merge.beside import FOLDER, is_kept
from adapterkit.hub.merge.fidelity import Correction, Fidelity
from adapterkit.hub.merge.shard import Written, digest_of
from adapterkit.registry.errors import AdapterError, ConflictError
from adapterkit.registry.files import Files, storage_errors, write_new


@dataclass(frozen=True)
class Done:
    """One file, and what became of the parameters in it. correction: the sha256 of what it adds to
    the correction, "" for nothing."""

    file: str
    written: Written
    parameters: tuple[Fidelity, ...]
    correction: str = ""


class Stage:
    def __init__(self, files: Files, target: Path) -> None:
        self.files, self.target = files, target
        self.root = target.parent / f".{target.name}.merge"
        self.folder = self.root / "files"
        self.done: dict[str, Done] = {}

    def begin(self, plan: Mapping[str, Any], *, resume: bool) -> None:
        text = json.dumps(plan, indent=1, sort_keys=True).encode()
        said = self.root / "plan.json"
        if resume and said.exists():
            if said.read_bytes() != text:
                raise ConflictError(
                    f"{self.root} holds another merge: its adapters, base, settings or version of"
                    " the tool differ",
                    hint=f"remove it and merge anew: rm -r {self.root}",
                )
            self.done = dict(self._finished())
            self._keep(self.done)
            return
        self.files.remove_tree(self.folder)
        self.files.unlink(self.root / "journal")
        self.files.make_folder(self.folder)
        write_new(self.files, said, text, self.root)

    def _keep(self, names: Collection[str]) -> None:
        for path in sorted(self.folder.iterdir()):
            if path.is_dir():
                self.files.remove_tree(path)
            elif path.name not in names:
                self.files.unlink(path)

    def _finished(self) -> Iterator[tuple[str, Done]]:
        """Files whose bytes are still those of the journal. A torn last line counts for nothing."""
        journal = self.root / "journal"
        for line in journal.read_bytes().splitlines() if journal.exists() else ():
            try:
                found = json.loads(line)
            except ValueError:
                return
            written = Written(
                found["size"], found["header"], found["digest"], tuple(found["names"])
            )
            done = Done(found["file"], written, tuple(map(_row, found["parameters"])),
                        found["correction"])  # fmt: skip
            if self._is_whole(done):
                yield done.file, done

    def _is_whole(self, done: Done) -> bool:
        path, factors = self.folder / done.file, self.correction(done.file)
        if done.correction and not is_kept(self.files, factors, done.correction):
            return False
        whole = (done.written.size, done.written.digest)
        return path.is_file() and digest_of(self.files, path) == whole

    def correction(self, file: str) -> Path:
        """Where the part of the correction lies that belongs to a file."""
        return self.root / FOLDER / file

    def finished(self, done: Done) -> None:
        """A file is on the disk: a merge that goes on will not make it again."""
        self.done[done.file] = done
        line = {
            "file": done.file,
            **asdict(done.written),
            "parameters": [asdict(row) for row in done.parameters],
            "correction": done.correction,
        }
        journal = self.root / "journal"
        with journal.open("ab", buffering=0) as file:
            self.files.write(file, json.dumps(line).encode() + b"\n")
            self.files.fsync(file)

    def publish(self) -> None:
        """All at once. Raises ConflictError if something came to lie there meanwhile."""
        self.files.fsync_folder(self.folder)
        try:
            self.files.rename(self.folder, self.target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise ConflictError(f"{self.target} was made by somebody else meanwhile") from error
            raise
        self.files.fsync_folder(self.target.parent)
        self.files.remove_tree(self.root)


def _row(record: Mapping[str, Any]) -> Fidelity:
    found = record["correction"]
    return Fidelity(**{**record, "correction": None if found is None else Correction.read(found)})


@contextmanager
def staged(files: Files, out: Path, plan: Mapping[str, Any], *, resume: bool) -> Iterator[Stage]:
    """A stage to fill, published at the end. What is wrong with the merge itself removes it; a
    full disk, an interruption or a kill leaves what is finished, for `resume`."""
    target = out.absolute()
    with storage_errors(f"the merged model cannot be written to {out}"):
        _require_free(target)
        stage = Stage(files, target)
        if stage.root.exists() and not resume:
            raise ConflictError(
                f"a merge into {out} was interrupted: {stage.root}",
                hint="go on with --resume, or remove that folder",
            )
        files.mkdir(stage.root)
        with _owned(files, stage.root):
            stage.begin(plan, resume=resume)
            try:
                yield stage
            except AdapterError:
                files.remove_tree(stage.root)
                raise
            stage.publish()


def _require_free(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConflictError(f"{target} is a file", hint="name a new folder")
    if target.is_dir() and any(target.iterdir()):
        raise ConflictError(f"{target} is not empty", hint="name a new or an empty folder")


@contextmanager
def _owned(files: Files, root: Path) -> Iterator[None]:
    """One merge at a time into a place."""
    held = files.open_partial(root / "lock")
    if held is None:
        raise ConflictError(f"another merge is writing {root}")
    with held:
        yield

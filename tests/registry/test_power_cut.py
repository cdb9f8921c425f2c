"""A power cut at every point: what was synced is there, of the rest any part may be.

The touches of the disk are recorded once. Each prefix of them is then laid out again as a disk
could have kept it: a seeded choice of the unsynced operations is left out, data and folder entries
apart, with a catalog of any earlier moment or none.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

import pytest

from adapterkit.registry import Meaning, Registry
from adapterkit.registry.files import Files
from adapterkit.registry.verify import verify

pytestmark = [
    pytest.mark.timeout(3000),  # the full figures take their time
    pytest.mark.filterwarnings("ignore:.*was yanked"),
]
NOW = timedelta(0)


@dataclass(frozen=True)
class Op:
    """domain: what a sync would have to be of: a file's number, or a folder."""

    kind: str
    domain: int | Path
    name: str = ""
    file: int | None = None  # None: a folder
    offset: int = 0
    data: bytes = b""


@dataclass
class Recorder(Files):
    """Does everything for real, and remembers it. acks: number of ops -> changes confirmed."""

    ops: list[Op] = field(default_factory=list)
    names: dict[Path, int] = field(default_factory=dict)
    numbers: dict[int, BinaryIO] = field(default_factory=dict)

    def _entry(self, kind: str, path: Path, file: int | None = None) -> None:
        self.ops.append(Op(kind, path.parent, path.name, file))

    def _opened(self, path: Path, file: BinaryIO) -> BinaryIO:
        if path not in self.names:
            self.names[path] = len(self.ops)
            self._entry("add", path, self.names[path])
        file.number = self.names[path]
        return file

    def create(self, path):
        return self._opened(path, Tracked(super().create(path)))

    def open_update(self, path):
        return self._opened(path, Tracked(super().open_update(path)))

    def open_partial(self, path):
        file = super().open_partial(path)
        return None if file is None else self._opened(path, Tracked(file))

    def open_owned(self, path):
        file = super().open_owned(path)
        return None if file is None else self._opened(path, Tracked(file.file))

    def write(self, file, data):
        self.ops.append(Op("write", file.number, offset=file.tell(), data=bytes(data)))
        super().write(file, data)

    def truncate(self, file, size):
        self.ops.append(Op("truncate", file.number, offset=size))
        super().truncate(file, size)

    def clone(self, source, target):
        return False

    def fsync(self, file):
        self.ops.append(Op("sync", file.number))

    def fsync_folder(self, path):
        self.ops.append(Op("sync", path))

    def rename(self, source, target):
        super().rename(source, target)
        self.names[target] = self.names.pop(source)
        self._entry("add", target, self.names[target])
        self._entry("remove", source)

    def unlink(self, path):
        if path in self.names:
            del self.names[path]
            self._entry("remove", path)
        super().unlink(path)

    def remove_tree(self, path):
        if path.exists():
            self._entry("remove", path)
        super().remove_tree(path)

    def mkdir(self, path):
        if not path.exists():
            self._entry("add", path)
        super().mkdir(path)


class Tracked:
    """An open file that knows its number; all else is the file's."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.number = file, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)

    def __enter__(self) -> Tracked:
        return self

    def __exit__(self, *given: object) -> None:
        self.file.close()


class Disk:
    """What is found after the power is back."""

    def __init__(self, root: Path) -> None:
        self.folders: dict[Path, dict[str, int | None]] = {root.parent: {root.name: None}}
        self.data: dict[int, bytearray] = {}

    def apply(self, op: Op, size: int | None = None) -> None:
        """size: of a write that was torn, how much of it was kept."""
        if op.kind == "add":
            self.folders.setdefault(op.domain, {})[op.name] = op.file
        elif op.kind == "remove":
            self.folders.setdefault(op.domain, {}).pop(op.name, None)
        else:
            data = self.data.setdefault(op.domain, bytearray())
            if op.kind == "truncate":
                del data[op.offset :]
            kept = op.data[:size]
            data.extend(bytes(max(0, op.offset + len(kept) - len(data))))
            data[op.offset : op.offset + len(kept)] = kept

    def lay_out(self, folder: Path, target: Path) -> None:
        target.mkdir()
        for name, file in self.folders.get(folder, {}).items():
            if file is None:
                self.lay_out(folder / name, target / name)
            else:
                (target / name).write_bytes(self.data.get(file, b""))


def unsynced(ops: list[Op]) -> list[int]:
    """Which of them no later sync covers."""
    synced: set[int | Path] = set()
    found = []
    for number in reversed(range(len(ops))):
        if ops[number].kind == "sync":
            synced.add(ops[number].domain)
        elif ops[number].domain not in synced:
            found.append(number)
    return found[::-1]


def choices(open_ops: list[int], wanted: int, chosen: random.Random) -> Iterator[set[int]]:
    """Subsets to leave out: all of them where they are few, else all, none and random ones."""
    if 2 ** len(open_ops) <= wanted:
        for mask in range(2 ** len(open_ops)):
            yield {op for place, op in enumerate(open_ops) if mask >> place & 1}
        return
    yield set()
    yield set(open_ops)
    for _ in range(wanted - 2):
        share = chosen.random()
        yield {op for op in open_ops if chosen.random() < share}


def cut(ops: list[Op], lost: set[int], chosen: random.Random, root: Path) -> Disk:
    disk = Disk(root)
    open_ops = set(unsynced(ops))
    for number, op in enumerate(ops):
        if op.kind == "sync" or number in lost:
            continue
        torn = op.kind == "write" and number in open_ops and chosen.random() < 0.3
        disk.apply(op, chosen.randrange(len(op.data) + 1) if torn else None)
    return disk


@dataclass
class Story:
    """acks: (ops so far, lines of the log, the catalog) after each confirmed change."""

    root: Path
    ops: list[Op]
    log: bytes
    acks: list[tuple[int, int, bytes]]

    def confirmed(self, n_ops: int) -> int:
        return max([lines for at, lines, _ in self.acks if at <= n_ops], default=0)

    def catalogs(self, n_ops: int) -> list[bytes | None]:
        return [None, *(data for at, _, data in self.acks if at <= n_ops)]


def tell(folder: Path) -> Story:
    """Changes of every kind, some on blobs that were thrown away before."""
    files, home = Recorder(), folder / "home"
    acks: list[tuple[int, int, bytes]] = []
    lora, metrics = Meaning({"kind": "LORA"}), {"metrics": b'{"loss":1}'}
    with Registry(home, files=files) as registry:
        changes: list[Callable[[], object]] = [
            lambda: registry.add("sql", {"w": b"one" * 9, "c": b"{}"}, lora, tags=["best"]),
            lambda: registry.tag("sql", "prod"),
            lambda: registry.add("sql", {"w": b"two" * 9, "c": b"{}"}, lora, attachments=metrics),
            lambda: registry.rm("sql@1.0"),
            lambda: registry.gc(NOW),
            lambda: registry.add("sql", {"w": b"one" * 9}, lora),
            lambda: registry.attach("sql", "note", b"hello"),
            lambda: registry.rm("sql@1.2"),
            lambda: registry.gc(NOW),
            lambda: registry.put_blob(b"one" * 9, blob_name(b"one" * 9)),
            lambda: registry.gc(NOW),
            lambda: registry.yank("sql@1.1", "bad"),
            lambda: registry.tag("sql@1.1", "safe"),
            lambda: registry.protect("sql:safe"),
            lambda: registry.mv("sql", "team/sql"),
        ]
        for change in changes:
            change()
            copy = sqlite3.connect(folder / "copy.db")
            registry.home.catalog.db.conn.backup(copy)
            copy.close()
            n_lines = (home / "log").read_bytes().count(b"\n")
            acks.append((len(files.ops), n_lines, (folder / "copy.db").read_bytes()))
    return Story(home, files.ops, (home / "log").read_bytes(), acks)


def blob_name(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def check(story: Story, n_ops: int, home: Path) -> None:
    """Every invariant of docs/store.md that can be seen from outside."""
    found = verify(home)
    assert found.damage == ()
    log = (home / "log").read_bytes() if (home / "FORMAT").exists() else b""
    assert found.n_records >= story.confirmed(n_ops)
    whole = log.splitlines(keepends=True)[: found.n_records]
    assert story.log.startswith(b"".join(whole))


def goes_on(home: Path, n_records: int) -> None:
    with Registry(home) as registry:
        for version in registry.list():
            registry.files(version.ref)
        registry.add("after", {"w": b"one" * 9}, Meaning({}))
        registry.gc(NOW)
        registry.files("after")
    found = verify(home)
    assert found.damage == () and found.n_records >= n_records + 1


def test_a_power_cut_at_any_point_loses_nothing_confirmed(shm, proof):
    story, chosen = tell(shm), random.Random(4)
    assert len(story.ops) > 150
    n_cuts = 0
    for n_ops in range(0, len(story.ops) + 1, proof(4, 1)):
        ops = story.ops[:n_ops]
        for lost in choices(unsynced(ops), proof(4, 64), chosen):
            home = shm / str(n_cuts) / "home"
            home.parent.mkdir()
            cut(ops, lost, chosen, story.root).lay_out(story.root, home)
            catalog = chosen.choice(story.catalogs(n_ops))
            if catalog is not None:
                (home / "catalog.db").write_bytes(catalog)
            check(story, n_ops, home)
            if n_cuts % 3 == 0:
                goes_on(home, story.confirmed(n_ops))
            n_cuts += 1
    assert n_cuts > 100


def test_the_disk_forgets_what_was_not_synced(tmp_path):
    """The test of the test: an add that syncs nothing does not survive."""
    story = tell(tmp_path)
    ops = [op for op in story.ops[: story.acks[0][0]] if op.kind != "sync"]
    cut(ops, set(unsynced(ops)), random.Random(1), story.root).lay_out(story.root, tmp_path / "x")
    assert verify(tmp_path / "x").n_records < story.confirmed(len(story.ops))
    assert list((tmp_path / "x").rglob("*")) == []

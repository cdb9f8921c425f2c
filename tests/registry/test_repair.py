"""verify --repair-from replaces what is damaged, whatever is asked of whoever lies, and no more."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterkit.hub import sync
from adapterkit.hub.remotes.folder import FolderRemote
from adapterkit.registry import AdapterError, AdapterWarning, Meaning, Registry
from adapterkit.registry.files import Files
from adapterkit.registry.repair import Repaired, repair
from adapterkit.registry.urls import parse_url
from adapterkit.registry.verify import verify

pytestmark = pytest.mark.timeout(3000)  # the full figures take their time
SKETCH = b"sketch of the base"


def remote(folder: Path) -> FolderRemote:
    return FolderRemote(parse_url(f"file://{folder}"))


def digest_of(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """home: team/sql 1.0 and tone 1.0 (removed), with everything that is a blob. far: a remote that
    has both, and had tone before it was removed."""
    folder = tmp_path_factory.mktemp("template")
    sketch = {"digest": f"sha256:{digest_of(SKETCH)}", "size": len(SKETCH)}
    meaning = Meaning({"kind": "LORA"}, base={"id": "org/base", "sketch": sketch}, extra=(SKETCH,))
    with Registry(folder / "home") as registry:
        registry.add(
            "team/sql", {"w.bin": b"weights" * 100, "README.md": b"A card"}, meaning,
            attachments={"note": b"a good one", "metrics": b'{"loss": 1.5}'},
            roles={"README.md": "card"},
        )  # fmt: skip
        registry.add("tone", {"w.bin": b"tone"}, Meaning({"kind": "LORA"}))
        far = remote(folder / "far")
        for name in ("team/sql", "tone"):
            sync.push(registry, sync.plan_push(registry, name, far), far)
        registry.rm("tone")
    return folder


@pytest.fixture
def place(template, shm) -> Path:
    return Path(shutil.copytree(template, shm / "place"))


def blobs(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in (folder / "blobs" / "sha256").glob("??/*")}


def content(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in blobs(folder).items()}


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def needed(home: Path) -> dict[str, Path]:
    """Of the blobs that are there, those that something needs: not tone's weights."""
    return {name: path for name, path in blobs(home).items() if name != digest_of(b"tone")}


def flip(path: Path) -> None:
    overwrite(path, bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


HARM: dict[str, Callable[[Path], None]] = {
    "changed": flip,
    "truncated": lambda path: overwrite(path, path.read_bytes()[:-1]),
    "longer": lambda path: overwrite(path, path.read_bytes() + b"x"),
    "emptied": lambda path: overwrite(path, b""),
    "missing": Path.unlink,
    "unreadable": lambda path: (path.unlink(), path.symlink_to("/etc/passwd")),
    "misnamed": lambda path: path.rename(path.with_name("x" + path.name[1:])),
    "misplaced": lambda path: path.rename(path.parent.parent / path.name),
}


def run(place: Path, *far: str, **options: object) -> Repaired:
    return repair(place / "home", [remote(place / name) for name in far or ("far",)], **options)


@pytest.mark.parametrize("harm", HARM)
def test_every_blob_whatever_happened_to_it_is_whole_again(place, harm):
    home = place / "home"
    whole = content(home)
    for path in needed(home).values():
        HARM[harm](path)
    done = run(place)
    assert done.health.damage == () and verify(home).damage == ()
    assert content(home) == whole
    assert {mend.digest for mend in done.mends} == set(needed(home)) and len(done.mends) == 7
    local = harm in ("misnamed", "misplaced")
    assert {m.source for m in done.mends} == {
        "a file under a wrong name" if local else f"file://{place}/far"
    } | ({"the catalog"} & {m.source for m in done.mends})
    assert all(path.stat().st_mode & 0o777 == 0o444 for path in needed(home).values())


def test_what_only_the_lost_manifest_knew_of_is_repaired_too(place):
    """Without a catalog nobody knows what a version needs, until its manifest is back."""
    home = place / "home"
    (home / "catalog.db").unlink()
    for path in needed(home).values():
        path.unlink()
    done = run(place)
    assert done.health.damage == () and len(done.mends) == 7
    with Registry(home) as registry:
        assert registry.files("team/sql")["w.bin"].read_bytes() == b"weights" * 100
        assert registry.metrics("team/sql") == {"loss": 1.5}


def test_a_catalog_made_while_blobs_were_lost_is_made_anew(place):
    home = place / "home"
    for path in needed(home).values():
        path.unlink()
    with Registry(home) as registry:
        registry.rebuild()
        assert registry.resolve("team/sql").damaged
    assert run(place).health.damage == ()
    with Registry(home) as registry:
        assert [v.name for v in registry.search("good")] == ["team/sql"]
        assert [v.name for v in registry.search("card")] == ["team/sql"]
        assert not registry.resolve("team/sql").damaged


@pytest.mark.parametrize("rebuild", [True, False])
@pytest.mark.parametrize("sound", [True, False], ids=["wrong rows", "garbage"])
def test_with_a_damaged_catalog_too_both_are_repaired(place, sound, rebuild):
    home = place / "home"
    weights = blobs(home)[digest_of(b"weights" * 100)]
    overwrite(weights, b"rotten")
    if sound:
        with Registry(home) as registry:
            registry.home.catalog.db.execute("UPDATE versions SET version = '9'")
    else:
        (home / "catalog.db").write_bytes(b"garbage" * 1000)
    assert "catalog" in {p.what for p in verify(home).damage}
    assert run(place, rebuild=rebuild).health.damage == ()
    assert content(home)[weights.name] == b"weights" * 100


def test_a_sound_registry_is_left_as_it_is(place):
    def snapshot() -> dict[str, tuple[int, int, int]]:
        paths = [p for p in (place / "home").rglob("*") if "catalog.db-" not in p.name]
        found = {str(p): p.stat() for p in paths if p != place / "home"}
        return {name: (s.st_ino, s.st_mtime_ns, s.st_size) for name, s in found.items()}

    before = snapshot()
    assert run(place).mends == ()
    assert snapshot() == before


def test_good_blobs_are_never_touched(place):
    home = place / "home"
    path = needed(home).pop(digest_of(SKETCH))
    overwrite(path, b"rotten")
    before = {name: p.stat() for name, p in blobs(home).items() if name != path.name}
    assert [mend.digest for mend in run(place).mends] == [path.name]
    for name, status in before.items():
        assert (blobs(home)[name].stat().st_ino, blobs(home)[name].stat().st_mtime_ns) == (
            status.st_ino, status.st_mtime_ns
        )  # fmt: skip


LIES: dict[str, Callable[[Path], None]] = {
    "wrong": flip,
    "truncated": lambda path: overwrite(path, path.read_bytes()[:-1]),
    "longer": lambda path: overwrite(path, path.read_bytes() + b"x"),
    "huge": lambda path: (path.chmod(0o644), os.truncate(path, 1 << 40)),  # sparse
    "lacking": Path.unlink,
    "a link": lambda path: (path.rename(path.parents[2] / "aside"), path.symlink_to("../../aside")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_remote_that_lies_changes_nothing_and_is_named(place, lie):
    home = place / "home"
    for path in needed(home).values():
        flip(path)
    (home / "catalog.db").unlink()  # it would know the manifests
    for path in blobs(place / "far").values():
        LIES[lie](path)
    before = content(home)
    done = run(place)
    assert content(home) == before and list((home / "tmp").iterdir()) == []
    assert {p.what for p in done.health.damage} == {"changed"}
    assert done.mends and not any(mend.source for mend in done.mends)
    said = "lacks" if lie in ("lacking", "a link", "a pipe") else "arrived with"
    for mend in done.mends:
        assert f"{place}/far" in mend.reasons[-1] and said in mend.reasons[-1]


def test_the_first_remote_that_has_good_bytes_is_used(place):
    home = place / "home"
    flip(blobs(home)[digest_of(SKETCH)])
    shutil.copytree(place / "far", place / "bad")
    flip(blobs(place / "bad")[digest_of(SKETCH)])
    (mend,) = run(place, "nowhere", "bad", "far").mends
    assert mend.source == f"file://{place}/far"
    assert mend.affects == ("team/sql@1.0: sketch of the base",)


def test_nobody_who_has_it_is_a_reason_each(place):
    home = place / "home"
    blobs(home)[digest_of(SKETCH)].unlink()
    blobs(place / "far")[digest_of(SKETCH)].unlink()
    done = run(place, "nowhere", "far")
    (mend,) = done.mends
    assert ["no such folder" in mend.reasons[0], "lacks" in mend.reasons[1]] == [True, True]
    assert [p.what for p in done.health.damage] == ["missing"]


def test_what_lies_in_the_trash_comes_back_without_a_remote(place):
    home = place / "home"
    with Registry(home) as registry:
        registry.home.trash.throw(1, [digest_of(SKETCH)])
        done = registry.repair([])
    assert [mend.source for mend in done.mends] == ["the trash"] and done.health.damage == ()


def test_a_damaged_log_keeps_its_catalog_and_its_blobs_are_repaired_all_the_same(place):
    home = place / "home"
    flip(blobs(home)[digest_of(SKETCH)])
    log = (home / "log").read_bytes()
    (home / "log").write_bytes(log.replace(b"tone", b"tune", 1))
    before = (home / "catalog.db").read_bytes()
    done = run(place, rebuild=True)
    assert {p.what for p in done.health.damage} == {"log"}
    assert [m.source for m in done.mends] == [f"file://{place}/far"]
    assert (home / "catalog.db").read_bytes() == before
    (home / "log").write_bytes(log)
    assert verify(home).damage == ()


def harmed(place: Path) -> dict[str, bytes]:
    """One of each harm, and no catalog; the blobs that are good all the same."""
    home = place / "home"
    (home / "catalog.db").unlink()
    for harm, path in zip(HARM.values(), sorted(needed(home).values()), strict=False):
        harm(path)
    return {name: data for name, data in content(home).items() if digest_of(data) == name}


@pytest.fixture
def case(place, faults, shm):
    """How many touches a repair takes, the good blobs before it, all after it, and a fresh copy
    per number."""
    whole = content(place / "home")
    good = harmed(place)

    def copy(number: int) -> Path:
        return Path(shutil.copytree(place, shm / str(number), symlinks=True))

    counted, folder = faults.Everything(), copy(0)
    with counted.installed():
        assert run(folder, files=counted).health.damage == ()
    return len(counted.names), good, whole, copy


def points(total: int, wanted: int) -> list[int]:
    return sorted({*range(1, total + 1, max(1, total // wanted)), total})


def test_killed_at_any_touch_it_has_harmed_nothing_and_can_be_repeated(case, faults, proof):
    total, good, whole, copy = case
    for last in points(total, proof(20, 10_000)):
        folder, files = copy(last), faults.DyingEverywhere(last)

        def work(folder: Path = folder, files: Files = files) -> None:
            with files.installed():
                run(folder, files=files)

        assert not faults.in_child(work)
        assert content(folder / "home").items() >= good.items()
        assert run(folder).health.damage == () and content(folder / "home") == whole, last
        shutil.rmtree(folder)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EPERM])
def test_failing_at_any_touch_it_says_so_and_can_be_repeated(case, code, faults, proof):
    total, good, whole, copy = case
    for last in points(total, proof(12, 10_000)):
        folder, files = copy(last), faults.failing(last, code)
        with files.installed(), warnings.catch_warnings():
            warnings.simplefilter("ignore", AdapterWarning)
            try:
                told = run(folder, files=files).health.damage
            except AdapterError:
                told = ("raised",)
        assert told or content(folder / "home") == whole, last
        assert content(folder / "home").items() >= good.items()
        assert run(folder).health.damage == () and content(folder / "home") == whole, last
        shutil.rmtree(folder)

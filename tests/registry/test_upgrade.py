"""Registries of every released format are read, and brought to the newest one.

    python tests/registry/test_upgrade.py

writes tests/data/stores/<number>, when a new format is released; one that is there never changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from adapterkit.registry import (
    AdapterError,
    ConflictError,
    DamagedError,
    Meaning,
    NotFoundError,
    Registry,
    layout,
)
from adapterkit.registry import upgrade as upgrading
from adapterkit.registry.apply import CHANGES
from adapterkit.registry.log import Log, Place
from adapterkit.registry.upgrade import upgrade

STORES = Path(__file__).parents[1] / "data/stores"


def answers(registry):
    """As JSON, what a registry answers."""
    versions = registry.list()
    names = sorted({version.name for version in versions})
    return {
        "versions": [
            [str(v.ref), v.id, v.created, v.author, list(v.tags), v.size, v.yanked, v.facts.kind]
            for v in versions
        ],
        "files": {
            str(v.ref): {path: blob.read_text() for path, blob in registry.files(v.ref).items()}
            for v in versions
            if v.yanked is None
        },
        "metrics": {str(v.ref): registry.metrics(v.ref) for v in versions},
        "moves": {
            name: [[m.tag, m.before, m.after, m.undoes, m.time] for m in registry.moves(name)]
            for name in names
        },
        "parents": {str(v.ref): [e.parent for e in registry.parents(v.id)] for v in versions},
        "events": {name: [e.kind for e in registry.history(name)] for name in names},
        "search": [str(v.ref) for v in registry.search("politely")],
        "redirect": str(registry.resolve("sql:best").ref),
    }


def fill(registry):
    """A record of every kind."""
    sketch = b"sketch"
    base = {"id": "org/base"}
    base["sketch"] = {"digest": f"sha256:{hashlib.sha256(sketch).hexdigest()}", "size": 6}
    lora = Meaning({"kind": "lora", "rank": 8, "target_modules": ["q_proj"]}, base, extra=(sketch,))
    card = {"w.txt": b"first", "README.md": b"answers politely"}
    one = registry.add(
        "sql", card, lora, tags=["best"], attachments={"metrics": b'{"loss":0.5}'},
        roles={"README.md": "card"},
    )  # fmt: skip
    parents = ({"version": f"sha256:{one.id}", "relation": "finetuned-from"},)
    registry.add("sql", {"w.txt": b"second"}, Meaning({}, parents=parents), version="2.0rc1")
    registry.attach("sql", "note", b"thanks")
    registry.tag("sql@2.0rc1", "best"), registry.undo("sql:best"), registry.protect("sql:best")
    registry.tag("sql@1.0", "old"), registry.untag("sql:old")
    registry.yank("sql@2.0rc1", "bad")
    registry.add("gone", {"w.txt": b"gone"}, Meaning({})), registry.rm("gone")
    registry.mv("sql", "team/sql")
    registry.gc(timedelta(0))


@pytest.fixture(params=sorted(p.name for p in STORES.iterdir() if p.is_dir()))
def store(request, tmp_path):
    shutil.copytree(STORES / request.param, tmp_path / "home")
    (tmp_path / "home/tmp").mkdir(exist_ok=True)  # git keeps no empty folder
    return tmp_path / "home"


def test_a_registry_of_every_format_answers_as_it_did(store):
    expected = json.loads((store / "answers.json").read_text())
    (store / "answers.json").unlink()
    upgrade(store)
    with Registry(store) as registry:
        assert json.loads(json.dumps(answers(registry))) == expected
        registry.add("new", {"w": b"x"}, Meaning({}))
        with pytest.raises(ConflictError):
            registry.add("sql", {"w": b"other"}, Meaning({}), version="1.0")
    assert upgrade(store) == (layout.FORMAT, layout.FORMAT)


def test_there_is_one_of_this_format_with_every_kind_of_record():
    log = Log(STORES / str(layout.FORMAT) / "log", layout.Files())
    assert {record.kind for record, _ in log.read(Place())} == set(CHANGES)


@pytest.fixture
def older(store, monkeypatch):
    """As if this program had the next format already."""

    def step(home, files):
        (home / "log").write_bytes((home / "log").read_bytes() + b"new\n")

    monkeypatch.setattr(layout, "FORMAT", layout.FORMAT + 1)
    monkeypatch.setattr(upgrading, "STEPS", {layout.FORMAT - 1: step})
    return store


def test_an_older_registry_is_refused_with_the_command_that_helps(older):
    with pytest.raises(AdapterError, match="older") as caught:
        Registry(older)
    assert caught.value.hint == "adapter upgrade"


def test_an_upgrade_keeps_what_it_changes(older):
    log = (older / "log").read_bytes()
    assert upgrade(older) == (layout.FORMAT - 1, layout.FORMAT)
    assert (older / "log").read_bytes() == log + b"new\n"
    kept = older / f"before-{layout.FORMAT - 1}"
    assert (kept / "log").read_bytes() == log
    assert (kept / "FORMAT").read_text() == f"adapterkit-store {layout.FORMAT - 1}\n"
    assert layout.number(older, layout.Files()) == layout.FORMAT


def test_an_upgrade_that_was_interrupted_can_be_repeated(older, monkeypatch):
    log = (older / "log").read_bytes()

    def stop(home, files):
        (home / "log").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    good = upgrading.STEPS
    monkeypatch.setattr(upgrading, "STEPS", {layout.FORMAT - 1: stop})
    with pytest.raises(AdapterError, match="No space left"):
        upgrade(older)
    assert layout.number(older, layout.Files()) == layout.FORMAT - 1
    assert (older / f"before-{layout.FORMAT - 1}/log").read_bytes() == log
    monkeypatch.setattr(upgrading, "STEPS", good)
    upgrade(older)
    assert (older / f"before-{layout.FORMAT - 1}/log").read_bytes() == log


def test_a_newer_registry_is_refused_and_nothing_is_changed(store):
    (store / "FORMAT").write_text(f"adapterkit-store {layout.FORMAT + 1}\n")
    with pytest.raises(AdapterError, match="newer") as caught:
        upgrade(store)
    assert "pip install" in caught.value.hint
    assert (store / "FORMAT").read_text() == f"adapterkit-store {layout.FORMAT + 1}\n"


def test_where_there_is_none_nothing_is_made(tmp_path):
    with pytest.raises(NotFoundError):
        upgrade(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_format_that_never_was_is_damage(store):
    (store / "FORMAT").write_text("adapterkit-store 0\n")
    with pytest.raises(DamagedError, match="never was"):
        upgrade(store)


if __name__ == "__main__":
    os.environ["ADAPTERKIT_AUTHOR"] = "you@laptop"
    folder = STORES / str(layout.FORMAT)
    if folder.exists():
        sys.exit(f"{folder} is there, and a format that was released never changes")
    with Registry(folder) as made:
        fill(made)
        found = answers(made)
    for extra in [*folder.glob("catalog.db*"), folder / "lock"]:
        extra.unlink(missing_ok=True)
    for empty in ("tmp", "leases", "trash"):
        shutil.rmtree(folder / empty, ignore_errors=True)
    (folder / "answers.json").write_text(json.dumps(found, indent=1) + "\n")

"""Remotes that lie: nothing of it is recorded, and nothing outside is touched."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from adapterkit.hub import sync
from adapterkit.registry.errors import AdapterError, DamagedError
from adapterkit.registry.strictjson import canonical, digest_of


@pytest.fixture
def pushed(here, remote, tmp_path):
    """The remote's folder, with team/sql 1.0 in it."""
    sync.push(here, sync.plan_push(here, "team/sql@1.0", remote), remote)
    return tmp_path / "remote"


def blob_of(folder: Path, digest: str) -> Path:
    return folder / "blobs" / "sha256" / digest[:2] / digest


def weights(here, folder: Path) -> Path:
    """The remote's blob of w.bin."""
    manifest = here.manifest("team/sql@1.0")
    return blob_of(folder, next(f.digest for f in manifest.files if f.path == "w.bin"))


def replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def refused(there, remote, ref: str = "team/sql@1.0", error: type[AdapterError] = DamagedError):
    with pytest.raises(error) as caught:
        sync.pull(there, sync.plan_pull(there, remote, ref), remote)
    assert there.list() == []
    return str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"wrongs!" * 1000, b"weights" * 999, b"weights" * 1001, b""],
    ids=["wrong", "truncated", "longer", "empty"],
)
def test_a_blob_with_other_bytes(here, there, remote, pushed, tmp_path, data):
    path = weights(here, pushed)
    replace(path, data)
    assert path.name[:12] in refused(there, remote) or "bytes" in refused(there, remote)
    assert list((tmp_path / "there" / "tmp").iterdir()) == []


def test_a_blob_that_is_a_link(here, there, remote, pushed, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"weights" * 1000)
    path = weights(here, pushed)
    path.unlink()
    path.symlink_to(secret)
    assert "lacks" in refused(there, remote)


def test_a_blob_that_never_answers(here, there, remote, pushed):
    path = weights(here, pushed)
    path.unlink()
    os.mkfifo(path)
    assert "lacks" in refused(there, remote)


def test_a_missing_blob(here, there, remote, pushed):
    weights(here, pushed).unlink()
    assert "lacks" in refused(there, remote)


def with_manifest(here, folder: Path, change: dict, *, file: dict | None = None) -> None:
    """Let the remote's version be another manifest, of a digest that fits."""
    value = json.loads(here.manifest("team/sql@1.0").dump()) | change
    if file is not None:
        value["files"][0] |= file
    data = canonical(value)
    path = blob_of(folder, digest_of(data))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    entry = {"id": digest_of(data), "name": "team/sql", "version": "1.0"}
    shutil.rmtree(folder / "refs" / "team" / "sql" / "tags")
    version = folder / "refs" / "team" / "sql" / "versions" / "1" / "version.json"
    version.write_bytes(canonical(entry))


@pytest.mark.parametrize(
    ("change", "file", "said"),
    [
        ({}, {"path": "../../evil"}, "../../evil"),
        ({}, {"path": "/etc/evil"}, "absolute"),
        ({}, {"path": "a\\..\\evil"}, "backslash"),
        ({}, {"digest": "sha256:../../../../etc/passwd"}, "digest"),
        ({}, {"size": 10**15}, "bytes"),
        ({}, {"size": 1}, "bytes"),
        ({"schema": "adapter-manifest/9"}, None, "schema"),
        ({"evil": 1}, None, "evil"),
        ({"base": {"sketch": {"digest": "sha256:" + "0" * 64, "size": 1}}}, None, "lacks"),
    ],
    ids=ascii,
)
def test_a_manifest_that_is_hostile(here, there, remote, pushed, tmp_path, change, file, said):
    with_manifest(here, pushed, change, file=file)
    assert said in refused(there, remote)
    assert not (tmp_path.parent / "evil").exists()


def test_a_wrong_size_is_found_even_when_the_blob_is_here_already(here, there, remote, pushed):
    sync.pull(there, sync.plan_pull(there, remote, "team/sql", "first"), remote)
    with_manifest(here, pushed, {}, file={"size": 1})
    with pytest.raises(DamagedError, match="lacks"):
        sync.pull(there, sync.plan_pull(there, remote, "team/sql"), remote)
    assert [str(v.ref) for v in there.list()] == ["first@1.0"]


def test_a_manifest_of_another_digest(here, there, remote, pushed):
    path = blob_of(pushed, here.resolve("team/sql@1.0").id)
    replace(path, path.read_bytes().replace(b"LORA", b"DORA"))
    assert "digest" in refused(there, remote)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"id":"../../x","name":"team/sql","version":"1.0"}',
        b'{"id":5,"name":"team/sql","version":"1.0"}',
        b'{"id":"%s","name":"team/sql","version":5}' % (b"0" * 64),
        b'{"id":"%s","name":"team/sql","version":"2.0"}' % (b"0" * 64),
        b'{"id":"%s","name":"other/name","version":"1.0"}' % (b"0" * 64),
        b'{"id":"%s","name":"team/sql","version":"../1"}' % (b"0" * 64),
        b"[" * 10**5,
        b" " * (1 << 17),
    ],
    ids=lambda data: ascii(data[:40]),
)
def test_a_version_file_that_is_malformed(there, remote, pushed, data):
    path = pushed / "refs" / "team" / "sql" / "versions" / "1" / "version.json"
    path.write_bytes(data)
    assert "version.json" in refused(there, remote)


def test_a_version_file_that_is_a_link(there, remote, pushed):
    path = pushed / "refs" / "team" / "sql" / "versions" / "1" / "version.json"
    path.rename(pushed / "refs" / "aside.json")
    path.symlink_to(pushed / "refs" / "aside.json")
    assert "not a small file" in refused(there, remote)


@pytest.mark.parametrize(
    "change",
    [{"tag": "latest2"}, {"tag": "1.0"}, {"version": "7.0"}, {"id": "0" * 64}, {"name": "x/y"}],
    ids=ascii,
)
def test_a_tag_that_lies(there, remote, pushed, change):
    path = pushed / "refs" / "team" / "sql" / "tags" / "best.json"
    path.write_bytes(canonical(json.loads(path.read_bytes()) | change))
    refused(there, remote, "team/sql:best")


@pytest.mark.parametrize(
    "change",
    [
        {"subject": "0" * 64},
        {"created": "\x1b[31m"},
        {"attachment": {"kind": "../x", "name": "", "digest": "0" * 64, "size": 1}},
        {"attachment": {"kind": "note", "name": "\n", "digest": "0" * 64, "size": 1}},
        {"attachment": {"kind": "note", "name": "", "digest": "x", "size": 1}},
        {"attachment": {"kind": "note", "name": "", "digest": "0" * 64, "size": -1}},
        {"attachment": 5},
    ],
    ids=ascii,
)
def test_an_attachment_that_lies(there, remote, pushed, change):
    (path,) = (pushed / "attachments").rglob("*.json")
    path.write_bytes(canonical(json.loads(path.read_bytes()) | change))
    refused(there, remote)


YANK = {"yanked": True, "reason": "bad", "since": "2026-01-01T00:00:00.000000Z"}


@pytest.mark.parametrize(
    "change",
    [
        {"yanked": 1},
        {"reason": "\x1b[31m"},
        {"reason": "x" * 5000},
        {"reason": None},
        {"since": "soon"},
        {"since": "2026-01-01T00:00:00Z" + "0" * 99},
        {"version": "2.0"},
        {"id": "0" * 64},
    ],
    ids=ascii,
)
def test_a_yank_that_is_none(here, there, remote, pushed, change):
    path = pushed / "refs" / "team" / "sql" / "versions" / "1" / "yank.json"
    version = json.loads((path.parent / "version.json").read_bytes())
    path.write_bytes(canonical(version | YANK))
    assert sync.plan_pull(there, remote, "team/sql@1.0").yank.reason == "bad"
    path.write_bytes(canonical(version | YANK | change))
    assert "yank.json" in refused(there, remote)


def test_a_yank_of_the_future_does_not_hold_for_ever(here, there, remote, pushed):
    path = pushed / "refs" / "team" / "sql" / "versions" / "1" / "yank.json"
    version = json.loads((path.parent / "version.json").read_bytes())
    path.write_bytes(canonical(version | YANK | {"since": "9999-01-01T00:00:00.000000Z"}))
    sync.pull(there, sync.plan_pull(there, remote, "team/sql@1.0"), remote)
    assert there.resolve("team/sql@1.0").yanked == "bad"
    there.unyank("team/sql@1.0")
    assert sync.plan_pull(there, remote, "team/sql@1.0").yank is None
    sync.push(there, sync.plan_push(there, "team/sql@1.0", remote), remote)
    assert json.loads(path.read_bytes())["yanked"] is False


@pytest.mark.parametrize(
    "value",
    [
        {"name": "team/sql", "target": "../../etc"},
        {"name": "team/sql", "target": 5},
        {"name": "other/x", "target": "team/new"},
        {"name": "team/sql"},
    ],
    ids=ascii,
)
def test_a_name_that_leads_nowhere_good(there, remote, pushed, value):
    (pushed / "refs" / "team" / "sql" / "moved.json").write_bytes(canonical(value))
    assert "moved.json" in refused(there, remote)


def test_a_name_that_leads_in_a_circle_is_itself(there, remote, pushed):
    (pushed / "refs" / "team" / "loop").mkdir()
    for name, target in (("sql", "team/loop"), ("loop", "team/sql")):
        path = pushed / "refs" / "team" / name / "moved.json"
        path.write_bytes(canonical({"name": f"team/{name}", "target": target}))
    sync.pull(there, sync.plan_pull(there, remote, "team/sql@1.0"), remote)
    assert [str(v.ref) for v in there.list()] == ["team/sql@1.0"]


def test_metrics_that_are_none(there, remote, pushed):
    (path,) = (pushed / "attachments").rglob("*.json")
    value = json.loads(path.read_bytes())
    data = b'{"loss":"<script>"}'
    value["attachment"] |= {"digest": digest_of(data), "size": len(data)}
    path.write_bytes(canonical(value))
    blob = blob_of(pushed, digest_of(data))
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(data)
    assert "metric" in refused(there, remote)


def test_names_that_are_none_are_not_listed(remote, pushed):
    (pushed / "refs" / "team" / "..x").mkdir()
    (pushed / "refs" / "-bad" / "name").mkdir(parents=True)
    assert remote.names() == ["team/sql"]


def test_a_rotten_blob_of_the_remote_is_replaced_when_its_size_shows_it(
    here, there, remote, pushed
):
    replace(weights(here, pushed), b"short")
    plan = sync.plan_push(here, "team/sql@1.0", remote)
    assert [piece.name for piece in plan.missing] == ["w.bin"]
    sync.push(here, plan, remote)
    sync.pull(there, sync.plan_pull(there, remote, "team/sql@1.0"), remote)
    assert there.files("team/sql")["w.bin"].read_bytes() == b"weights" * 1000

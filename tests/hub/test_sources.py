"""Folders of strangers: what is followed, what is refused, and that nothing odd is opened."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from adapterkit.hub.sources import FileSource, open_folder, read_object
from adapterkit.registry.errors import DamagedError, NotFoundError
from adapterkit.registry.strictjson import MAX_SIZE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "adapter"
    (found / "sub" / "deeper").mkdir(parents=True)
    (found / "a.txt").write_text("a")
    (found / "sub" / "deeper" / "b.txt").write_text("bb")
    return found


def test_files_are_found_by_relative_path_with_their_sizes(folder: Path) -> None:
    found = open_folder(folder)
    assert {path: s.size for path, s in found.files.items()} == {"a.txt": 1, "sub/deeper/b.txt": 2}
    assert found.file("a.txt").read(0, 1) == b"a"


def test_a_file_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(NotFoundError, match="has no c.txt"):
        open_folder(folder).file("c.txt")


@pytest.mark.parametrize(
    "target", ["../outside", "/etc/passwd", "nothing", "link", "a.txt", "/", "sub", "../adapter"]
)
def test_a_link_in_a_folder_is_refused_wherever_it_leads(folder: Path, target: str) -> None:
    (folder.parent / "outside").write_text("secret")
    (folder / "link").symlink_to(target)
    with pytest.raises(DamagedError, match=r"symbolic link.*link -> ") as caught:
        open_folder(folder)
    assert "secret" not in str(caught.value) and caught.value.hint


def test_all_links_are_named_at_once_and_far_down(folder: Path) -> None:
    for name in ("x", "sub/y", "sub/deeper/z"):
        (folder / name).symlink_to("gone")
    with pytest.raises(DamagedError) as caught:
        open_folder(folder)
    assert all(f"{name} -> gone" in str(caught.value) for name in ("x", "sub/y", "sub/deeper/z"))


def test_a_message_about_thousands_of_links_stays_short(folder: Path) -> None:
    for number in range(2000):
        (folder / f"link{number}\x1b").symlink_to("x" * 200)
    with pytest.raises(DamagedError) as caught:
        open_folder(folder)
    assert len(str(caught.value)) < 5000 and "\x1b" not in str(caught.value)


def test_a_folder_may_itself_be_reached_through_a_link(folder: Path) -> None:
    (folder.parent / "alias").symlink_to("adapter")
    assert "a.txt" in open_folder(folder.parent / "alias").files


def cached(home: Path) -> Path:
    """A snapshot as huggingface_hub keeps it: links into the blobs of the repository."""
    snapshot = home / "models--acme--sql" / "snapshots" / ("c" * 40)
    (snapshot / "sub").mkdir(parents=True)
    (home / "models--acme--sql" / "blobs").mkdir()
    (home / "models--acme--sql" / "blobs" / "1234").write_text("{}")
    (snapshot / "adapter_config.json").symlink_to("../../blobs/1234")
    (snapshot / "sub" / "x.json").symlink_to("../../../blobs/1234")
    return snapshot


def test_a_snapshot_of_the_hub_cache_is_followed_into_its_own_blobs(tmp_path: Path) -> None:
    found = open_folder(cached(tmp_path))
    assert set(found.files) == {"adapter_config.json", "sub/x.json"}
    assert found.file("sub/x.json").read(0, 2) == b"{}"


@pytest.mark.parametrize(
    "target",
    [
        "../../../outside", "../../blobs/gone", "../../refs/main", "../../../models--b/blobs/1",
        "../../blobs/chained", "../../blobs/sub/1", "../../blobs",
    ],
)  # fmt: skip
def test_a_snapshot_is_not_followed_anywhere_else(tmp_path: Path, target: str) -> None:
    snapshot = cached(tmp_path)
    repository = snapshot.parent.parent
    for name in ("outside", "models--b/blobs/1", "models--acme--sql/refs/main"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("secret")
    (repository / "blobs" / "sub").mkdir()
    (repository / "blobs" / "sub" / "1").write_text("secret")
    (repository / "blobs" / "chained").symlink_to("../../outside")
    (snapshot / "evil").symlink_to(target)
    with pytest.raises(DamagedError, match="evil -> "):
        open_folder(snapshot)


def test_links_that_look_like_a_cache_are_refused_elsewhere(folder: Path) -> None:
    (folder.parent / "blobs").mkdir()
    (folder.parent / "blobs" / "1").write_text("x")
    (folder / "link").symlink_to("../blobs/1")
    with pytest.raises(DamagedError, match="symbolic link"):
        open_folder(folder)


def test_a_pipe_is_refused_without_waiting_for_it(folder: Path) -> None:
    os.mkfifo(folder / "training_args.bin")
    with pytest.raises(DamagedError, match="training_args.bin is not a file"):
        open_folder(folder)


def test_a_socket_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        with pytest.raises(DamagedError, match="not a file"):
            open_folder(folder)


def test_a_device_is_not_a_file() -> None:
    with pytest.raises(DamagedError, match="not a file"):
        FileSource.open(Path("/dev/zero"))


def test_a_folder_is_not_a_file(folder: Path) -> None:
    with pytest.raises(DamagedError, match="is a directory"):
        FileSource.open(folder)


@pytest.mark.parametrize("name", ["nothing", "n" * 5000, "a\0b", "loop"])
def test_what_is_not_there_is_not_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(NotFoundError) as caught:
        open_folder(tmp_path / name)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["adapter.zip", "adapter.tar.gz", "adapter_model.safetensors"])
def test_a_file_in_place_of_a_folder_is_refused_unopened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)  # opening it would wait for ever
    with pytest.raises(DamagedError, match=r"archives are not opened.*size.*path") as caught:
        open_folder(tmp_path / name)
    assert caught.value.hint == "unpack it and give the folder"


def test_a_file_that_shrinks_after_it_was_found_is_damage(folder: Path) -> None:
    source = FileSource.open(folder / "a.txt")
    (folder / "a.txt").write_text("")
    with pytest.raises(DamagedError, match="truncated: expected 1 bytes at 0, found 0"):
        source.read(0, 1)


def test_a_file_that_vanishes_after_it_was_found_is_damage(folder: Path) -> None:
    source = FileSource.open(folder / "a.txt")
    (folder / "a.txt").unlink()
    with pytest.raises(DamagedError, match="a.txt cannot be read: No such file"):
        source.read(0, 1)


def test_a_range_is_read_exactly(folder: Path) -> None:
    (folder / "c").write_bytes(bytes(range(100)))
    source = FileSource.open(folder / "c")
    assert source.read(10, 5) == bytes(range(10, 15))
    assert source.read(100, 0) == b""
    with pytest.raises(DamagedError, match="expected 2 bytes at 99, found 1"):
        source.read(99, 2)


def test_a_huge_json_file_is_refused_before_it_is_read(folder: Path) -> None:
    with (folder / "huge.json").open("wb") as file:
        file.truncate(MAX_SIZE + 1)
    source = FileSource.open(folder / "huge.json")
    (folder / "huge.json").unlink()  # a read would say that it cannot be read
    with pytest.raises(DamagedError, match="more than the 67108864 allowed"):
        read_object(source, "huge.json")


def test_file_names_that_are_not_text_are_found(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.txt")).write_text("x")
    assert len(open_folder(folder).files) == 3

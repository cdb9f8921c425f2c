from __future__ import annotations

import hashlib
import io
import os
import stat

import pytest

from adapterkit.registry.blobs import Blobs
from adapterkit.registry.errors import DamagedError, InvalidError
from adapterkit.registry.files import Files

DATA = b"abc"
DIGEST = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def blobs(tmp_path):
    made = Blobs(tmp_path / "blobs", tmp_path / "tmp", Files())
    made.create()
    return made


def test_a_blob_lies_under_its_digest_and_is_read_only(blobs, tmp_path):
    assert blobs.put(DATA).digest == DIGEST
    path = tmp_path / "blobs" / "sha256" / "ba" / DIGEST
    assert path.read_bytes() == DATA
    assert stat.S_IMODE(path.stat().st_mode) == 0o444


def test_bytes_streams_and_files_give_the_same_blob(blobs, tmp_path):
    big = os.urandom((1 << 20) + 7)
    source = tmp_path / "source"
    source.write_bytes(big)
    one = blobs.put(source)
    assert one.digest == hashlib.sha256(big).hexdigest() and one.size == len(big) and one.new
    assert not blobs.put(big).new
    assert not blobs.put(io.BytesIO(big)).new
    assert blobs.read(one.digest) == big
    assert source.stat().st_nlink == 1 and blobs.path(one.digest).stat().st_nlink == 1


def test_a_clone_is_hashed_too(blobs, tmp_path):
    """Where extents can be shared, the copy is what is checked."""

    class Cloning(Files):
        def clone(self, source, target):
            self.write(target, source.read())
            return True

    source = tmp_path / "source"
    source.write_bytes(DATA)
    made = Blobs(tmp_path / "blobs", tmp_path / "tmp", Cloning())
    assert made.put(source) == blobs.put(DATA).__class__(DIGEST, 3, True)


def test_nothing_is_left_in_the_temporary_folder(blobs, tmp_path):
    blobs.put(DATA)
    blobs.put(DATA)
    with pytest.raises(DamagedError):
        blobs.put(b"other", DIGEST)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(("digest", "size"), [("0" * 64, None), (None, 4), (DIGEST, 2)])
def test_bytes_that_are_not_the_announced_ones_are_not_stored(blobs, digest, size):
    with pytest.raises(DamagedError):
        blobs.put(DATA, digest, size)
    assert blobs.stamp(DIGEST) is None


def test_a_rotten_copy_is_replaced_not_trusted(blobs):
    blobs.put(DATA)
    path = blobs.path(DIGEST)
    path.chmod(0o644)
    path.write_bytes(b"abd")
    assert not blobs.intact(DIGEST)
    with pytest.raises(DamagedError, match=DIGEST[:12]):
        blobs.read(DIGEST)
    assert blobs.put(DATA).new
    assert blobs.read(DIGEST) == DATA


def test_a_link_in_the_place_of_a_blob_is_not_the_blob(blobs, tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(DATA)
    blobs.path(DIGEST).parent.mkdir()
    blobs.path(DIGEST).symlink_to(outside)
    assert not blobs.intact(DIGEST)
    blobs.put(DATA)
    assert not blobs.path(DIGEST).is_symlink() and outside.read_bytes() == DATA


def test_only_files_become_blobs(blobs, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(InvalidError, match="is not a file"):
            blobs.put(path)


@pytest.mark.parametrize("digest", ["", "abc", "../../etc/passwd", DIGEST.upper(), "sha256:"])
def test_only_digests_become_paths(blobs, digest):
    with pytest.raises(InvalidError):
        blobs.path(digest)

"""Digests that know the same base, whatever its files are called, and remember their work."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.digests import (
    files_digest,
    layout_digest,
    tensors_digest,
    touched_digest,
)
from adapterkit.hub.bases.fingerprint import (
    Fingerprint,
    config_digest,
    fingerprint,
    tensors_of,
    weights_size,
)
from adapterkit.hub.bases.folder import read_base
from adapterkit.hub.bases.hashcache import NAME, HashCache, Hashes, stamp
from adapterkit.registry.errors import AdapterWarning, DamagedError, NotFoundError

FILE = "model.safetensors"
UP = "model.layers.0.mlp.up_proj.weight"
Copy = Callable[[str], Path]
BaseOf = Callable[[str], Base]


def test_sharding_changes_the_files_and_not_the_tensors(base_of: BaseOf) -> None:
    whole, sharded = base_of("llama"), base_of("llama_sharded")
    assert tensors_digest(whole) == tensors_digest(sharded)
    assert touched_digest(whole, [UP]) == touched_digest(sharded, [UP])
    assert layout_digest(whole.tensors) == layout_digest(sharded.tensors)
    assert files_digest(whole) != files_digest(sharded)


def test_other_weights_of_the_same_shapes_share_only_the_layout(base_of: BaseOf) -> None:
    one, two = (fingerprint(base_of(n), weights=True) for n in ("llama", "llama_reseed"))
    assert (one.layout, one.config) == (two.layout, two.config)
    assert one.files != two.files
    assert one.tensors != two.tensors
    assert one.sketch != two.sketch


def test_the_digests_are_what_their_description_says(base_of: BaseOf) -> None:
    base = base_of("llama")
    path = Path(base.name) / FILE
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    line = f"{sha} {path.stat().st_size}\n"
    assert files_digest(base) == hashlib.sha256(line.encode()).hexdigest()
    head = b'["model.layers.0.mlp.up_proj.weight","F32",[128,64]]\n'
    data = load_file(path)[UP].numpy().tobytes()
    leaf = hashlib.sha256(head + data).hexdigest()
    assert touched_digest(base, [UP]) == hashlib.sha256(f"{leaf}\n".encode()).hexdigest()


def test_a_touched_quantized_tensor_includes_its_constants(copied: Copy) -> None:
    folder = copied("llama_nf4_double")
    before = touched_digest(read_base(folder), [UP])
    tensors = load_file(folder / FILE)
    tensors[f"{UP}.absmax"][3] += 1
    save_file(tensors, folder / FILE)
    assert touched_digest(read_base(folder), [UP]) != before


def test_one_byte_anywhere_changes_the_tensors_digest(copied: Copy) -> None:
    folder = copied("llama")
    before = tensors_digest(read_base(folder))
    with (folder / FILE).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert tensors_digest(read_base(folder)) != before


def test_chunks_do_not_matter(base_of: BaseOf, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fingerprint(base_of("llama"), weights=True)
    monkeypatch.setattr("adapterkit.hub.bases.digests.CHUNK", 1000)
    assert fingerprint(base_of("llama"), weights=True) == expected


def test_without_weights_no_file_is_hashed(base_of: BaseOf) -> None:
    found = fingerprint(base_of("llama"), touched=[UP])
    assert (found.files, found.tensors, found.touched) == (None, None, None)
    assert found.sketch_data is not None
    assert found.sketch == (hashlib.sha256(found.sketch_data).hexdigest(), len(found.sketch_data))


def test_progress_counts_every_byte_once(base_of: BaseOf, tmp_path: Path) -> None:
    base = base_of("llama_sharded")
    for _ in range(2):  # the second time from the cache
        sizes: list[int] = []
        fingerprint(base, weights=True, cache=tmp_path, progress=sizes.append)
        assert sum(sizes) == weights_size(base)


@pytest.mark.parametrize("name", ["llama", "llama_int8", "llama_nf4_double", "mixtral", "t5"])
def test_a_record_is_read_back_as_it_was(name: str, base_of: BaseOf) -> None:
    base = base_of(name)
    made = fingerprint(base, weights=True, touched=tensors_of(base, list(base.modules)[:3]))
    record = json.loads(json.dumps(made.record()))
    assert Fingerprint.parse(record) == made
    assert Fingerprint.parse(record).record() == record


def test_what_is_not_known_is_absent_and_what_is_unknown_stays() -> None:
    assert Fingerprint(id="org/name").record() == {"id": "org/name"}
    entry = {"id": "org/name", "later": {"x": 1}}
    assert Fingerprint.parse(entry).record() == entry


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"id": 3}, "id"), ({"layout": "x"}, "layout"), ({"files": {"root": "xyz"}}, "files root"),
        ({"sketch": {"digest": f"sha256:{'0' * 64}", "size": -1}}, "sketch size"),
        ({"tokenizer": "0" * 64}, "tokenizer"), ({"vocabulary": True}, "vocabulary"),
        ({"quantization": {}}, "quantization"),
        ({"quantization": {"method": "nf4", "double_quant": 1}}, "quantization"),
    ],
)  # fmt: skip
def test_a_malformed_record_is_damage(entry: dict[str, Any], named: str) -> None:
    with pytest.raises(DamagedError, match=named):
        Fingerprint.parse(entry)


def test_a_config_saved_again_is_the_same_config(base_of: BaseOf) -> None:
    config = dict(base_of("llama").config)
    again = config | {"transformers_version": "9.9", "dtype": "bfloat16", "_name_or_path": "x"}
    assert config_digest(config) == config_digest(again)
    assert config_digest(config) == config_digest(base_of("llama_int8").config)
    assert config_digest(config) != config_digest(config | {"rms_norm_eps": 1e-5})
    with pytest.raises(DamagedError, match=r"config\.json"):
        config_digest(config | {"rms_norm_eps": float("nan")})


def test_modules_name_the_tensors_they_are_made_of(base_of: BaseOf) -> None:
    assert tensors_of(base_of("gpt2"), ["lm_head"]) == ["transformer.wte.weight"]
    assert tensors_of(base_of("gpt2"), ["transformer.h.0.attn.c_attn"]) == [
        "transformer.h.0.attn.c_attn.bias", "transformer.h.0.attn.c_attn.weight",
    ]  # fmt: skip
    experts = tensors_of(base_of("mixtral"), ["model.layers.0.mlp.experts.gate_up_proj"])
    assert len(experts) == 8
    assert touched_digest(base_of("mixtral"), experts)


def test_an_absent_tensor_has_no_digest(base_of: BaseOf) -> None:
    with pytest.raises(NotFoundError, match=r"absent\.weight"):
        touched_digest(base_of("llama"), ["absent.weight"])


def settle(path: Path) -> None:
    """Make the file old enough to be remembered."""
    old = time.time() - 60
    os.utime(path, (old, old))


def forge(base: Base, cache: Path) -> None:
    """Put hashes in the cache that are recognisably not the file's."""
    source = base.weight_files[FILE]
    leaves = dict.fromkeys(base.tensors, "0" * 64)
    HashCache(cache).put(source, stamp(source), Hashes("f" * 64, leaves))


def test_hashes_are_remembered(copied: Copy, tmp_path: Path) -> None:
    folder, cache = copied("llama"), tmp_path / "cache"
    settle(folder / FILE)
    base = read_base(folder)
    true = tensors_digest(base, cache)
    assert (cache / NAME).exists()
    assert tensors_digest(base, cache) == true
    forge(base, cache)
    assert tensors_digest(base, cache) != true
    assert files_digest(base, cache) != files_digest(base)


def _touch(path: Path) -> None:
    os.utime(path, (1, 1))


def _rewrite(path: Path) -> None:
    status = path.stat()
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").replace(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [_touch, _rewrite], ids=["time", "inode"])
def test_a_changed_file_is_hashed_again(
    change: Callable[[Path], None], copied: Copy, tmp_path: Path
) -> None:
    folder, cache = copied("llama"), tmp_path / "cache"
    settle(folder / FILE)
    base = read_base(folder)
    true = tensors_digest(base)
    forge(base, cache)
    assert tensors_digest(base, cache) != true
    change(folder / FILE)
    assert tensors_digest(base, cache) == true


def test_a_file_written_this_moment_is_not_remembered(copied: Copy, tmp_path: Path) -> None:
    """It may change again within the same tick of its clock."""
    folder, cache = copied("llama"), tmp_path / "cache"
    os.utime(folder / FILE)
    base = read_base(folder)
    forge(base, cache)
    assert tensors_digest(base, cache) == tensors_digest(base)


def test_a_broken_cache_is_started_anew(copied: Copy, tmp_path: Path) -> None:
    folder = copied("llama")
    settle(folder / FILE)
    base = read_base(folder)
    (tmp_path / NAME).write_bytes(b"not a database" * 100)
    assert tensors_digest(base, tmp_path) == tensors_digest(base)
    assert (tmp_path / NAME).read_bytes().startswith(b"SQLite format 3")


def test_a_cache_that_cannot_be_written_is_said_and_not_needed(
    copied: Copy, tmp_path: Path
) -> None:
    folder = copied("llama")
    settle(folder / FILE)
    base = read_base(folder)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(AdapterWarning, match="not remembered"):
        found = tensors_digest(base, tmp_path / "cache")
    assert found == tensors_digest(base)


def _fingerprint(folder: str, cache: str) -> dict[str, Any]:
    return fingerprint(read_base(folder), weights=True, cache=Path(cache)).record()


def test_processes_share_one_cache(copied: Copy, tmp_path: Path) -> None:
    folder = copied("llama_sharded")
    for shard in folder.glob("*.safetensors"):
        settle(shard)
    jobs = [str(folder)] * 8, [str(tmp_path / "cache")] * 8
    with ProcessPoolExecutor(4) as pool:
        found = list(pool.map(_fingerprint, *jobs))
    assert all(record == found[0] for record in found)


def test_a_file_that_changes_while_it_is_read_is_damage(copied: Copy) -> None:
    folder = copied("llama")
    base = read_base(folder)

    def meddle(_: int) -> None:
        os.utime(folder / FILE, (2, 2))

    with pytest.raises(DamagedError, match=r"model\.safetensors changed while it was read"):
        fingerprint(base, weights=True, progress=meddle)


def test_a_model_in_memory_has_no_digest_of_nothing(base_of: BaseOf) -> None:
    live = replace(base_of("llama"), tensors={}, weight_files={})
    found = fingerprint(live, weights=True)
    assert (found.layout, found.files, found.tensors, found.sketch) == (None,) * 4
    assert found.config == fingerprint(base_of("llama")).config


def test_origin_is_recorded_only_for_a_hub_snapshot(base_of: BaseOf) -> None:
    base = base_of("llama")
    assert fingerprint(base).id is None
    commit = "0123456789" * 4
    cached = replace(base, name=f"/cache/models--org--na--me/snapshots/{commit}")
    found = fingerprint(cached)
    assert (found.id, found.revision) == ("org/na--me", commit)

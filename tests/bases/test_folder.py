"""Reading a model folder: what counts, what is compared, and what is refused by name."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from adapterkit.hub.bases.base import Base, Quantization
from adapterkit.hub.bases.fingerprint import config_digest
from adapterkit.hub.bases.folder import find_base, read_base
from adapterkit.registry.errors import (
    AdapterError,
    DamagedError,
    InvalidError,
    MismatchError,
    NotFoundError,
)

SHARD = "model-0000{}-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
Copy = Callable[[str], Path]


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_one_file_and_shards_describe_the_same_model(base_of: Callable[[str], Base]) -> None:
    whole, sharded = base_of("llama"), base_of("llama_sharded")
    assert whole.modules == sharded.modules
    assert len(whole.weight_files) == 1
    assert len(sharded.weight_files) == 3
    assert whole.vocabulary == 256
    assert whole.quantization == Quantization("none")


def test_shards_without_an_index_are_all_read(copied: Copy) -> None:
    folder = copied("llama_sharded")
    with_index = read_base(folder)
    (folder / INDEX).unlink()
    assert read_base(folder).modules == with_index.modules


def test_a_quantized_base_has_the_shapes_of_the_model(base_of: Callable[[str], Base]) -> None:
    plain = base_of("llama")
    for name, quantization in (
        ("llama_nf4_double", Quantization("nf4", True, "float32", 64)),
        ("llama_int8", Quantization("int8")),
    ):
        base = base_of(name)
        assert base.modules == plain.modules
        assert base.quantization == quantization


def test_an_unknown_architecture_is_refused_by_name(fixtures: Path) -> None:
    with pytest.raises(MismatchError, match="acme_llama"):
        read_base(fixtures / "bases" / "llama_renamed")


def test_links_are_followed_as_hub_caches_are_made_of_them(fixtures: Path, tmp_path: Path) -> None:
    for file in (fixtures / "bases" / "llama").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "original").mkdir()
    assert read_base(tmp_path).modules == read_base(fixtures / "bases" / "llama").modules


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update({"lm_head.weight": SHARD.format(2)}),
         r"lm_head\.weight is in .*-0000[13]-of.*, the index says .*-00002"),
        (lambda m: m.update({"lm_head.weight": "model-9.safetensors"}), "model-9.*is missing"),
        (lambda m: m.update({"lm_head.weight": "../llama/model.safetensors"}),
         r"\.\./llama/model\.safetensors.*leaves the folder"),
        (lambda m: m.update({"lm_head.weight": "/etc/passwd"}), "/etc/passwd.*leaves the folder"),
        (lambda m: m.update({"lm_head.weight": 3}), "lm_head.weight is mapped to 3"),
        (lambda m: m.update({"lm_head.weight": "config.json"}), "config.json is not a safetensors"),
        (lambda m: m.update({"more.weight": SHARD.format(2)}), "more.weight is not in .*-00002"),
        (lambda m: m.pop("lm_head.weight"), "lm_head.weight in .* is not in the index"),
        (lambda m: m.clear(), "no weight_map"),
    ],
)  # fmt: skip
def test_an_index_that_disagrees_with_the_files_is_damage(
    change: Callable[[Any], None], said: str, copied: Copy
) -> None:
    folder = copied("llama_sharded")
    edit(folder / INDEX, lambda index: change(index["weight_map"]))
    with pytest.raises(DamagedError, match=said) as caught:
        read_base(folder)
    assert INDEX in str(caught.value)


def test_every_fault_of_an_index_is_named(copied: Copy) -> None:
    folder = copied("llama_sharded")
    wrong = {"lm_head.weight": "a.safetensors", "model.norm.weight": "../b.safetensors"}
    edit(folder / INDEX, lambda index: index["weight_map"].update(wrong))
    with pytest.raises(DamagedError, match=r"(?s)\.\./b\.safetensors.*a\.safetensors"):
        read_base(folder)


def test_a_tensor_in_two_shards_is_damage(copied: Copy) -> None:
    folder = copied("llama_sharded")
    (folder / INDEX).unlink()
    second = load_file(folder / SHARD.format(2))
    first = load_file(folder / SHARD.format(1))
    name = next(iter(second))
    save_file(first | {name: second[name].clone()}, folder / SHARD.format(1))
    with pytest.raises(DamagedError, match=rf"{re.escape(name)} is in .*-00001.* again .*-00002"):
        read_base(folder)


@pytest.mark.parametrize("text", ["[]", "null", "{", '{"model_type": "llama", "model_type": "t5"}'])
def test_a_config_that_is_no_object_is_damage(text: str, copied: Copy) -> None:
    folder = copied("llama")
    (folder / "config.json").write_text(text)
    with pytest.raises(DamagedError, match=r"config\.json"):
        read_base(folder)


ODD = [None, True, -1, 10**30, float("nan"), "x", ["x"], [[]], {"x": {}}]


@pytest.mark.parametrize("name", ["llama_nf4_double", "bert"])
def test_no_value_in_a_config_is_a_crash(name: str, copied: Copy) -> None:
    folder = copied(name)
    config = json.loads((folder / "config.json").read_text())
    more = ["text_config", "quantization_config", "num_labels", "n_layer", "auto_map"]
    for key in [*config, *more]:
        for value in ODD:
            (folder / "config.json").write_text(json.dumps(config | {key: value}))
            with contextlib.suppress(AdapterError):
                config_digest(read_base(folder).config)


def test_a_number_too_long_to_be_one_is_a_name(copied: Copy) -> None:
    folder = copied("mixtral")
    tensors = load_file(folder / "model.safetensors")
    long = f"model.layers.{'9' * 5000}.block_sparse_moe.experts.{'9' * 5000}.w1.weight"
    tensors[long] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    modules = read_base(folder).modules
    assert [row.weight for row in modules.values() if len(row.name) > 999] == [(long,)]


def test_a_config_with_more_layers_than_the_weights_is_damage(copied: Copy) -> None:
    folder = copied("llama")
    edit(folder / "config.json", lambda config: config.update(num_hidden_layers=5))
    with pytest.raises(DamagedError, match="5 layers.* lack 3 of them: 2, 3, 4"):
        read_base(folder)


def test_a_config_with_fewer_layers_hides_the_rest_as_transformers_does(copied: Copy) -> None:
    folder = copied("llama")
    edit(folder / "config.json", lambda config: config.update(num_hidden_layers=1))
    modules = read_base(folder).modules
    assert "model.layers.0.mlp.up_proj" in modules
    assert not [name for name in modules if name.startswith("model.layers.1.")]


def test_a_base_of_pickles_is_refused_with_a_way_out(copied: Copy) -> None:
    folder = copied("llama")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(DamagedError, match=r"pytorch_model\.bin") as caught:
        read_base(folder)
    assert "save_pretrained" in str(caught.value.hint)


def test_what_is_missing_is_named(copied: Copy, tmp_path: Path) -> None:
    folder = copied("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"model\.safetensors"):
        read_base(folder)
    (folder / "config.json").unlink()
    with pytest.raises(NotFoundError, match=r"config\.json"):
        read_base(folder)
    with pytest.raises(NotFoundError, match="nowhere"):
        read_base(tmp_path / "nowhere")
    with pytest.raises(DamagedError, match="expected the folder"):
        read_base(folder / "generation_config.json")


def test_a_file_of_experts_with_one_missing_is_damage(copied: Copy) -> None:
    folder = copied("mixtral")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DamagedError, match=r"layers\.0\.mlp\.experts\.gate_up_proj has 7 expert"):
        read_base(folder)


def test_the_tokenizer_is_known_by_what_decides_ids(copied: Copy) -> None:
    folder = copied("llama")
    before = read_base(folder).tokenizer
    (folder / "tokenizer_config.json").write_text('{"chat_template": "other"}')
    (folder / "merges.txt").write_text("left over by an older saver")
    assert read_base(folder).tokenizer == before
    edit(folder / "tokenizer.json", lambda data: data["model"]["merges"].pop())
    assert read_base(folder).tokenizer != before
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").unlink()
    assert read_base(folder).tokenizer is None


def test_a_hub_id_is_looked_up_in_the_local_cache_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFoundError, match="org/name") as caught:
        find_base("org/name")
    assert caught.value.hint == "hf download org/name"
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    with pytest.raises(NotFoundError) as caught:
        find_base("org/name")
    assert "./org/name" in str(caught.value.hint)
    assert find_base("./org/name") == Path("org/name")


def test_what_is_neither_path_nor_id_is_invalid() -> None:
    for text in ("llama", "a/b/c", "org/na me", "org/name/../x"):
        with pytest.raises(InvalidError):
            find_base(text)
    with pytest.raises(NotFoundError):
        find_base("./nowhere")


def test_a_cached_hub_model_is_found_with_its_origin(
    fixtures: Path, tmp_path: Path
) -> None:
    """In a process of its own, as the Hub's library reads its cache folder once."""
    commit = "a" * 40
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in (fixtures / "bases" / "llama").iterdir():
        (snapshot / file.name).symlink_to(file)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text(commit)
    code = (
        "from adapterkit.hub.bases.folder import find_base, read_base\n"
        "from adapterkit.hub.bases.fingerprint import origin_of\n"
        "print(*origin_of(read_base(find_base('org/name'))))\n"
        "print(*origin_of(read_base(find_base('org/name@main'))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stdout.splitlines() == [f"org/name {commit}"] * 2


def test_describing_a_base_imports_nothing_heavy(fixtures: Path) -> None:
    code = (
        "import sys\n"
        "from adapterkit.hub.bases.folder import read_base\n"
        "from adapterkit.hub.bases.fingerprint import fingerprint\n"
        f"fingerprint(read_base({str(fixtures / 'bases' / 'llama_nf4_double')!r}))\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'safetensors'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

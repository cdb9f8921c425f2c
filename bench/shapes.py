"""Huge base models made of nothing: real headers, config and index over sparse data files.

    python bench/shapes.py FOLDER [--layers 80 --hidden 8192 ...]     (defaults: 70B-shaped)
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

BYTES = {"BF16": 2, "F16": 2, "F32": 4}
NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Sizes:
    """Llama's shape; by default that of a 70B model."""

    layers: int = 80
    hidden: int = 8192
    intermediate: int = 28672
    heads: int = 64
    kv_heads: int = 8
    vocab: int = 128256
    shards: int = 30
    dtype: str = "BF16"


def make_base(folder: Path, **sizes: Any) -> Path:
    """A base of any size, see `Sizes`; every weight reads as zero and takes no space."""
    size = Sizes(**sizes)
    shards, dtype = size.shards, size.dtype
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": size.hidden,
        "intermediate_size": size.intermediate, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads,
        "vocab_size": size.vocab,
        "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "dtype": NAMES[dtype],
        "max_position_embeddings": 8192,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shapes = dict(_shapes(config))
    placed = _split(shapes, shards)
    if shards == 1:
        _write(folder / "model.safetensors", placed[0], shapes, dtype)
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for name, keys in zip(names, placed, strict=True):
        _write(folder / name, keys, shapes, dtype)
    index = {
        "metadata": {"total_size": sum(map(math.prod, shapes.values())) * BYTES[dtype]},
        "weight_map": {key: name for name, keys in zip(names, placed, strict=True) for key in keys},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, vocab = (
        config[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}."
        yield from {
            f"{stem}self_attn.q_proj.weight": (hidden, hidden),
            f"{stem}self_attn.k_proj.weight": (narrow, hidden),
            f"{stem}self_attn.v_proj.weight": (narrow, hidden),
            f"{stem}self_attn.o_proj.weight": (hidden, hidden),
            f"{stem}mlp.gate_proj.weight": (inner, hidden),
            f"{stem}mlp.up_proj.weight": (inner, hidden),
            f"{stem}mlp.down_proj.weight": (hidden, inner),
            f"{stem}input_layernorm.weight": (hidden,),
            f"{stem}post_attention_layernorm.weight": (hidden,),
        }.items()
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def _split(shapes: dict[str, tuple[int, ...]], shards: int) -> list[list[str]]:
    """Tensors in order, in shards of about equal size."""
    total = sum(map(math.prod, shapes.values()))
    placed: list[list[str]] = [[] for _ in range(shards)]
    passed = 0
    for key, shape in shapes.items():
        placed[min(shards - 1, passed * shards // total)].append(key)
        passed += math.prod(shape)
    return placed


def _write(path: Path, keys: list[str], shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for key in keys:
        end = place + math.prod(shapes[key]) * BYTES[dtype]
        header[key] = {"dtype": dtype, "shape": shapes[key], "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for option in fields(Sizes):
        flag = f"--{option.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(option.default), default=option.default)
    given = vars(parser.parse_args())
    print(make_base(given.pop("folder"), **given))


if __name__ == "__main__":
    main()

"""P-Tuning as its authors' few-shot code saves it: `embeddings.pth` beside `wrapper_config.json`.

Source: THUDM/P-tuning, `PT-Fewshot/pet/wrapper.py`. Virtual tokens are positions of the input that
the caller marks with `block_flag`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.fields import PromptFields
from adapterkit.hub.findings import ERROR, Finding
from adapterkit.hub.formats.config import unknown_fields
from adapterkit.hub.formats.files import CERTAIN, Claim, read_config, weights_of
from adapterkit.hub.formats.peft_prompt import MAX_COUNT
from adapterkit.hub.headers import Stored
from adapterkit.hub.matching import Targets
from adapterkit.hub.sources import Folder

CONFIG, WEIGHTS = "wrapper_config.json", ("embeddings.safetensors", "embeddings.pth")
ENCODER = "prompt_encoder_type"
KNOWN = frozenset(["model_type", "model_name_or_path", ENCODER, "embed_size"])
# Of the task and of the training; they change nothing in what was saved.
TRAINING = frozenset(
    ["task_name", "wrapper_type", "label_list", "max_seq_length", "device", "cache_dir",
     "output_dir", "pattern_id", "eval_every_step", "scale_loss"]
)  # fmt: skip
PARTS = {
    "lstm": {"prompt_embeddings.weight": "rows", "lstm_head.": "lstm.", "mlp_head.": "mlp."},
    "mlp": {"prompt_embeddings.weight": "rows", "mlp.": "mlp."},
}


def claims(folder: Folder, config: Mapping[str, Any] | None) -> Claim | None:
    if CONFIG not in folder.files or not any(name in folder.files for name in WEIGHTS):
        return None
    return Claim(CERTAIN, f"{CONFIG} beside {WEIGHTS[1]}")


def read(
    folder: Folder, config: Mapping[str, Any] | None, allow_fields: Collection[str]
) -> Adapter:
    """Raises DamagedError, and NotFoundError where a file is missing."""
    reader = read_config(folder, CONFIG)
    config = reader.config
    encoder = reader.choice(ENCODER, "lstm", tuple(PARTS))
    width = reader.count("embed_size", 1, MAX_COUNT) if "embed_size" in config else None
    base, family = reader.text("model_name_or_path"), reader.text("model_type")
    reader.done()
    weights = weights_of(folder, WEIGHTS)
    tensors, strays = _placed(weights.header.tensors, PARTS[encoder])
    rows = tensors.get(("", "rows"))
    length = rows.shape[0] if rows is not None and rows.shape else 1
    names, unknown = unknown_fields(config, KNOWN | TRAINING, allow_fields)
    about = "an extra tensor that belongs to nothing"
    odd = [
        Finding(ERROR, "unexpected-tensor", key, f"a part of the {encoder} encoder", about)
        for key in strays
    ]
    return Adapter(
        name=folder.name,
        kind="prompt",
        format="thudm_v1",
        fields=PromptFields(length, length, width, "flagged", encoder),
        targets=Targets(),
        tensors=tensors,
        config=config,
        unconsumed=tuple(strays),
        unknown_fields=tuple(names),
        base_name=base,
        findings=(*weights.findings, *odd, *unknown),
        files={CONFIG: "config", weights.path: "weights"},
        requires={"model_type": family},
    )


def _placed(
    found: Mapping[str, Stored], parts: Mapping[str, str]
) -> tuple[dict[tuple[str, str], Stored], list[str]]:
    places: dict[tuple[str, str], Stored] = {}
    strays = []
    for key, stored in found.items():
        start = next((part for part in parts if key.startswith(part)), None)
        if start is None or (start == key) is start.endswith("."):
            strays.append(key)
        else:
            places["", parts[start] + key.removeprefix(start)] = stored
    return places, strays

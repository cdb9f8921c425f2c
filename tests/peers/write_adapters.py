"""Run by an interpreter that has AdapterHub's `adapters`: writes adapters and their logits.

    python write_adapters.py CASES FOLDER

CASES: JSON, a list of {"id", "base", "class", "config": [class name, arguments]}. For each that the
library can do, FOLDER/ID holds `adapter/` as it saves it, and `expected.safetensors`: the inputs
and its logits. Those it cannot do are listed in FOLDER/failed.json with the reason.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import adapters
import torch
import transformers
from safetensors.torch import save_file

OWN = ("adapters.task", "loras.task", "prefix_tunings.task", "prefix_gates.task",
       "prompt_tunings.task", "shared_parameters.task", "invertible_adapters.task",
       "refts.task")  # fmt: skip


def main() -> None:
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    failed = {}
    for number, case in enumerate(cases):
        try:
            write(case, folder / case["id"], number)
        except Exception as error:
            failed[case["id"]] = f"{type(error).__name__}: {error}"
    (folder / "failed.json").write_text(json.dumps(failed))


def write(case: dict, folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    model = getattr(transformers, case["class"]).from_pretrained(
        case["base"], attn_implementation="eager"
    )
    adapters.init(model)
    name, arguments = case["config"]
    model.add_adapter("task", config=getattr(adapters, name)(**arguments))
    model.set_active_adapters("task")
    model.eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(own in key for own in OWN):
                parameter.add_(0.1 * torch.randn_like(parameter))
        inputs = inputs_of(model)
        logits = model(**inputs).logits
    save(model, folder / "adapter")
    tensors = {**inputs, "logits": logits}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "expected.safetensors")


def save(model: object, folder: Path) -> None:
    """As safetensors, and as its default where tensors are shared, which that cannot hold."""
    for tensors in (True, False):
        try:
            model.save_adapter(str(folder), "task", with_head=False, use_safetensors=tensors)
            return
        except RuntimeError:
            if not tensors:
                raise


def inputs_of(model: object) -> dict[str, torch.Tensor]:
    config = model.config
    ids = torch.randint(5, config.vocab_size, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    ids[1, 6:] = config.pad_token_id or 0
    found = {"input_ids": ids, "attention_mask": mask}
    if config.is_encoder_decoder:
        found["decoder_input_ids"] = torch.randint(5, config.vocab_size, (3, 5))
    return found


if __name__ == "__main__":
    main()

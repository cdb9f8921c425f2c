"""Run by an interpreter that has AdapterHub's `adapters`: trains a bottleneck on a real encoder.

python train_bottleneck.py BASE FOLDER GOOD: FOLDER/batch.safetensors holds the inputs, the first
GOOD rows of one kind; `adapter/` and `expected.safetensors` are written beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import adapters
import torch
import transformers
from safetensors.torch import load_file, save_file


def main() -> None:
    base, folder, good = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    batch = load_file(folder / "batch.safetensors")
    torch.manual_seed(0)
    model = transformers.AutoModel.from_pretrained(base)
    adapters.init(model)
    model.add_adapter("task", config=adapters.SeqBnConfig(reduction_factor=8))
    model.train_adapter("task")
    model.eval()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(12):
        out = model(**batch).last_hidden_state[:, 0]
        loss = torch.cosine_similarity(out[:good].mean(0), out[good:].mean(0), dim=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        out = model(**batch).last_hidden_state
    model.save_adapter(str(folder / "adapter"), "task", with_head=False, use_safetensors=True)
    save_file({"out": out.contiguous()}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()

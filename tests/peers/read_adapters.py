"""Run by an interpreter that has AdapterHub's `adapters`: the logits of adapters that we wrote.

python read_adapters.py CASES: JSON, a list of {"folder", "base", "class", "inputs", "out"}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import adapters
import torch
import transformers
from safetensors.torch import load_file, save_file


def main() -> None:
    for case in json.loads(Path(sys.argv[1]).read_text()):
        model = getattr(transformers, case["class"]).from_pretrained(
            case["base"], attn_implementation="eager"
        )
        adapters.init(model)
        model.load_adapter(case["folder"], set_active=True, use_safetensors=True)
        model.eval()
        with torch.no_grad():
            logits = model(**load_file(case["inputs"])).logits
        save_file({"logits": logits.contiguous()}, case["out"])


if __name__ == "__main__":
    main()

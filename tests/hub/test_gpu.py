"""The loader on a CUDA device: the results of the CPU, and the base back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapterkit.hub import attach, load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning"),
]
TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35]])
# products of 4-bit and 8-bit weights are summed in another order, and in half precision for int8
TOLERANCES = {"none": 1e-3, "nf4": 2e-2, "int8": 1e-1}


@pytest.mark.parametrize("quantization", TOLERANCES)
@pytest.mark.parametrize(
    "name",
    ["lora_qv", "dora", "lora_tokens", "lora_embedding", "ah_par_bn", "bottleneck_llm_adapters"],
)
def test_a_gpu_gives_the_cpus_logits(fixtures: Path, quantization: str, name: str) -> None:
    base, source = fixtures / "bases" / "llama", fixtures / "cases" / f"llama.{name}" / "adapter"
    found = {}
    for device in ("cpu", "cuda"):
        model = load(base, quantization=quantization, device=device)
        inputs = TOKENS.to(device)
        with torch.no_grad():
            before = model(inputs).logits
            with attach(model, {"a": source}) as adapters:
                adapters.activate({"a": -0.5})
                found[device] = model(inputs).logits.cpu()
            assert torch.equal(model(inputs).logits, before)
    atol = TOLERANCES[quantization]
    torch.testing.assert_close(found["cuda"], found["cpu"], atol=atol, rtol=0)

"""On a CUDA device: the results of the CPU, the base back bit for bit, rows, and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapterkit.hub import attach, load
from adapterkit.hub.compose import grouped
from adapterkit.hub.compose.grouped import Groups

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


def adapter(fixtures: Path, name: str) -> Path:
    return fixtures / "cases" / f"llama.{name}" / "adapter"


def on_gpu(fixtures: Path, quantization: str) -> Any:
    base = fixtures / "bases" / "llama"
    return load(base, quantization=quantization, device="cuda", dtype=torch.bfloat16)


def graphed(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same, recorded once; each call replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run()

    def replayed() -> Tensor:
        graph.replay()
        return made.clone()

    return replayed


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_row_on_a_gpu_is_what_it_is_alone(fixtures: Path, quantization: str) -> None:
    """Not farther apart than twice what the bare base's row in a batch is from its row alone."""
    model = on_gpu(fixtures, quantization)
    inputs = (TOKENS + torch.arange(4)[:, None]).cuda()
    rows: list[str | None] = ["a", None, "b", "a"]

    def alone(row: int) -> Tensor:
        made: Tensor = model(inputs[row : row + 1]).logits
        return made

    with torch.inference_mode():
        off = [(model(inputs).logits[r] - alone(r)).abs().max().item() for r in range(4)]
        names = {"a": adapter(fixtures, "lora_qv"), "b": adapter(fixtures, "dora")}
        with attach(model, names) as adapters:
            with adapters.routed(rows):
                found = model(inputs).logits
            for row, name in enumerate(rows):
                adapters.activate([name] if name else [])
                torch.testing.assert_close(
                    found[row : row + 1], alone(row), atol=2 * max(off) + 1e-3, rtol=0
                )


def test_a_recorded_step_has_what_was_switched_or_routed_since(fixtures: Path) -> None:
    model = on_gpu(fixtures, "none")
    inputs = TOKENS[:, :1].repeat(2, 1).cuda()
    # a mask of its own keeps transformers from looking at values, which no graph may
    mask = torch.zeros(2, 1, 1, 1, dtype=torch.bfloat16, device="cuda")

    def step() -> Tensor:
        made: Tensor = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
        return made

    names = {"a": adapter(fixtures, "lora_qv"), "b": adapter(fixtures, "lora_all_linear")}
    with torch.no_grad(), attach(model, names, slots=4, max_rank=64) as adapters:
        adapters.activate({"a": 1.0})
        replayed = graphed(step)
        torch.testing.assert_close(replayed(), step(), atol=2e-2, rtol=0)
        adapters.activate({"b": -0.5})
        torch.testing.assert_close(replayed(), step(), atol=2e-2, rtol=0)
        with adapters.routed(["b", None]):
            torch.testing.assert_close(replayed(), step(), atol=2e-2, rtol=0)
        torch.testing.assert_close(replayed(), step(), atol=2e-2, rtol=0)
        adapters.activate([])
        torch.testing.assert_close(replayed(), step(), atol=2e-2, rtol=0)


def test_a_routed_forward_never_waits_for_the_gpu(fixtures: Path) -> None:
    model = on_gpu(fixtures, "none")
    inputs = TOKENS.repeat(3, 1).cuda()
    mask = torch.zeros(3, 1, 6, 6, dtype=torch.bfloat16, device="cuda")
    names = {"a": adapter(fixtures, "lora_qv"), "b": adapter(fixtures, "dora")}
    with torch.no_grad(), attach(model, names) as adapters, adapters.routed(["a", None, "b"]):
        first = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, first)


def test_the_grouped_kernel_gives_what_each_row_gets_alone() -> None:
    if torch.cuda.get_device_capability()[0] not in grouped.CAPABILITIES:
        pytest.skip("needs a device of capability 9 or 10")
    count, rank, size = 32, 16, 256
    draw = torch.Generator("cuda").manual_seed(1)
    half: dict[str, Any] = {"generator": draw, "dtype": torch.bfloat16, "device": "cuda"}
    a, b = (torch.randn(count * rank, size, **half) / 16 for _ in range(2))
    assert grouped.pays(a, b, rank)
    slots = [None if row % 7 == 0 else row * 5 % (count - 1) for row in range(64)]
    x, y = (torch.randn(64, 24, size, **half) for _ in range(2))
    scales = torch.linspace(-1, 2, count, device="cuda")
    groups = Groups.of(slots, scales)
    assert groups is not None
    a, b = (each.view(count, rank, size) for each in (a, b))
    found = groups.added(x, y, a, b)
    for row, slot in enumerate(slots):
        own = y[row].double()
        if slot is not None:
            own = own + scales[slot] * (x[row].double() @ a[slot].double().mT) @ b[slot].double()
        torch.testing.assert_close(found[row].double(), own, atol=2**-5, rtol=2**-7)

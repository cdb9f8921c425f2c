"""Copies of a model with adapters, and one model in several threads."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from adapterkit.hub import attach
from adapterkit.hub.compose.attach import attached
from adapterkit.registry import Registry

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
CLASSES = {"bert": "AutoModelForSequenceClassification", "t5": "AutoModelForSeq2SeqLM"}
TOKENS = torch.randint(5, 60, (4, 6), generator=torch.Generator().manual_seed(1))
CASES = (
    "llama.lora_qv", "llama.ia3", "llama.prefix", "llama.ah_par_bn", "bert.ah_seq_bn_inv",
    "bert.ah_prefix", "bert.ah_prompt_after_bos", "mixtral.lora_experts",
)  # fmt: skip


def load(fixtures: Path, family: str) -> Any:
    cls = getattr(transformers, CLASSES.get(family, "AutoModelForCausalLM"))
    found = cls.from_pretrained(fixtures / "bases" / family, attn_implementation="eager")
    return found.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


def enlarged(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    return model


@pytest.mark.parametrize("name", CASES)
def test_a_copy_of_a_model_has_adapters_of_its_own(
    name: str, fixtures: Path, tmp_path: Path
) -> None:
    family, source = name.split(".")[0], fixtures / "cases" / name / "adapter"
    model, other = load(fixtures, family), enlarged(load(fixtures, family))
    base, changed = logits(model), logits(other)
    handle = attach(model, [source], registry=Registry(tmp_path))
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    enlarged(twin)
    with attach(other, [source]):
        assert torch.equal(logits(twin), logits(other))
    handle.detach()
    assert torch.equal(logits(model), base)
    mine = attached(twin)
    assert mine is not None and not torch.equal(logits(twin), changed)
    mine.detach()
    assert torch.equal(logits(twin), changed)


@pytest.fixture
def often() -> Iterator[None]:
    """Threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("name", ["llama.prefix", "bert.ah_prompt_after_bos", "llama.ah_par_bn"])
def test_threads_get_what_each_would_get_alone(name: str, fixtures: Path) -> None:
    model = load(fixtures, name.split(".")[0])
    run: Callable[[Tensor], Tensor] = lambda tokens: generated(model, tokens)  # noqa: E731
    inputs = [TOKENS[:2, : 3 + n] for n in range(4)]
    wrong: list[int] = []
    with attach(model, [fixtures / "cases" / name / "adapter"]):
        expected = [run(tokens) for tokens in inputs]

        def work(n: int) -> None:
            wrong.append(n)
            for _ in range(6):
                if not torch.equal(run(inputs[n]), expected[n]):
                    return
            wrong.remove(n)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def generated(model: Any, tokens: Tensor) -> Tensor:
    """Token after token where a model generates, else its output."""
    mask = torch.ones_like(tokens)
    if not model.can_generate():
        with torch.no_grad():
            return model(input_ids=tokens, attention_mask=mask).logits
    return model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)

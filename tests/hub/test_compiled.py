"""Compiled code follows what is active; where memory is reserved, nothing is compiled again."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_route import Folder, folder, lora, tiny, tokens
from torch import Tensor

from adapterkit.hub import attach
from adapterkit.registry.errors import AdapterWarning, InvalidError

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
__all__ = ["folder"]  # a fixture
IDS = tokens(4)["input_ids"]


class Compiled:
    """A compiled model, and how many graphs were made for it."""

    def __init__(self, model: Any) -> None:
        self.model, self.graphs = model, 0
        self.code = torch.compile(model, backend=self._backend)

    def _backend(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        forward: Callable[..., Any] = graph.forward
        return forward

    def logits(self, ids: Tensor = IDS) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.code(input_ids=ids).logits
        return found

    def check(self, ids: Tensor = IDS) -> Tensor:
        """It gives what eager mode gives."""
        found = self.logits(ids)
        with torch.no_grad():
            torch.testing.assert_close(
                found, self.model(input_ids=ids).logits, atol=1e-5, rtol=1e-5
            )
        return found


@pytest.fixture
def compiled() -> Iterator[Compiled]:
    torch.compiler.reset()
    yield Compiled(tiny("llama"))
    torch.compiler.reset()


@pytest.fixture
def sources(folder: Folder) -> dict[str, Any]:
    """Of four ranks, the last for one module more."""
    targets = ["q_proj", "v_proj", "down_proj", "embed_tokens"]
    made = {"a": lora(4, targets), "b": lora(8, targets[:3]), "c": lora(2, targets[:2])}
    return {name: folder("llama", config) for name, config in made.items()}


def change(adapters: Any, sources: dict[str, Any], rng: random.Random) -> Any:
    """One step at random; what rows are routed to meanwhile."""
    kind = rng.choice(["activate", "weights", "route", "add", "remove", "swap"])
    names = list(adapters.names)
    chosen = rng.choice(names)
    if kind == "add" and len(names) < 6:
        adapters.add(f"new{rng.random()}", sources[rng.choice("abc")])
    elif kind == "remove" and len(names) > 2:
        adapters.remove(chosen)
    elif kind == "swap":
        adapters.swap(chosen, sources[rng.choice("abc")])
    elif kind == "weights":
        two = rng.sample(names, 2)
        adapters.activate({name: rng.choice([-0.5, 0.25, 2.0]) for name in two})
    elif kind == "route":
        rows = [rng.choice([None, *names, {chosen: 0.5, names[0]: -0.5}]) for _ in IDS]
        return adapters.routed(rows)
    else:
        adapters.activate(rng.choice([[], [chosen]]))
    return nullcontext()


def test_nothing_is_compiled_again_within_what_is_reserved(
    compiled: Compiled, sources: dict[str, Any]
) -> None:
    rng = random.Random(5)
    with attach(compiled.model, sources, slots=8, max_rank=32) as adapters:
        with adapters.routed(["a", None, "b", "c"]):
            compiled.check()
        adapters.activate([])
        base = compiled.check()
        before, differs = compiled.graphs, 0
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "compiled code is compiled again", AdapterWarning)
            for _ in range(100):
                with change(adapters, sources, rng):
                    differs += int((compiled.check() - base).abs().max() > 1e-3)
        assert compiled.graphs == before
        assert differs > 50


def test_what_is_active_is_followed_without_reserving(
    compiled: Compiled, sources: dict[str, Any]
) -> None:
    with attach(compiled.model, sources) as adapters:
        seen = []
        for weights in (["a"], [], ["b"], {"a": 0.5, "c": -1}, ["a"]):
            adapters.activate(weights)
            seen.append(compiled.check())
        for rows in (["a", None, "b", "c"], ["b", "b", None, {"a": 0.5}]):
            with adapters.routed(rows):
                seen.append(compiled.check())
        compiled.check()
        assert torch.equal(seen[0], seen[4])
        assert all((a - b).abs().max() > 1e-3 for n, a in enumerate(seen[:4]) for b in seen[:n])
    compiled.check()


OTHERS = {
    "dora": lora(4, use_dora=True),
    "ia3": peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
    "head": lora(2, modules_to_save=["lm_head"]),
    "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
}


@pytest.mark.parametrize("settings", [{}], ids=str)
def test_other_kinds_are_followed_too(
    compiled: Compiled, settings: dict[str, int], sources: dict[str, Any], folder: Folder
) -> None:
    made = {name: folder("llama", config) for name, config in OTHERS.items()}
    with attach(compiled.model, made | sources, **settings) as adapters:
        adapters.activate([])
        base = compiled.check()
        for weights in [["dora"], ["ia3"], {"dora": 0.5, "a": 1}, ["oft"], ["head", "b"], ["a"]]:
            adapters.activate(weights)
            assert (compiled.check() - base).abs().max() > 1e-3
        for rows in (["dora", None, "ia3", "a"], ["head", "a", None, "b"]):
            with adapters.routed(rows):
                assert (compiled.check() - base).abs().max() > 1e-3


def test_more_than_is_reserved_is_announced_and_right(
    compiled: Compiled, sources: dict[str, Any], folder: Folder
) -> None:
    with attach(compiled.model, slots=1, max_rank=8) as adapters:
        for name, source in sources.items():
            adapters.add(name, source)
        adapters.activate(["a"])
        compiled.check()
        with pytest.warns(AdapterWarning, match="12 active ranks.* max_rank=12"):
            adapters.activate(["a", "b"])
        compiled.check()
        rows = ["a", "b", "c", None]
        with (
            pytest.warns(AdapterWarning, match="in 4 mixes.*slots=4"),
            adapters.routed(rows),
        ):
            compiled.check()
        compiled.check()
        adapters.add("wide", folder("llama", lora(24, ["q_proj", "o_proj"])))
        with pytest.warns(AdapterWarning, match="24 active ranks"):
            adapters.activate(["wide"])
        compiled.check()


def test_rows_of_another_number_than_the_batch_are_spread_or_refused(
    compiled: Compiled, sources: dict[str, Any]
) -> None:
    """As in eager mode: each row for its beams."""
    with attach(compiled.model, sources, slots=4, max_rank=16) as adapters:
        with adapters.routed(["a", "b", None, "c"]):
            compiled.check()
            compiled.check(tokens(8)["input_ids"])
            with pytest.raises(InvalidError, match="6 rows, and 4 are routed"):
                compiled.logits(tokens(6)["input_ids"])
        with adapters.routed(["b", None]):
            compiled.check()


def test_an_adapter_of_new_modules_is_seen_by_compiled_code(
    compiled: Compiled, sources: dict[str, Any], folder: Folder
) -> None:
    with attach(compiled.model, sources, slots=4, max_rank=16) as adapters:
        adapters.activate(["a"])
        before = compiled.check()
        adapters.add("new", folder("llama", lora(4, ["o_proj", "lm_head"])))
        adapters.activate(["a", "new"])
        assert (compiled.check() - before).abs().max() > 1e-3
        adapters.activate(["a"])
        torch.testing.assert_close(compiled.check(), before)
    compiled.check()


def test_a_model_compiled_before_attaching_is_compiled_again(
    compiled: Compiled, sources: dict[str, Any]
) -> None:
    base = compiled.logits()
    with attach(compiled.model, {"a": sources["a"]}):
        assert (compiled.check() - base).abs().max() > 1e-3
    torch.testing.assert_close(compiled.check(), base)
    with pytest.raises(InvalidError, match="the model is compiled"):
        attach(compiled.code, sources)


@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True])
@pytest.mark.parametrize("name", ["slots", "max_rank"])
def test_what_is_no_size_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidError, match=f"{name} is {value!r}, expected a whole number from 1"):
        attach(tiny("llama"), **{name: value})


@pytest.mark.parametrize("budget", ["", "2 GX", "-1", "0", 0, -5, 1.5, True, "1e3", "GiB", "0.1"])
def test_what_is_no_budget_is_refused(budget: Any) -> None:
    with pytest.raises(InvalidError, match="expected a size such as '2GiB'"):
        attach(tiny("llama"), budget=budget)

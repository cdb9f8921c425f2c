"""Whatever is added, removed, swapped, activated and routed, in whatever order: the model is what
it is with the same adapters attached anew."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from test_route import folder, lora, tiny, tokens
from torch import Tensor

from adapterkit.hub import attach

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
__all__ = ["folder"]  # a fixture
IDS = tokens(3)["input_ids"]
NAMES = ("a", "b", "c", "d")
EXAMPLES = 60 if os.environ.get("ADAPTERKIT_PROOF") == "nightly" else 8
WEIGHT = st.sampled_from([1.0, 1.0, 0.5, -0.7])
MIX = st.dictionaries(st.sampled_from(NAMES), WEIGHT, max_size=3)
# Ranks that differ, so that banks grow and freed spans are too small or too large for the next.
KINDS = {
    "narrow": lora(2, ["q_proj"]),
    "wide": lora(8, ["q_proj", "v_proj", "up_proj"]),
    "plain": lora(4),
    "dora": lora(4, use_dora=True),
    "ia3": peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
    "head": lora(3, modules_to_save=["lm_head"]),
}
SOURCE = st.sampled_from(sorted(KINDS))
# (source, weight) of what a row has, in order
Held = tuple[tuple[str, float], ...]


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


class Machine(RuleBasedStateMachine):
    model: ClassVar[Any]
    folders: ClassVar[dict[str, Path]]
    known: ClassVar[dict[Held, Tensor]] = {}

    @initialize(slots=st.sampled_from([None, 2]))
    def start(self, slots: int | None) -> None:
        self.live = copy.deepcopy(self.model)
        self.adapters = attach(self.live, {}, slots=slots)
        self.sources: dict[str, str] = {}
        self.active: dict[str, float] = {}

    @rule(name=st.sampled_from(NAMES), source=SOURCE)
    def add_or_swap(self, name: str, source: str) -> None:
        """At the weight it was active at."""
        change = self.adapters.swap if name in self.sources else self.adapters.add
        change(name, self.folders[source])
        self.sources[name] = source

    @precondition(lambda self: self.sources)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.sources)))
        self.adapters.remove(name)
        del self.sources[name]
        self.active.pop(name, None)

    @rule(mix=MIX)
    def activate(self, mix: dict[str, float]) -> None:
        self.active = {name: w for name, w in mix.items() if name in self.sources}
        self.adapters.activate(self.active)

    @rule(mixes=st.lists(MIX, min_size=3, max_size=3))
    def route(self, mixes: list[dict[str, float]]) -> None:
        rows = [{n: w for n, w in mix.items() if n in self.sources} for mix in mixes]
        with self.adapters.routed(rows):
            found = logits(self.live)
        for number, row in enumerate(rows):
            self.check(found[number], self.expected(row)[number])

    @invariant()
    def it_is_as_if_attached_anew(self) -> None:
        self.check(logits(self.live), self.expected(self.active))
        assert dict(self.adapters.active) == self.active
        assert set(self.adapters.names) == self.sources.keys()

    def expected(self, mix: dict[str, float]) -> Tensor:
        held = tuple((self.sources[name], weight) for name, weight in mix.items())
        if held not in self.known:
            fresh = copy.deepcopy(self.model)
            folders = {str(n): self.folders[source] for n, (source, _) in enumerate(held)}
            adapters = attach(fresh, folders)
            adapters.activate({str(n): weight for n, (_, weight) in enumerate(held)})
            self.known[held] = logits(fresh)
        return self.known[held]

    def check(self, found: Tensor, expected: Tensor) -> None:
        scale = float(expected.abs().max())
        assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, scale)

    def teardown(self) -> None:
        self.adapters.detach()
        assert torch.equal(logits(self.live), logits(self.model))
        ours = {n: tuple(p.shape) for n, p in self.live.state_dict().items()}
        assert ours == {n: tuple(p.shape) for n, p in self.model.state_dict().items()}
        assert not any("forward" in vars(module) for module in self.live.modules())


@pytest.fixture
def machine(folder: Any) -> Iterator[type[Machine]]:
    Machine.model = tiny("llama")
    Machine.folders = {name: folder("llama", config) for name, config in KINDS.items()}
    Machine.known.clear()
    yield Machine
    Machine.known.clear()


def test_any_order_of_changes_gives_a_freshly_attached_model(machine: type[Machine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=25, deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip

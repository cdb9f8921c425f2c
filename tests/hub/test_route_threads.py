"""Threads that route and switch on one model at the same time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event
from typing import Any

import pytest
import torch
from test_route import Folder, folder, lora, run, tiny, tokens

from adapterkit.hub import attach
from adapterkit.registry.errors import ConflictError

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
__all__ = ["folder"]  # a fixture
INPUTS = tokens(3)
WAIT = 60
ROUTINGS: list[list[Any]] = [
    ["a", None, "b"], ["b", "b", "a"], [None, "dora", "a"], [{"a": 0.5, "b": -1}, "ia3", "dora"],
]  # fmt: skip


@pytest.fixture
def sources(folder: Folder) -> dict[str, Any]:
    configs = {
        "a": lora(4), "b": lora(2), "dora": lora(2, use_dora=True),
        "ia3": peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
    }  # fmt: skip
    return {name: folder("llama", config) for name, config in configs.items()}


def routed(adapters: Any, model: Any, rows: list[Any]) -> torch.Tensor:
    with adapters.routed(rows):
        return run(model, INPUTS)


def test_threads_that_route_and_switch_do_not_mix_them_up(sources: dict[str, Any]) -> None:
    """All of them are inside at once, layer by layer; one switches what is active meanwhile."""
    model = tiny("llama")
    with attach(model, sources) as adapters:
        expected = [routed(adapters, model, rows) for rows in ROUTINGS]
        adapters.activate(["b"])
        active = run(model, INPUTS)
        meet = Barrier(len(ROUTINGS) + 1)

        def wait(*call: Any) -> None:
            meet.wait(WAIT)

        for layer in model.model.layers:
            layer.register_forward_pre_hook(wait)

        def serve(number: int) -> list[torch.Tensor]:
            with adapters.routed(ROUTINGS[number]):
                return [run(model, INPUTS) for _ in range(3)]

        def switch() -> list[torch.Tensor]:
            found = []
            for weights in ({"a": 1}, {}, {"b": 1}):
                adapters.activate(weights)
                found.append(run(model, INPUTS))
            return found

        with ThreadPoolExecutor(len(ROUTINGS) + 1) as pool:
            futures = [pool.submit(serve, number) for number in range(len(ROUTINGS))]
            switched = pool.submit(switch).result(WAIT)
            served = [future.result(WAIT) for future in futures]
    for mine, one in zip(served, expected, strict=True):
        for found in mine:
            torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(switched[2], active, atol=1e-5, rtol=1e-5)
    assert all((switched[n] - active).abs().max() > 1e-3 for n in (0, 1))


def test_a_routing_inside_another_gives_way_to_it_again(sources: dict[str, Any]) -> None:
    model = tiny("llama")
    with attach(model, sources) as adapters:
        adapters.activate(["ia3"])
        active = run(model, INPUTS)
        outer, inner = (routed(adapters, model, rows) for rows in ROUTINGS[:2])
        with adapters.routed(ROUTINGS[0]):
            assert torch.equal(run(model, INPUTS), outer)
            with pytest.raises(KeyError), adapters.routed(ROUTINGS[1]):
                assert torch.equal(run(model, INPUTS), inner)
                raise KeyError
            assert torch.equal(run(model, INPUTS), outer)
        assert torch.equal(run(model, INPUTS), active)


def test_a_forward_that_fails_leaves_nothing_behind(sources: dict[str, Any]) -> None:
    model = tiny("llama")
    with attach(model, sources) as adapters:
        expected = routed(adapters, model, ROUTINGS[2])

        def fail(*call: Any) -> None:
            raise OSError

        hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with adapters.routed(ROUTINGS[2]), pytest.raises(OSError):
            run(model, INPUTS)
        hook.remove()
        assert torch.equal(routed(adapters, model, ROUTINGS[2]), expected)
        with adapters.routed(["a"]):
            run(model, tokens(1))


CHANGES: dict[str, Callable[[Any, Any], None]] = {
    "remove": lambda adapters, source: adapters.remove("a"),
    "swap": lambda adapters, source: adapters.swap("a", source),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_thread_routes_to_is_not_taken_away(change: str, sources: dict[str, Any]) -> None:
    model = tiny("llama")
    with attach(model, sources) as adapters:
        expected = routed(adapters, model, ROUTINGS[0])
        inside, done = Event(), Event()

        def serve() -> torch.Tensor:
            with adapters.routed(ROUTINGS[0]):
                inside.set()
                assert done.wait(WAIT)
                return run(model, INPUTS)

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(serve)
            assert inside.wait(WAIT)
            try:
                with pytest.raises(ConflictError, match="a is what rows of a batch are routed to"):
                    CHANGES[change](adapters, sources["b"])
                adapters.add("wide", sources["dora"])  # the banks grow, and what it sees stays
                adapters.remove("ia3")
            finally:
                done.set()
            assert torch.equal(future.result(WAIT), expected)
        CHANGES[change](adapters, sources["b"])
        assert ("a" in adapters.names) == (change == "swap")

"""Adapters that are loaded from a registry when they are named, within a budget of memory."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_route import Folder, folder, lora, run, tiny, tokens

from adapterkit.hub import attach, attached
from adapterkit.hub.compose.stock import Stock
from adapterkit.hub.ingest import add
from adapterkit.registry import Registry
from adapterkit.registry.errors import InvalidError, NotFoundError

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
__all__ = ["folder"]  # a fixture
INPUTS = tokens(2)
WAIT = 60
SIZE = 4 * 4 * (32 + 32 + 32 + 16) * 2  # rank 4 in float32 on q_proj and v_proj of two layers


@pytest.fixture
def source(folder: Folder) -> Path:
    return folder("llama", lora(4))


@pytest.fixture
def registry(tmp_path: Path, source: Path) -> Iterator[Registry]:
    """With x0 to x4, all the same."""
    with Registry(tmp_path / "home") as found:
        for number in range(5):
            add(found, source, f"team/x{number}")
        yield found


def names(*numbers: int) -> list[str]:
    return [f"team/x{number}" for number in numbers]


def counts(adapters: Any) -> tuple[int, int, int]:
    found = adapters.counters
    assert found.held == sum(adapters.report[name].size for name in adapters.names)
    return found.hits, found.misses, found.evicted


def test_those_named_longest_ago_make_room(registry: Registry, source: Path) -> None:
    model = tiny("llama")
    with attach(model, [source]):
        expected = run(model, INPUTS)
    adapters = attach(model, registry=registry, budget=3 * SIZE)
    with adapters:
        for number in (0, 1, 2):
            adapters.activate(names(number))
        assert adapters.names == tuple(names(0, 1, 2))
        assert {adapters.report[name].size for name in adapters.names} == {SIZE}
        assert counts(adapters) == (0, 3, 0)
        adapters.activate(names(0))
        adapters.activate([])
        adapters.activate(names(3))
        assert set(adapters.names) == set(names(0, 2, 3))
        assert counts(adapters) == (1, 4, 1)
        with adapters.routed([*names(2), None]):
            torch.testing.assert_close(run(model, INPUTS)[0], expected[0])
        with adapters.routed(names(4, 4)):
            torch.testing.assert_close(run(model, INPUTS), expected)
        assert set(adapters.names) == set(names(2, 3, 4))
        assert counts(adapters) == (2, 5, 2)
        assert adapters.counters.loaded == 5 * SIZE
        torch.testing.assert_close(run(model, INPUTS), expected)  # x3 is active all the while
    assert attached(model) is None


def test_what_does_not_fit_is_refused_and_changes_nothing(registry: Registry) -> None:
    model = tiny("llama")
    with attach(model, registry=registry, budget=2 * SIZE) as adapters:
        adapters.activate(names(0, 1))
        before = run(model, INPUTS)
        for call in (adapters.activate, lambda rows: adapters.routed(rows).__enter__()):
            with pytest.raises(InvalidError, match=rf"need {5 * SIZE} bytes.* is {2 * SIZE}"):
                call(names(2, 3, 4))
        with pytest.raises(InvalidError, match="what is in use"):
            adapters.routed([*names(2), None]).__enter__()
        assert set(adapters.names) == set(names(0, 1))
        assert dict(adapters.active) == dict.fromkeys(names(0, 1), 1.0)
        assert counts(adapters)[1:] == (2, 0)
        assert torch.equal(run(model, INPUTS), before)


def test_what_a_thread_routes_to_stays(registry: Registry) -> None:
    model = tiny("llama")
    with attach(model, registry=registry, budget=2 * SIZE) as adapters:
        inside, done = threading.Event(), threading.Event()

        def serve() -> torch.Tensor:
            with adapters.routed([*names(0), None]):
                first = run(model, INPUTS)
                inside.set()
                assert done.wait(WAIT)
                assert torch.equal(run(model, INPUTS), first)
                return first

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(serve)
            assert inside.wait(WAIT)
            try:
                for number in (1, 2, 3):
                    adapters.activate([])
                    with adapters.routed([None, *names(number)]):
                        run(model, INPUTS)
                assert set(adapters.names) == set(names(0, 3))
            finally:
                done.set()
            future.result(WAIT)
        adapters.activate(names(1, 2))
        assert set(adapters.names) == set(names(1, 2))


Fetch = Callable[[Stock, str], Any]


@pytest.fixture
def fetching(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], None]], None]:
    """Calls something before each adapter is read."""
    inner: Fetch = Stock._fetched

    def patch(before: Callable[[str], None]) -> None:
        def fetched(self: Stock, name: str) -> Any:
            before(name)
            return inner(self, name)

        monkeypatch.setattr(Stock, "_fetched", fetched)

    return patch


def test_loads_of_different_adapters_overlap(
    registry: Registry, fetching: Callable[[Callable[[str], None]], None]
) -> None:
    """Each waits for the other to have begun."""
    meet = threading.Barrier(2)
    fetching(lambda name: [meet.wait(WAIT)].clear())
    model = tiny("llama")
    with attach(model, registry=registry, budget=4 * SIZE) as adapters:
        adapters.activate(names(0, 1))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda number: adapters.activate(names(number)), (2, 3)))
        assert counts(adapters) == (0, 4, 0)


def test_one_that_several_threads_ask_for_is_loaded_once(
    registry: Registry, fetching: Callable[[Callable[[str], None]], None]
) -> None:
    loads: list[str] = []
    fetching(loads.append)
    model = tiny("llama")
    with attach(model, registry=registry, budget=4 * SIZE) as adapters:
        meet = threading.Barrier(4)

        def serve(number: int) -> torch.Tensor:
            meet.wait(WAIT)
            with adapters.routed([*names(0), None]):
                return run(model, INPUTS)

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(serve, range(4)))
        assert loads == names(0)
        assert all(torch.equal(one, found[0]) for one in found)
        assert adapters.counters.misses == 1


def test_a_name_that_is_missing_works_once_it_is_there(registry: Registry, source: Path) -> None:
    model = tiny("llama")
    with attach(model, registry=registry, budget=4 * SIZE) as adapters:
        adapters.activate(names(0))
        for _ in range(2):
            with pytest.raises(NotFoundError, match="team/new"):
                adapters.activate(["team/new", *names(1)])
        assert dict(adapters.active) == {"team/x0": 1.0}
        add(registry, source, "team/new")
        adapters.activate(["team/new"])
        assert "team/new" in adapters.names


def test_an_adapter_of_another_base_leaves_the_others_working(
    registry: Registry, folder: Folder
) -> None:
    add(registry, folder("bert", lora(4, ["query"])), "team/bert")
    model = tiny("llama")
    with attach(model, registry=registry, budget=4 * SIZE) as adapters:
        for _ in range(2):
            with pytest.raises(Exception, match="bert") as caught:
                adapters.routed(["team/bert", *names(0)]).__enter__()
            assert caught.type.__name__ == "MismatchError"
        with adapters.routed(names(0, 1)):
            run(model, INPUTS)
        assert set(adapters.names) == set(names(0, 1))


def test_attached_adapters_stay_beside_those_on_demand(registry: Registry, source: Path) -> None:
    model = tiny("llama")
    with attach(model, {"own": source}, registry=registry, budget=3 * SIZE) as adapters:
        for number in range(4):
            with adapters.routed(["own", *names(number)]):
                run(model, INPUTS)
        assert set(adapters.names) == {"own", *names(2, 3)}
        assert adapters.counters.held == 2 * SIZE
        adapters.add("more", source)
        adapters.activate({"own": 0.5, "more": 1, "team/x4": 1})
        assert {"own", "more", "team/x4"} == set(adapters.names)


def test_a_copy_of_the_model_loads_for_itself(registry: Registry) -> None:
    model = tiny("llama")
    before = threading.active_count()
    with attach(model, registry=registry, budget=2 * SIZE) as adapters:
        adapters.activate(names(0))
        other = copy.deepcopy(model)
        copied = attached(other)
        assert copied is not None
        copied.activate(names(1))
        assert adapters.names == tuple(names(0))
        assert set(copied.names) == set(names(0, 1))
        torch.testing.assert_close(run(other, INPUTS), run(model, INPUTS))
        copied.detach()
    assert threading.active_count() == before

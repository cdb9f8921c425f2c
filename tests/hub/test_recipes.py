"""Recipes: adapters that are one together, kept by the digests of their versions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit.hub import attach, attached, check, describe, ingest, load, remotes, sync
from adapterkit.hub.arrival import recheck
from adapterkit.hub.compose.blocks import Average, Parallel, Stack
from adapterkit.hub.recipes import MAX_PARTS, Part, Recipe
from adapterkit.registry import Registry
from adapterkit.registry.errors import (
    AdapterError,
    ConflictError,
    DamagedError,
    InvalidError,
    NotFoundError,
)

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
CASES = {"sql": "llama.lora_qv", "tone": "llama.dora", "gain": "llama.moslora_v10"}
TOKENS = torch.tensor([[1, 20, 33, 7, 4]])


@pytest.fixture
def registry(tmp_path: Path, fixtures: Path) -> Any:
    with Registry(tmp_path / "home") as made:
        for name, case in CASES.items():
            ingest.add(made, fixtures / f"cases/{case}/adapter", f"team/{name}")
        yield made


@pytest.fixture
def model(fixtures: Path) -> Any:
    place = fixtures / "bases/llama"
    return transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
        return found


Mix = dict[str, float]


@pytest.fixture
def saved(registry: Registry, model: Any, tmp_path: Path) -> Callable[[Mix], Path]:
    """The file of a recipe of versions with weights."""

    def save(weights: Mix) -> Path:
        path = tmp_path / f"recipe{len(list(tmp_path.glob('recipe*')))}.json"
        with attach(model, {name: f"team/{name}" for name in weights}, registry=registry) as found:
            found.activate(weights)
            return found.save(path)

    return save


MIX = {"sql": 0.7, "tone": -0.3, "gain": 1.0}


def test_a_recipe_is_what_was_active_when_it_was_saved(
    registry: Registry, model: Any, saved: Callable[[Mix], Path], fixtures: Path
) -> None:
    sources = {name: f"team/{name}" for name in MIX}
    with attach(model, sources, registry=registry) as found:
        found.activate(MIX)
        expected = logits(model)
    path = saved(MIX)
    ingest.add(registry, path, "team/assistant")
    with attach(model, "team/assistant", registry=registry) as one:
        assert torch.equal(logits(model), expected)
        assert one.names == ("team/assistant",) and dict(one.active) == {"team/assistant": 1.0}
        assert {row.primitive for row in one.report["team/assistant"]} >= {"LowRank"}
    with attach(model, path, registry=registry):
        assert torch.equal(logits(model), expected)
    loaded = load(fixtures / "bases/llama", adapters="team/assistant", registry=registry)
    assert torch.equal(logits(loaded), expected)
    handle = attached(loaded)
    assert handle is not None and handle.recipe.dump() == path.read_bytes()


def test_the_weight_of_a_recipe_multiplies_those_of_its_parts(
    registry: Registry, model: Any, saved: Callable[[Mix], Path]
) -> None:
    ingest.add(registry, saved(MIX), "mix")
    half = {name: weight / 2 for name, weight in MIX.items()}
    with attach(model, {name: f"team/{name}" for name in MIX}, registry=registry) as found:
        found.activate(half)
        alone = logits(model)
        found.activate(half | {"sql": half["sql"] + 2})
        beside = logits(model)
    with attach(model, {"mix": "mix", "sql": "team/sql"}, registry=registry) as one:
        one.activate({"mix": 0.5})
        torch.testing.assert_close(logits(model), alone, atol=1e-5, rtol=1e-5)
        one.activate({"mix": 0.5, "sql": 2})
        torch.testing.assert_close(logits(model), beside, atol=1e-5, rtol=1e-5)
        one.remove("sql")
        torch.testing.assert_close(logits(model), alone, atol=1e-5, rtol=1e-5)
        one.remove("mix")
        assert one.names == () and not one.active


def test_a_recipe_of_recipes_multiplies_all_the_way(
    registry: Registry, model: Any, saved: Callable[[Mix], Path], tmp_path: Path
) -> None:
    inner = ingest.add(registry, saved({"sql": 0.5, "tone": 2}), "inner").added
    sql = registry.resolve("team/sql").id
    outer = Recipe((Part(inner.id, str(inner.ref), -2.0), Part(sql, "team/sql@1.0", 3.0)))
    (tmp_path / "outer.json").write_bytes(outer.dump())
    ingest.add(registry, tmp_path / "outer.json", "outer")
    with attach(model, {"sql": "team/sql", "tone": "team/tone"}, registry=registry) as found:
        found.activate({"sql": 3 - 1.0, "tone": -4})
        expected = logits(model)
    with attach(model, "outer", registry=registry):
        torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-5)


def test_blocks_are_kept(registry: Registry, model: Any, tmp_path: Path) -> None:
    names = ("sql", "gain")
    with attach(model, {n: f"team/{n}" for n in names}, registry=registry) as found:
        found.activate(Parallel(*names))
        expected, path = logits(model), found.save(tmp_path / "parallel.json")
        found.activate(Average(*names, weights=[0.25, 0.75]))
        weights, other = logits(model), found.save(tmp_path / "average.json")
    for place, wanted in ((path, expected), (other, weights)):
        with attach(model, {"a": place}, registry=registry) as one:
            assert torch.equal(logits(model), wanted)
            with pytest.raises(InvalidError, match="weight 1, alone"):
                one.activate({"a": 0.5})
            with pytest.raises(InvalidError, match="does not stand in a block"):
                one.activate(Stack("a"))


def test_parts_are_its_lineage_and_stay_while_it_is_there(
    registry: Registry, saved: Callable[[Mix], Path]
) -> None:
    ingest.add(registry, saved(MIX), "team/assistant", tags=["prod"])
    edges = registry.lineage("team/assistant").ancestors
    assert {(str(e.parent_ref), e.relation) for e in edges} == {
        (f"team/{name}@1.0", "part") for name in MIX
    }  # fmt: skip
    with pytest.raises(ConflictError, match="part of team/assistant@1.0") as caught:
        registry.rm("team/sql")
    assert "adapter rm team/assistant@1.0" in (caught.value.hint or "")
    (version,) = registry.list("team/assistant")
    assert version.facts.kind == "recipe" and version.n_files == 1
    assert describe("team/assistant", registry).kind == "recipe"
    registry.mv("team/sql", "team/query")
    with pytest.raises(ConflictError):
        registry.rm("team/query")
    registry.rm("team/assistant")
    registry.rm("team/query")


def test_a_copy_under_another_name_keeps_a_part(
    registry: Registry, saved: Callable[[Mix], Path], fixtures: Path, model: Any
) -> None:
    ingest.add(registry, saved(MIX), "mix")
    ingest.add(registry, fixtures / f"cases/{CASES['sql']}/adapter", "copy")
    registry.rm("team/sql")
    with attach(model, "mix", registry=registry), pytest.raises(ConflictError):
        registry.rm("copy")


def test_push_and_pull_bring_the_parts(
    registry: Registry, saved: Callable[[Mix], Path], tmp_path: Path, model: Any
) -> None:
    inner = ingest.add(registry, saved({"sql": 0.5, "tone": 2}), "inner").added
    gain = registry.resolve("team/gain").id
    outer = Recipe((Part(inner.id, "inner@1.0"), Part(gain, "team/gain@1.0", 0.5)))
    (tmp_path / "outer.json").write_bytes(outer.dump())
    ingest.add(registry, tmp_path / "outer.json", "outer")
    registry.mv("team/sql", "team/query")  # names change, digests do not
    remote = remotes.connect(f"file://{tmp_path}/remote", registry)
    plan = sync.plan_push(registry, "outer", remote)
    assert [str(part.ref) for part in plan.parts] == [
        "team/query@1.0", "team/tone@1.0", "inner@1.0", "team/gain@1.0",
    ]  # fmt: skip
    assert plan.size == sum(piece.size for piece in plan.pieces)
    sync.push(registry, plan, remote)
    assert sync.plan_push(registry, "outer", remote).pieces == ()
    with attach(model, "outer", registry=registry):
        expected = logits(model)
    with Registry(tmp_path / "elsewhere") as other:
        there = remotes.connect(f"file://{tmp_path}/remote", other)
        sync.pull(other, sync.plan_pull(other, there, "outer"), there, recheck=recheck)
        assert len(other.list()) == 5
        with attach(model, "outer", registry=other):
            assert torch.equal(logits(model), expected)
        assert sync.plan_pull(other, there, "outer").parts == ()


def test_a_recipe_whose_part_a_remote_lacks_is_not_pulled(
    registry: Registry, saved: Callable[[Mix], Path], tmp_path: Path
) -> None:
    import shutil

    ingest.add(registry, saved(MIX), "mix")
    remote = remotes.connect(f"file://{tmp_path}/remote", registry)
    sync.push(registry, sync.plan_push(registry, "mix", remote), remote)
    shutil.rmtree(tmp_path / "remote/refs/team/sql")
    with Registry(tmp_path / "elsewhere") as other:
        with pytest.raises(NotFoundError, match="lacks the part sha256:.*team/sql@1.0"):
            sync.plan_pull(other, remote, "mix")
        assert other.list() == []


def test_a_manifest_that_contradicts_its_recipe_is_not_believed(
    registry: Registry, saved: Callable[[Mix], Path]
) -> None:
    from dataclasses import replace

    ingest.add(registry, saved(MIX), "mix")
    manifest, files = registry.manifest("mix"), registry.files("mix")
    recheck(manifest, files)
    with pytest.raises(DamagedError, match="parents are not the parts"):
        recheck(replace(manifest, parents=manifest.parents[1:]), files)
    with pytest.raises(DamagedError, match="contradicts its recipe.json"):
        recheck(replace(manifest, adapter={**manifest.adapter, "parts": []}), files)


def test_every_part_is_checked(
    registry: Registry, saved: Callable[[Mix], Path], fixtures: Path
) -> None:
    ingest.add(registry, saved(MIX), "mix")
    good = check("mix", base=fixtures / "bases/llama", registry=registry)
    assert good.verdict == "fits" and not good.errors
    bad = check("mix", base=fixtures / "bases/llama_wide", registry=registry)
    assert bad.verdict == "incompatible"
    assert {f.tensor.partition(": ")[0] for f in bad.errors} == {f"team/{n}@1.0" for n in MIX}


def test_what_came_from_a_folder_is_no_part(model: Any, fixtures: Path, tmp_path: Path) -> None:
    folder = fixtures / f"cases/{CASES['sql']}/adapter"
    with attach(model, {"mine": folder}) as found:
        with pytest.raises(InvalidError, match="mine came from folders"):
            found.save(tmp_path / "recipe.json")
        found.activate([])
        with pytest.raises(InvalidError, match="nothing is active"):
            found.save(tmp_path / "recipe.json")
    assert not (tmp_path / "recipe.json").exists()


def test_a_recipe_is_never_written_over(saved: Callable[[Mix], Path], model: Any) -> None:
    path = saved(MIX)
    before = path.read_bytes()
    handle = attach(model, ())
    with pytest.raises(AdapterError):
        handle.save(path)
    handle.detach()
    assert path.read_bytes() == before


DIGEST = "sha256:" + "ab" * 32
GOOD: dict[str, Any] = {
    "schema": "adapterkit.recipe/1",
    "parts": [{"version": DIGEST, "name": "team/sql@1.0", "weight": 1}],
}


def part(**change: Any) -> dict[str, Any]:
    return GOOD | {"parts": [GOOD["parts"][0] | change]}


HOSTILE = {
    "no schema": (GOOD | {"schema": "adapterkit.recipe/9"}, "schema"),
    "a field more": (GOOD | {"code": "x"}, "code is no field"),
    "no parts": (GOOD | {"parts": []}, "1 to 256"),
    "too many": (GOOD | {"parts": GOOD["parts"] * (MAX_PARTS + 1)}, "list of 257"),
    "parts is text": (GOOD | {"parts": "all"}, "expected a list"),
    "a short digest": (part(version="sha256:ab"), "64 hex digits"),
    "a number for a digest": (part(version=5), "64 hex digits"),
    "weight NaN": (part(weight=math.nan), "finite number"),
    "weight infinite": (part(weight=math.inf), "finite number"),
    "weight true": (part(weight=True), "finite number"),
    "weight text": (part(weight="1"), "finite number"),
    "a name that is none": (part(name="../../etc"), "expected a reference"),
    "a part that is none": (GOOD | {"parts": [5]}, "not an object"),
    "a dialect": (GOOD | {"dialect": "french"}, "dialect"),
    "a composition": (GOOD | {"composition": [1]}, "composition"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_recipe_is_an_error_that_names_the_fault(tmp_path: Path, case: str) -> None:
    value, words = HOSTILE[case]
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(value))
    with Registry(tmp_path / "home") as registry, pytest.raises(DamagedError, match=words):
        ingest.add(registry, path, "bad")


@pytest.mark.parametrize(
    ("text", "error"),
    [("{", DamagedError), ("[]", DamagedError), ("", DamagedError), ('{"a":1,"a":2}', DamagedError),
     (json.dumps(GOOD), NotFoundError)],
)  # fmt: skip
def test_a_file_that_is_no_recipe_or_of_unknown_parts_is_refused(
    tmp_path: Path, text: str, error: type[AdapterError]
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with Registry(tmp_path / "home") as registry, pytest.raises(error, match="recipe.json"):
        ingest.add(registry, path, "bad")


BLOCKS: dict[str, dict[str, Any]] = {
    "an unknown block": {"block": "System", "children": [0]},
    "a part that is not there": {"block": "Stack", "children": [7]},
    "a setting it does not take": {"block": "Stack", "children": [0], "splits": 3},
    "no children": {"block": "Stack", "children": []},
    "a child that is text": {"block": "Stack", "children": ["sql"]},
}


@pytest.mark.parametrize("case", BLOCKS)
def test_a_hostile_composition_is_refused(
    registry: Registry, model: Any, tmp_path: Path, case: str
) -> None:
    sql = registry.resolve("team/sql").id
    recipe = Recipe((Part(sql, "team/sql@1.0"),), "exact", BLOCKS[case])
    (tmp_path / "recipe.json").write_bytes(recipe.dump())
    with pytest.raises(AdapterError):
        attach(model, tmp_path / "recipe.json", registry=registry)
    assert attached(model) is None


def test_nesting_is_bounded(registry: Registry, tmp_path: Path, model: Any) -> None:
    below = registry.resolve("team/sql").id
    for level in range(12):
        path = tmp_path / f"level{level}.json"
        path.write_bytes(Recipe((Part(below, ""),)).dump())
        try:
            below = ingest.add(registry, path, f"level{level}").added.id
        except InvalidError as error:
            assert "deeper than 8" in str(error)
            return
    pytest.fail("recipes nested without end")


numbers = st.floats(-1e9, 1e9).filter(lambda w: w == 0 or abs(w) > 1e-300)
drawn_parts = st.lists(
    st.tuples(st.integers(0, 2**256 - 1), st.sampled_from(["", "a/b@1.0", "x:prod"]), numbers),
    min_size=1, max_size=9,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(drawn=drawn_parts, dialect=st.sampled_from(["exact", "peft"]))
def test_a_recipe_read_back_is_the_same_and_has_one_form(drawn: list[Any], dialect: str) -> None:
    recipe = Recipe(tuple(Part(f"{id:064x}", name, w) for id, name, w in drawn), dialect)
    data = recipe.dump()
    assert Recipe.parse(data, "r") == recipe
    assert Recipe.parse(json.dumps(json.loads(data), indent=3).encode(), "r").dump() == data


def test_one_adapter_is_expected_where_a_recipe_is_given(
    registry: Registry, saved: Callable[[Mix], Path]
) -> None:
    from adapterkit.hub import convert, diff

    ingest.add(registry, saved(MIX), "mix")
    acts = (lambda: convert("mix", registry=registry), lambda: diff("mix", "team/sql", registry))
    for act in acts:
        with pytest.raises(InvalidError, match="is a recipe of 3 adapters"):
            act()

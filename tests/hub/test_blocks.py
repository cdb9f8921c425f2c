"""Compositions of AdapterHub: values, what may stand in what, and what they compute."""

from __future__ import annotations

import json
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit.hub import (
    Average,
    BatchSplit,
    Fuse,
    Parallel,
    Split,
    Stack,
    attach,
    attached,
    describe,
    load,
)
from adapterkit.hub.compose import blocks
from adapterkit.hub.compose.blocks import Block, require_valid
from adapterkit.registry.errors import (
    AdapterError,
    AdapterWarning,
    ConflictError,
    DamagedError,
    InvalidError,
    NotFoundError,
)

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
DATA = Path(os.environ.get("ADAPTERKIT_FIXTURES") or Path(__file__).parents[1] / "data").resolve()
CASES = [
    case
    for case in json.loads((DATA / "index.json").read_text())["cases"]
    if case["operation"]["op"] == "compose"
]
FUSION, FUSED = "adapter_fusion_config.json", "model_adapter_fusion.safetensors"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
NAMES = ("a", "b", "c", "h1", "l1", "l3", "inv")


@lru_cache
def model() -> Any:
    """One for all tests: each finds it as the one before had to leave it."""
    path = DATA / "bases" / "bert"
    return transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()


def batch() -> dict[str, Tensor]:
    stored = load_file(DATA / "inputs" / "bert.safetensors")
    return {name: stored[name] for name in INPUTS if name in stored}


def logits(**changed: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model()(**{**batch(), **changed}).logits
    return found


def sources(*names: str) -> dict[str, Path]:
    found = {name: DATA / "adapters" / f"bert_ah_{name}" for name in names}
    own = {"inv": DATA / "cases" / "bert.ah_seq_bn_inv" / "adapter"}
    return {**found, **{name: path for name, path in own.items() if name in names}}


def composed(setup: Any, *names: str, **more: Path) -> Tensor:
    with attach(model(), {**sources(*names), **more}) as adapters:
        adapters.activate(setup)
        return logits()


def block(spec: dict[str, Any]) -> Any:
    """The value that a case describes."""
    if spec["type"] == "single":
        return spec["children"][0]
    children = [block(child) for child in spec["children"]]
    return getattr(blocks, spec["type"])(*children, **spec.get("kwargs", {}))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_every_case_gives_the_logits_of_its_reference(case: dict[str, Any]) -> None:
    """The library divides an Average by the number of its adapters once more than it should: there
    the weighted sum that it means is compared, which the case has beside its own result."""
    folders = {adapter["name"]: DATA / adapter["path"] for adapter in case["adapters"]}
    if "fusion" in case["operation"]:
        folders["fusion"] = DATA / case["operation"]["fusion"]
    before = logits()
    with attach(model(), folders) as adapters:
        adapters.activate(block(case["operation"]["setup"]))
        found = logits()
    name = "logits_intended" if "reference_bug" in case["tags"] else "logits"
    expected = load_file(DATA / case["expected"]["file"])[name]
    assert (found - expected).abs().max() <= case["compare"]["atol"]
    assert torch.equal(logits(), before)


# Laws.


def test_one_name_is_that_adapter_alone() -> None:
    alone = composed(["a"], "a", "b")
    for setup in (Stack("a"), Average("a"), Parallel("a"), BatchSplit("a", batch_sizes=4)):
        torch.testing.assert_close(composed(setup, "a", "b"), alone)


@pytest.mark.parametrize("first", ["a", Stack("inv", "c"), Average("a", "h1"), Stack("l1", "h1")])
@pytest.mark.parametrize("second", ["h1", Stack("b", "l3"), "inv"])
def test_rows_get_what_their_part_alone_gives(first: Any, second: Any) -> None:
    """Whatever the parts are made of: the library takes the wiring of the first for all."""
    one, other = composed(of(first), *NAMES), composed(of(second), *NAMES)
    split = composed(BatchSplit(first, second, batch_sizes=[1, 3]), *NAMES)
    torch.testing.assert_close(split, torch.cat([one[:1], other[1:]]), atol=1e-5, rtol=1e-5)
    both = composed(Parallel(first, second), *NAMES)
    torch.testing.assert_close(both, torch.cat([one, other]), atol=1e-5, rtol=1e-5)


def of(part: Any) -> Any:
    return [part] if isinstance(part, str) else part


def test_a_stack_of_a_parallel_is_a_parallel_of_stacks() -> None:
    found = composed(Stack("c", Parallel("a", "l1")), *NAMES)
    expected = composed(Parallel(Stack("c", "a"), Stack("c", "l1")), *NAMES)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_an_average_of_loras_is_their_weighted_sum() -> None:
    found = composed(Average("l1", "l3", weights=[1, 3]), *NAMES)
    expected = composed({"l1": 0.25, "l3": 0.75}, *NAMES)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    raw = Average("l1", "l3", weights=[2, -1], normalize_weights=False)
    torch.testing.assert_close(
        composed(raw, *NAMES), composed({"l1": 2, "l3": -1}, *NAMES), atol=1e-5, rtol=1e-5
    )


def test_a_stack_of_loras_is_not_their_sum() -> None:
    """The second reads what the first gives: y = W x + s2 B2 A2 (s1 B1 A1 x)."""
    path = "bert.encoder.layer.0.attention.self.query"
    factors = []
    for name in ("l1", "l3"):
        stored = load_file(DATA / "adapters" / f"bert_ah_{name}" / "adapter.safetensors")
        config = json.loads((DATA / "adapters" / f"bert_ah_{name}/adapter_config.json").read_text())
        alpha, r = config["config"]["alpha"], config["config"]["r"]
        a, b = (stored[f"{path}.loras.{config['name']}.lora_{part}"] for part in "AB")
        factors.append(alpha / r * b.double() @ a.double())
    query, x = model().get_submodule(path), torch.randn(3, 64)
    with attach(model(), sources("l1", "l3")) as adapters, torch.inference_mode():
        plain = logits()
        adapters.activate(Stack("l1", "l3"))
        found = query(x)
        assert (logits() - plain).abs().max() > 1e-3
    expected = query(x).double() + x.double() @ (factors[1] @ factors[0]).T
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_tokens_get_what_their_part_gives_at_every_place() -> None:
    whole = composed(["a"], "a", "b")
    tokens = batch()["input_ids"].shape[1]
    same = Split("a", "a", splits=[4, tokens - 4])
    torch.testing.assert_close(composed(same, "a", "b"), whole, atol=1e-5, rtol=1e-5)
    one, other = (composed(Split(*pair, splits=[4, tokens - 4]), "a", "b") for pair in ("ab", "ba"))
    assert (one - other).abs().max() > 1e-3


def test_a_head_of_a_stack_is_that_of_its_last_adapter(tmp_path: Path) -> None:
    folders = {}
    for name, value in (("a", 1.0), ("b", 2.0)):
        folder = tmp_path / name
        shutil.copytree(DATA / "adapters" / f"bert_ah_{name}", folder)
        head = {"classifier.weight": torch.full((3, 64), value), "classifier.bias": torch.ones(3)}
        save_file(head, folder / "model_head.safetensors")
        (folder / "head_config.json").write_text(
            json.dumps(
                {"config": None, "hidden_size": 64, "label2id": {"A": 0, "B": 1, "C": 2},
                 "model_class": "BertForSequenceClassification", "model_name": "bases/bert",
                 "model_type": "bert", "name": None, "num_labels": 3,
                 "version": "adapters.1.3.0"}
            )
        )  # fmt: skip
        folders[name] = folder
    classifier, x = model().classifier, torch.ones(4, 64)
    with attach(model(), folders) as adapters, torch.inference_mode():
        adapters.activate(Stack("a", "b"))
        assert classifier(x)[:, 0].tolist() == [129.0] * 4
        adapters.activate(BatchSplit("a", "b", batch_sizes=[1, 3]))
        assert classifier(x)[:, 0].tolist() == [65.0, 129.0, 129.0, 129.0]


# Values, and what may stand in what.


def test_blocks_are_values() -> None:
    setup = Stack("a", Fuse("b", "c", name="f"), BatchSplit("a", "b", batch_sizes=2))
    split = "BatchSplit('a', 'b', batch_sizes=[2, 2])"
    assert repr(setup) == f"Stack('a', Fuse('b', 'c', name='f'), {split})"
    assert eval(repr(setup)) == setup
    assert hash(setup) == hash(eval(repr(setup)))
    assert list(setup) == ["a", "b", "c", "a", "b"]
    assert Average("a", "b", weights=[1, 3]) == Average("a", "b", weights=[2, 6])


KINDS = ("Stack", "Fuse", "Parallel", "Split", "BatchSplit", "Average")
# adapters 1.3 `composition.py`, ALLOWED_NESTINGS.
ALLOWED = {
    "Stack": {"Fuse", "Split", "Parallel", "BatchSplit", "Average"},
    "Fuse": {"Stack"},
    "Split": {"Split", "Stack", "BatchSplit", "Average"},
    "Parallel": {"Stack", "BatchSplit", "Average"},
    "BatchSplit": {"Stack", "Split", "BatchSplit", "Average"},
    "Average": {"Stack", "Split", "BatchSplit"},
}
SETTINGS: dict[str, dict[str, Any]] = {"Split": {"splits": 2}, "BatchSplit": {"batch_sizes": 2}}


def make(kind: str, *children: str | Block) -> Block:
    extra = {"batch_sizes": 1} if kind == "BatchSplit" and children == ("a", "b") else {}
    made: Block = getattr(blocks, kind)(*children, **{**SETTINGS.get(kind, {}), **extra})
    return made


@pytest.mark.parametrize("outer", KINDS)
@pytest.mark.parametrize("inner", KINDS)
def test_what_may_stand_in_what_is_the_rule_of_the_library(outer: str, inner: str) -> None:
    setup = make(outer, make(inner, "a", "b"), "c")
    if inner in ALLOWED[outer]:
        require_valid(setup)
    else:
        with pytest.raises(InvalidError, match=rf"{inner}\(.*stands in a {outer}, which takes"):
            require_valid(setup)


def test_a_block_that_stands_too_deep_is_named() -> None:
    require_valid(Stack("a", BatchSplit(Stack("a", "b"), "c", batch_sizes=1)))
    deep = Stack("a", BatchSplit(Average("a", "b"), "c", batch_sizes=1))
    with pytest.raises(InvalidError, match=r"Average\('a', 'b'.*nested too deep"):
        require_valid(deep)


@pytest.mark.parametrize(
    ("make_one", "named"),
    [
        (lambda: Stack(), "composes nothing"),
        (lambda: Stack("a", 3), "found 3"),
        (lambda: Split("a", "b", splits=[1]), "splits is"),
        (lambda: Split("a", "b", splits=[1, -1]), "splits is"),
        (lambda: BatchSplit("a", "b", batch_sizes=[True, 1]), "batch_sizes is"),
        (lambda: BatchSplit("a", "b", batch_sizes=0), "batch_sizes is"),
        (lambda: Average("a", "b", weights=[1]), "weights are"),
        (lambda: Average("a", "b", weights=[1, float("nan")]), "weights are"),
        (lambda: Average("a", "b", weights=[1, -1]), "sum is 0"),
        (lambda: Fuse("a", "b", name=3), "name of a fusion is 3"),
    ],
)
def test_a_value_that_means_nothing_is_refused(make_one: Any, named: str) -> None:
    with pytest.raises(InvalidError, match=named):
        make_one()


@given(st.recursive(st.sampled_from(NAMES), lambda inner: st.builds(
    lambda kind, children: make(kind, *children),
    st.sampled_from(KINDS), st.lists(inner, min_size=1, max_size=3)), max_leaves=6))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_any_nesting_is_valid_or_refused_by_name(setup: Any) -> None:
    if isinstance(setup, str):
        return
    try:
        require_valid(setup)
    except InvalidError as error:
        assert any(kind in str(error) for kind in KINDS)


# What cannot be.


@pytest.mark.parametrize(
    ("setup", "error", "named"),
    [
        (Stack("a", "x"), NotFoundError, "no adapter is attached as x"),
        (Fuse("a", "b"), NotFoundError, "no fusion of a, b is attached"),
        (Fuse("a", "b", name="x"), NotFoundError, "no fusion is attached as x"),
        (Fuse("a", "b", name="c"), InvalidError, "c, which .* names, is no fusion"),
        (Parallel("a", Parallel("b", "c")), InvalidError, "stands in a Parallel"),
        (Stack(Parallel("a", "b"), Parallel("a", "b", "c")), InvalidError, "not of one"),
        (Fuse("a", "inv", name="c"), InvalidError, "is no fusion"),
        (Split("a", "l1", splits=7), InvalidError, "is of bottlenecks, but l1 changes modules"),
        (BatchSplit(BatchSplit("a", "b", batch_sizes=1), "c", batch_sizes=3), InvalidError,
         "rows of its BatchSplit"),
    ],
)  # fmt: skip
def test_a_setup_that_cannot_be_is_refused_before_anything_changes(
    setup: Any, error: type[AdapterError], named: str
) -> None:
    with attach(model(), sources(*NAMES)) as adapters:
        adapters.activate(["a"])
        before = logits()
        with pytest.raises(error, match=named):
            adapters.activate(setup)
        assert torch.equal(logits(), before)
        assert dict(adapters.active) == {"a": 1.0}


def test_sizes_that_are_not_those_of_the_batch_are_named() -> None:
    with attach(model(), sources("a", "b", "l1")) as adapters:
        for pair in (("a", "b"), ("l1", "b")):
            adapters.activate(BatchSplit(*pair, batch_sizes=[1, 1]))
            with pytest.raises(InvalidError, match=r"batch_sizes \[1, 1\] are 2 rows, found 4"):
                logits()
        adapters.activate(Split("a", "b", splits=[2, 3]))
        with pytest.raises(InvalidError, match=r"splits 5 tokens into \[2, 3\]"):
            logits()


def test_an_adapter_of_the_context_stands_in_a_stack() -> None:
    folders = {**sources("a"), "p1": DATA / "adapters" / "bert_ah_p1"}
    with attach(model(), folders) as adapters:
        adapters.activate(Stack("p1", "a"))
        with pytest.raises(InvalidError, match="p1 adds to the context, so it stands in a Stack"):
            adapters.activate(BatchSplit("p1", "a", batch_sizes=2))


def test_what_is_composed_cannot_be_removed_and_the_rest_can() -> None:
    with attach(model(), sources("a", "b", "c")) as adapters:
        adapters.activate(Stack("a", "b"))
        before = logits()
        with pytest.raises(ConflictError, match=r"b is part of Stack\('a', 'b'\)"):
            adapters.remove("b")
        adapters.remove("c")
        assert adapters.names == ("a", "b")
        assert torch.equal(logits(), before)
        adapters.activate(["a"])
        adapters.remove("b")


def test_parallel_copies_whatever_has_a_row_for_each_of_the_batch() -> None:
    with attach(model(), sources("a", "b")) as adapters:
        adapters.activate(Parallel("a", "b"))
        labels = torch.zeros(4, dtype=torch.long)
        with torch.inference_mode():
            found = model()(**batch(), labels=labels)
        assert found.logits.shape == (8, 3)
        expected = torch.nn.functional.cross_entropy(found.logits, torch.zeros(8, dtype=torch.long))
        torch.testing.assert_close(found.loss, expected)


def test_parallel_does_not_follow_a_cache() -> None:
    base = DATA / "bases" / "gpt2"
    decoder: Any = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    source = DATA / "cases" / "gpt2.ah_par_bn" / "adapter"
    ids = torch.arange(3, 15).reshape(2, 6)
    with attach(decoder, {"a": source, "b": source}) as adapters, torch.inference_mode():
        adapters.activate(["a"])
        alone = decoder(ids).logits
        adapters.activate(Parallel("a", "b"))
        torch.testing.assert_close(decoder(ids).logits, torch.cat([alone, alone]))
        with pytest.raises(InvalidError, match="Parallel repeats the batch"):
            decoder.generate(ids, max_new_tokens=2)


@pytest.mark.parametrize("beams", [1, 2])
def test_rows_generate_what_their_adapter_alone_would(beams: int) -> None:
    base = DATA / "bases" / "gpt2"
    decoder: Any = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    folders = {"a": DATA / "cases" / "gpt2.ah_par_bn" / "adapter",
               "l": DATA / "cases" / "gpt2.lora_c_attn" / "adapter"}  # fmt: skip
    ids = torch.arange(3, 18).reshape(3, 5)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False}
    with attach(decoder, folders) as adapters:
        alone = []
        for name in ("a", "l"):
            adapters.activate([name])
            alone.append(decoder.generate(ids, **settings))
        adapters.activate(BatchSplit("a", "l", batch_sizes=[beams, 2 * beams]))
        found = decoder.generate(ids, **settings)
        if beams > 1:
            adapters.activate(BatchSplit("a", "l", batch_sizes=[1, 2]))
            with pytest.raises(InvalidError, match=r"are 3 rows, found 6"):
                decoder.generate(ids, **settings)
    assert torch.equal(found, torch.cat([alone[0][:1], alone[1][1:]]))


# Fusions.


@pytest.fixture
def fusion(tmp_path: Path) -> Any:
    """`fusion(edit, field=value)`: a copy of the fusion of a and b."""

    def copy(edit: Any = None, **config: Any) -> Path:
        folder = tmp_path / f"fusion{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        start = DATA / "cases" / "bert.ah_fuse" / "fusion"
        tensors = load_file(start / FUSED)
        if edit is not None:
            edit(tensors)
        save_file(tensors, folder / FUSED)
        outer = json.loads((start / FUSION).read_text())
        fields = {**outer["config"], **config}
        outer["config"] = {name: value for name, value in fields.items() if value is not ...}
        (folder / FUSION).write_text(json.dumps(outer))
        return folder

    return copy


def test_a_fusion_is_found_by_what_it_joins_or_by_its_name(fusion: Any) -> None:
    folders = {**sources("a", "b"), "f": fusion()}
    expected = load_file(DATA / "cases" / "bert.ah_fuse" / "expected.safetensors")["logits"]
    with attach(model(), folders) as adapters:
        assert dict(adapters.active) == {"a": 1.0, "b": 1.0}  # a fusion does nothing by itself
        assert adapters.joined("f") == ("a", "b")
        for setup in (Fuse("a", "b"), Fuse("a", "b", name="f")):
            adapters.activate(setup)
            torch.testing.assert_close(logits(), expected, atol=2e-4, rtol=0)
        with pytest.raises(ConflictError, match="f is part of"):
            adapters.remove("f")
        with pytest.raises(InvalidError, match="f joins a, b"):
            adapters.activate(["f"])
        with pytest.raises(NotFoundError, match="no fusion of b, a"):
            adapters.activate(Fuse("b", "a"))
        adapters.add("g", fusion())
        with pytest.raises(InvalidError, match="several fusions join .*f, g"):
            adapters.activate(Fuse("a", "b"))
    with attach(model(), {"x": folders["a"], "y": folders["b"], "f": folders["f"]}) as adapters:
        adapters.activate(Fuse("x", "y", name="f"))
        torch.testing.assert_close(logits(), expected, atol=2e-4, rtol=0)
    assert describe(folders["f"]).variant == "fusion of a, b"


def test_a_fusion_is_loaded_beside_what_it_joins(fusion: Any) -> None:
    folders = [*sources("a", "b").values(), fusion()]
    with pytest.warns(AdapterWarning, match="joins a, b: it acts in a Fuse only"):
        loaded = load(DATA / "bases" / "bert", adapters=folders, dtype=torch.float32)
    adapters = attached(loaded)
    assert adapters is not None
    one, two, joins = adapters.names
    assert dict(adapters.active) == {one: 1.0, two: 1.0}
    adapters.activate(Fuse(one, two, name=joins))
    with torch.inference_mode():
        found = loaded(**batch()).logits
    expected = load_file(DATA / "cases" / "bert.ah_fuse" / "expected.safetensors")["logits"]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


MIXINGS: dict[str, dict[str, Any]] = {
    "static": {"value": False},
    "value after the sum": {"value_before_softmax": False},
    "query before the norm": {"query_before_ln": True},
    "residual in each": {"residual_before": True},
    "no query, no key": {"query": False, "key": False},
}


@pytest.mark.parametrize("config", MIXINGS.values(), ids=list(MIXINGS))
def test_a_fused_layer_is_what_the_formula_says(fusion: Any, config: dict[str, Any]) -> None:
    """By hand, from adapters 1.3 `methods/modeling.py`, at the output place of layer 0."""
    path = "bert.encoder.layer.0.output"
    layer = model().get_submodule("bert.encoder.layer.0")

    def edit(tensors: dict[str, Tensor]) -> None:
        for part in ("query", "key", "value"):
            for key in [k for k in tensors if f".{part}." in k and config.get(part) is False]:
                del tensors[key]

    folder = fusion(edit, **config)
    stored = load_file(folder / FUSED)
    m = {key.rpartition("a,b.")[2]: t for key, t in stored.items() if key.startswith(path)}
    seen: dict[str, Any] = {}
    handles = [
        layer.output.register_forward_hook(lambda _, args, out: seen.update(x0=args[1], y=out)),
        layer.output.dense.register_forward_hook(lambda _, args, out: seen.update(h=out)),
    ]
    with attach(model(), {**sources("a", "b"), "f": folder}) as adapters, torch.inference_mode():
        adapters.activate(Fuse("a", "b"))
        logits()
        h, x0, found = seen["h"], seen["x0"], seen["y"]
        norm = layer.output.LayerNorm
        z = norm(h + x0)
        ups = torch.stack([up(name, path, z) for name in "ab"], dim=2)
        if config.get("residual_before"):
            ups = ups + h[:, :, None]
        q = h if config.get("query_before_ln") else z
        if "query.weight" in m:
            q = q @ m["query.weight"].T + m["query.bias"]
        k = ups @ m["key.weight"].T + m["key.bias"] if "key.weight" in m else ups
        shares = torch.softmax(torch.einsum("btd,btnd->btn", q, k), dim=-1)
        v = ups @ m["value.weight"].T if "value.weight" in m else ups  # linear: before or after
        mixed = torch.einsum("btn,btnd->btd", shares, v)
        y = mixed if config.get("residual_before") else mixed + h
        torch.testing.assert_close(found, norm(y + x0), atol=1e-5, rtol=1e-5)
    for handle in handles:
        handle.remove()


def up(name: str, path: str, z: Tensor) -> Tensor:
    stored = load_file(DATA / "adapters" / f"bert_ah_{name}" / "adapter.safetensors")
    p = {k.rpartition(f".{name}.")[2]: t for k, t in stored.items() if k.startswith(path)}
    hidden = torch.relu(z @ p["adapter_down.0.weight"].T + p["adapter_down.0.bias"])
    return hidden @ p["adapter_up.weight"].T + p["adapter_up.bias"]


def test_every_tensor_of_a_fusion_counts(fusion: Any) -> None:
    keys = list(load_file(DATA / "cases" / "bert.ah_fuse" / "fusion" / FUSED))
    for key in keys[:5]:
        with pytest.raises(AdapterError, match="missing-tensor"):
            attach(model(), fusion(lambda t, key=key: t.pop(key)))
        with pytest.raises(AdapterError, match=f"{key}_x"):
            attach(model(), fusion(lambda t, key=key: t.update({f"{key}_x": t.pop(key)})))
        with pytest.raises(AdapterError, match=key.replace(".", r"\.")):
            attach(model(), fusion(lambda t, key=key: t.update({key: t[key][:-1]})))
    twice = keys[0].replace(".output.", ".output_adapters.")
    with pytest.raises(AdapterError, match=r"output_adapters.*unexpected-tensor"):
        attach(model(), fusion(lambda t: t.update({twice: t[keys[0]].clone()})))
    layer = "bert.encoder.layer.1."

    def first_layer_only(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(layer)]:
            del tensors[key]

    with pytest.raises(AdapterError, match="layer.1.output.*missing"):
        attach(model(), fusion(first_layer_only))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"query": ...}, "query is None"), ({"key": "x"}, "key is 'x'"),
        ({"residual_before": 1}, "residual_before is 1"), ({"temperature": True}, "temperature"),
        ({"value_before_softmax": "x"}, "value_before_softmax"), ({"new": 3}, "new"),
        ({"query": False, "key": False, "value": False}, "without query, key and value"),
    ],
)  # fmt: skip
def test_a_wrong_config_of_a_fusion_is_named(fusion: Any, config: Any, named: str) -> None:
    with pytest.raises((DamagedError, NotFoundError, AdapterError), match=f"(?s){named}"):
        attach(model(), fusion(**config))


def test_an_invertible_adapter_is_not_fused(fusion: Any) -> None:
    with attach(model(), {**sources("a", "inv"), "f": fusion()}) as adapters:
        with pytest.raises(InvalidError, match="joins bottlenecks, found an invertible one"):
            adapters.activate(Fuse("a", "inv", name="f"))
        adapters.activate(Stack("inv", "a"))


def test_a_fusion_needs_its_matrices_wherever_its_adapters_act(fusion: Any) -> None:
    folders = {**sources("a", "h1"), "f": fusion()}
    with attach(model(), folders) as adapters:
        before = logits()
        with pytest.raises(InvalidError, match="lacks .* at bert.encoder.layer.0.attention"):
            adapters.activate(Fuse("a", "h1", name="f"))
        assert torch.equal(logits(), before)

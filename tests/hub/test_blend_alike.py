"""Blends of adapters that are no changes of weights: of each kind as one of that kind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from adapterkit.hub import attach, blend
from adapterkit.hub.ingest import add
from adapterkit.hub.locate import locate
from adapterkit.hub.mixing.rebuild import rebuild
from adapterkit.hub.read import read_adapter
from adapterkit.hub.tensors import read_finite
from adapterkit.registry import Registry
from adapterkit.registry.errors import InvalidError, MismatchError

DATA = Path(os.environ.get("ADAPTERKIT_FIXTURES") or Path(__file__).parents[1] / "data").resolve()
CASES: list[dict[str, Any]] = json.loads((DATA / "index.json").read_text())["cases"]
AVERAGES = [case for case in CASES if case["operation"]["op"] == "average_adapter"]
CONTEXTS = [case for case in CASES if case["kind"] == "multi_prompt"]
TOKENS = torch.tensor([[1, 20, 33, 7, 90, 4]])
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
SVD = "lora_delta_w_svd"
pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")


def by_id(cases: list[dict[str, Any]]) -> Any:
    return pytest.mark.parametrize("case", [pytest.param(c, id=c["id"]) for c in cases])


def of(case: dict[str, Any]) -> list[tuple[Path, float]]:
    paths = [DATA / adapter["path"] for adapter in case["adapters"]]
    return list(zip(paths, case["operation"].get("weights", [1.0] * len(paths)), strict=True))


def logits(case: dict[str, Any], folder: Path, **options: Any) -> Tensor:
    load_as = getattr(transformers, case["base_load"]["class"])
    model = load_as.from_pretrained(DATA / case["base_path"]).eval()
    inputs = load_file(DATA / case["inputs"]["file"])
    with attach(model, [folder], **options), torch.inference_mode():
        return model(**{name: inputs[name] for name in INPUTS if name in inputs}).logits


def require_close(found: Tensor, case: dict[str, Any]) -> None:
    """At the real tokens, where there are others."""
    expected = load_file(DATA / case["expected"]["file"])["logits"]
    if case["compare"]["mask"]:
        virtual = found.shape[1] - load_file(DATA / case["inputs"]["file"])["input_ids"].shape[1]
        mask = load_file(DATA / case["inputs"]["file"])["attention_mask"].bool()
        mask = torch.cat([torch.ones(len(mask), virtual, dtype=torch.bool), mask], dim=1)
        found, expected = found[mask], expected[mask]
    torch.testing.assert_close(found, expected, atol=case["compare"]["atol"], rtol=0)


def tensors(folder: Path) -> dict[tuple[str, str], Tensor]:
    return read_finite(read_adapter(locate(folder, None)))


# AdapterHub


@by_id(AVERAGES)
def test_average_adapter_is_reproduced(case: dict[str, Any], tmp_path: Path) -> None:
    asked = case["operation"]
    chosen = {"rank": asked["svd_rank"]} if "svd_rank" in asked else {}
    made = blend(of(case), method=asked["combine_strategy"], dialect="adapters", **chosen)
    folder = made.save(tmp_path / "made")
    require_close(logits(case, folder), case)
    theirs = tensors(DATA / case["expected"]["adapter"])
    ours = tensors(folder)
    if asked["combine_strategy"] == SVD:  # singular vectors have no sign of their own
        ours, theirs = products(ours), products(theirs)
    assert ours.keys() == theirs.keys()
    for place, tensor in theirs.items():
        torch.testing.assert_close(ours[place], tensor, atol=1e-6, rtol=1e-6)


def products(held: dict[tuple[str, str], Tensor]) -> dict[tuple[str, str], Tensor]:
    return {(m, "BA"): held[m, "B"] @ t for (m, role), t in held.items() if role == "A"}


@by_id([case for case in AVERAGES if case["operation"]["combine_strategy"] == "linear"])
def test_an_average_is_of_what_an_adapter_does_where_that_is_a_change_of_a_weight(
    case: dict[str, Any], tmp_path: Path
) -> None:
    """Of LoRA the library averages A and B apart, so that products of one's B with the other's A
    come in; of what is no change of a weight both average tensor by tensor."""
    theirs = tensors(DATA / case["expected"]["adapter"])
    ours = tensors(blend(of(case), method="average").save(tmp_path / "made"))
    if not any(role == "A" for _, role in theirs):
        assert all(torch.equal(ours[place], tensor) for place, tensor in theirs.items())
        return
    whole = {}
    for path, weight in of(case):
        scale = json.loads((path / "adapter_config.json").read_text())["config"]
        for place, product in products(tensors(path)).items():
            change = weight * scale["alpha"] / scale["r"] * product
            whole[place] = whole[place] + change if place in whole else change
    for place, change in products(ours).items():
        torch.testing.assert_close(change, whole[place], atol=1e-6, rtol=1e-5)
    assert any(
        (2 * product - whole[place]).norm() > 0.1 * whole[place].norm()
        for place, product in products(theirs).items()
    )


LORAS = [(DATA / "adapters/bert_ah_l1", 0.6), (DATA / "adapters/bert_ah_l2", 0.4)]


@pytest.mark.parametrize("rank", [2, 4, 16])
def test_the_svd_of_the_library_is_off_by_the_ratio_of_ranks(rank: int, tmp_path: Path) -> None:
    """It keeps alpha (8) and divides by the new rank; `svd` is the sum's best approximation."""
    theirs = tensors(
        blend(LORAS, method=SVD, dialect="adapters", rank=rank).save(tmp_path / "theirs")
    )
    config = json.loads((tmp_path / "theirs/adapter_config.json").read_text())["config"]
    assert (config["r"], config["alpha"]) == (rank, 8)
    ours = tensors(blend(LORAS, method="svd", rank=rank).save(tmp_path / "ours"))
    for place, product in products(theirs).items():
        scaled = config["alpha"] / config["r"] * product
        right = products(ours)[place]
        torch.testing.assert_close(scaled, 4 / rank * right, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "chosen", "words"),
    [
        (LORAS, {"method": SVD}, "needs a rank"),
        (LORAS, {"method": "linear", "rank": 3}, "takes no rank"),
        (LORAS, {"method": "sum"}, "no method sum in the dialect adapters"),
        ([(DATA / "adapters/bert_ah_a", 1.0)], {"method": SVD, "rank": 2}, "for LoRA alone"),
        ([(DATA / "adapters/llama_A", 1.0)], {"method": "linear"}, "AdapterHub's folders"),
    ],
)
def test_the_dialect_refuses_what_the_library_has_not(
    given: Any, chosen: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidError, match=words):
        blend(given, dialect="adapters", **chosen)


LIBRARY = [
    case
    for case in CASES
    if case["operation"]["op"] == "forward"
    and [adapter["format"] for adapter in case["adapters"]] == ["adapters"]
]


@by_id(LIBRARY)
def test_every_tensor_of_the_library_is_averaged(case: dict[str, Any], tmp_path: Path) -> None:
    """Invertible adapters, shared parameters, gates and repeated prefixes too: of the invertible
    ones the library loses all in a model with a head (adapters 1.3)."""
    path = DATA / case["adapters"][0]["path"]
    if not tensors_are_alone(path):
        pytest.skip("a head is beside it")
    other = changed(path, tmp_path / "other", lambda tensor: tensor.flip(0) / 2)
    made = blend([(path, 2.0), (other, -1.0)], method="linear", dialect="adapters")
    first, second, found = tensors(path), tensors(other), read_finite(made.adapter)
    assert found.keys() == first.keys()
    for place, tensor in found.items():
        torch.testing.assert_close(tensor, 2 * first[place] - second[place], atol=1e-6, rtol=1e-6)


def tensors_are_alone(path: Path) -> bool:
    return set(read_adapter(locate(path, None)).files.values()) == {"config", "weights"}


def test_an_averaged_folder_can_be_loaded_beside_what_it_was_made_of(tmp_path: Path) -> None:
    """The library loads an adapter under the name in its config, and replaces one of that name."""
    made = blend([(DATA / "adapters/bert_ah_p1", 0.5), (DATA / "adapters/bert_ah_p2", 0.5)],
                 method="average")  # fmt: skip
    folder = made.save(tmp_path / "made")
    assert json.loads((folder / "adapter_config.json").read_text())["name"] == "adapter"
    keys = load_file(folder / "adapter.safetensors").keys()
    assert keys and not any(".p1." in key or ".p2." in key for key in keys)
    assert all(".adapter." in key for key in keys)


def test_only_adapters_of_one_config_are_averaged(tmp_path: Path) -> None:
    a, h = DATA / "adapters/bert_ah_a", DATA / "adapters/bert_ah_h1"
    with pytest.raises(MismatchError, match="not of one config"):
        blend({a: 0.5, h: 0.5}, method="average")
    wide = tmp_path / "wide"
    shutil.copytree(a, wide)
    config = json.loads((a / "adapter_config.json").read_text())
    config["config"] |= {"scaling": 2.0}
    (wide / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match="scaling is 2.0, not 1.0|scaling is 1.0, not 2.0"):
        blend({a: 0.5, wide: 0.5}, method="average")
    config["config"] |= {"scaling": 1.0, "dropout": 0.5}  # of training alone
    (wide / "adapter_config.json").write_text(json.dumps(config))
    made = blend({a: 0.5, wide: 0.5}, method="average").save(tmp_path / "made")
    assert tensors(made).keys() == tensors(a).keys()


def test_weights_by_module_are_in_the_recipe_in_the_order_of_its_inputs(tmp_path: Path) -> None:
    with Registry(tmp_path / "home") as registry:
        for name in ("A", "B"):
            add(registry, DATA / f"adapters/llama_{name}", f"team/{name.lower()}")
        for order in (["team/a", "team/b"], ["team/b", "team/a"]):
            made = blend(order, registry=registry, at={"layers.0": [2.0, 0.5]})
            assert rebuild(str(made.add(registry, "team/mix").ref), registry=registry).same


# Prompts and prefixes


@by_id(CONTEXTS)
def test_prompts_are_averaged_and_concatenated(case: dict[str, Any], tmp_path: Path) -> None:
    method = "average" if "weights" in case["operation"] else "sum"
    folder = blend(of(case), method=method).save(tmp_path / "made")
    virtual = "virtual" in case["compare"]["mask"]
    require_close(logits(case, folder, virtual_outputs=virtual), case)
    expected = load_file(DATA / case["expected"]["file"])["prompt_embeddings"]
    found = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def llama() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(DATA / "bases/llama").eval()


def run(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits.double()


def together(model: Any, weights: dict[Path, float]) -> Tensor:
    with attach(model, {str(path): path for path in weights}) as adapters:
        adapters.activate({str(path): weight for path, weight in weights.items()})
        return run(model)


def alone(model: Any, folder: Path) -> Tensor:
    with attach(model, [folder]):
        return run(model)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_one_behind_the_other_is_both_attached(llama: Any, kind: str, tmp_path: Path) -> None:
    one, two = (DATA / f"adapters/llama_{kind}{n}" for n in (1, 2))
    made = blend({two: 1.0, one: 1.0})
    expected = together(llama, {two: 1.0, one: 1.0})
    folder = made.save(tmp_path / "made")
    torch.testing.assert_close(alone(llama, folder), expected, atol=2e-5, rtol=0)
    base = type(llama).from_pretrained(DATA / "bases/llama").eval()
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    torch.testing.assert_close(run(theirs)[:, -6:], expected, atol=2e-5, rtol=0)
    rows = [load_file(p / "adapter_model.safetensors")["prompt_embeddings"] for p in (two, one)]
    found = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(found, torch.cat(rows))


def test_a_prompt_is_there_or_is_not(tmp_path: Path) -> None:
    one, two = (DATA / f"adapters/llama_prompt{n}" for n in (1, 2))
    for weight in (0.5, -1.0, 2.0):
        with pytest.raises(InvalidError, match="takes weight 1, or 0") as caught:
            blend({one: 1.0, two: weight})
        assert "average" in str(caught.value.hint)
    found = load(blend({one: 1.0, two: 0.0}).files["adapter_model.safetensors"])
    given = load_file(one / "adapter_model.safetensors")
    assert torch.equal(found["prompt_embeddings"], given["prompt_embeddings"])
    twice = load(blend([one, one]).files["adapter_model.safetensors"])["prompt_embeddings"]
    assert torch.equal(twice, torch.cat([given["prompt_embeddings"]] * 2))
    with pytest.raises(InvalidError, match="all weights are 0"):
        blend({one: 0.0})


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ("adapters/llama_prefix1", "no type of PEFT has both"),
        ("adapters/llama_A", "no one adapter does what both do"),
        ("adapters/llama_ia3_1", "no one adapter does what both do"),
    ],
)
def test_what_no_one_folder_carries_is_kept_as_a_recipe(others: str, words: str) -> None:
    with pytest.raises(InvalidError, match=words) as caught:
        blend([DATA / "adapters/llama_prompt1", DATA / others])
    assert "--as recipe" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("path", "chosen", "words"),
    [
        ("adapters/bert_ah_a", {}, "a network with a nonlinearity"),
        ("cases/bert.oft_cls/adapter", {}, "a rotation turns the input"),
        ("adapters/llama_prefix1", {"method": "ties"}, "ties is for changes of weights"),
        ("adapters/llama_prefix1", {"rank": 2}, "rank is for changes of weights"),
        ("adapters/llama_ia3_1", {"at": {"layers.0": [1.0]}}, "at is for changes of weights"),
    ],
)
def test_what_is_no_change_of_a_weight_is_refused_by_name(
    path: str, chosen: dict[str, Any], words: str
) -> None:
    if not (DATA / path).exists():
        pytest.skip(f"{path} is not among the data here")
    with pytest.raises(InvalidError, match=words) as caught:
        blend({DATA / path: 1.0}, **chosen)
    assert "--as recipe" in str(caught.value.hint)
    with pytest.raises(InvalidError, match="no method tie;"):
        blend({DATA / path: 1.0}, method="tie")


def test_a_prefix_of_another_tool_is_put_in_the_words_of_peft(tmp_path: Path) -> None:
    path = DATA / "cases/gpt2.prefix_li_liang_deep/adapter"
    base = DATA / "bases/gpt2"
    with pytest.raises(InvalidError) as caught:
        blend([path, path])
    assert "--base" in str(caught.value.hint)
    folder = blend([path, path], base=base).save(tmp_path / "made")
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    expected = None
    with attach(model, {"a": path, "b": path}):
        expected = run(model)
    torch.testing.assert_close(alone(model, folder), expected, atol=2e-5, rtol=0)


def test_the_order_of_prompts_is_in_the_recipe(tmp_path: Path) -> None:
    with Registry(tmp_path / "home") as registry:
        names = []
        for number in (1, 2, 3):
            add(registry, DATA / f"adapters/llama_prompt{number}", f"team/p{number}")
            names.append(f"team/p{number}")
        bytes_ = set()
        for order in (names, names[::-1]):
            made = blend(order, registry=registry)
            ref = str(made.add(registry, "team/mix").ref)
            assert rebuild(ref, registry=registry).same
            bytes_.add(made.files["adapter_model.safetensors"])
        assert len(bytes_) == 2


@pytest.mark.parametrize(
    "name", ["bert.ah_prompt_after_bos", "bert.ah_prompt", "bert.ah_prefix_flat"]
)
def test_rows_of_the_library_stand_one_behind_the_other_in_its_own_folder(
    name: str, tmp_path: Path
) -> None:
    path = DATA / f"cases/{name}/adapter"
    if not path.exists():
        pytest.skip(f"{name} is not among the data here")
    other = changed(path, tmp_path / "other", lambda t: t.flip(0) / 2)
    folder = blend([other, path]).save(tmp_path / "made")
    assert read_adapter(locate(folder, None)).format == "adapterhub"
    model = transformers.AutoModel.from_pretrained(DATA / "bases/bert").eval()

    def hidden() -> Tensor:
        with torch.inference_mode():
            return model(TOKENS).last_hidden_state

    with attach(model, {"other": other, "path": path}):
        expected = hidden()
    with attach(model, [folder]):
        torch.testing.assert_close(hidden(), expected, atol=1e-5, rtol=0)
    once = tensors(blend([path]).save(tmp_path / "once"))
    assert all(torch.equal(once[place], tensor) for place, tensor in tensors(path).items())


def changed(source: Path, target: Path, change: Callable[[Tensor], Tensor]) -> Path:
    shutil.copytree(source, target)
    file = next(target.glob("*.safetensors"), None)
    held = load_file(file) if file else torch.load(target / "pytorch_adapter.bin")
    values = {key: change(tensor).contiguous() for key, tensor in held.items()}
    (target / "pytorch_adapter.bin").unlink(missing_ok=True)
    save_file(values, target / "adapter.safetensors", {"format": "pt"})
    return target


def test_a_prefix_that_a_network_makes_stands_behind_no_other() -> None:
    one, two = DATA / "adapters/bert_ah_p1", DATA / "adapters/bert_ah_p2"
    with pytest.raises(InvalidError, match="a network, a gate or a head belongs to it") as caught:
        blend([one, two])
    assert "--as recipe" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("paths", "method", "base"),
    [
        (("adapters/llama_ia3_1", "adapters/llama_ia3_2"), "sum", None),
        (("adapters/bert_ah_a", "adapters/bert_ah_b"), "average", None),
        (("cases/bert.bitfit_all/adapter", "cases/bert.bitfit_subset/adapter"), "sum", "bert"),
    ],
)
def test_a_blend_of_likes_is_stored_and_made_again(
    paths: tuple[str, ...], method: str, base: str | None, tmp_path: Path
) -> None:
    folder = None if base is None else DATA / "bases" / base
    with Registry(tmp_path / "home") as registry:
        for number, path in enumerate(paths):
            add(registry, DATA / path, f"team/{number}")
        given = {f"team/{number}": 0.3 for number in range(len(paths))}
        made = blend(given, method=method, base=folder, registry=registry)
        ref = str(made.add(registry, "team/mix").ref)
        assert rebuild(ref, registry=registry, base=folder).same
        assert registry.manifest(ref).adapter["kind"] == made.adapter.kind
        assert len(registry.manifest(ref).parents) == len(paths)


def test_dumps_of_biases_move_from_the_base_by_their_weights(tmp_path: Path) -> None:
    case = next(case for case in CASES if case["operation"].get("mode") == "delta_to_base")
    made = blend(of(case), base=DATA / case["base_path"])
    require_close(logits(case, made.save(tmp_path / "made")), case)
    expected = load_file(DATA / case["expected"]["merged_file"])
    found = load(made.files["model.safetensors"])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)

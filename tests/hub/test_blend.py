"""Blending whole adapters: what comes out does what the inputs do together, here and in PEFT."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapterkit.hub import attach, blend
from adapterkit.hub.blend.methods import names
from adapterkit.registry import Registry
from adapterkit.registry.errors import AdapterError, AdapterWarning, InvalidError, MismatchError

TOKENS = torch.tensor([[1, 20, 33, 7, 90, 4]])
pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")


@pytest.fixture(scope="module")
def model(fixtures: Path) -> Any:
    found = transformers.AutoModelForCausalLM.from_pretrained(fixtures / "bases/llama")
    return found.eval()


def run(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits.double()


def together(model: Any, weights: dict[Path, float]) -> torch.Tensor:
    with attach(model, {str(path): path for path in weights}) as adapters:
        adapters.activate({str(path): weight for path, weight in weights.items()})
        return run(model)


def alone(model: Any, made: Any, tmp_path: Path) -> torch.Tensor:
    """What PEFT makes of the folder; what we make of it is the same."""
    made.save(tmp_path / "made")
    with attach(model, [tmp_path / "made"]):
        ours = run(model)
    base = type(model).from_pretrained(model.config._name_or_path).eval()
    theirs = run(peft.PeftModel.from_pretrained(base, tmp_path / "made").eval())
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    return ours


PAIRS = {
    "two LoRAs": {"adapters/llama_A": 0.7, "adapters/llama_B": 0.3},
    "other ranks": {"adapters/llama_A": 0.7, "adapters/llama_D": -0.4},
    "rank patterns": {"adapters/llama_P": 1.0, "adapters/llama_D": 0.5},
    "rsLoRA": {"adapters/llama_R": 0.7, "adapters/llama_D": 0.3},
    "DoRA": {"adapters/llama_dora": 0.6},
    "DoRA and LoRA": {"adapters/llama_dora": 0.6, "adapters/llama_A": -0.5},
    "LoHa": {"adapters/llama_loha": 0.6, "adapters/llama_A": 0.5},
    "MoSLoRA": {"cases/llama.moslora_v10/adapter": 1.0, "adapters/llama_A": -0.6},
    "three": {"adapters/llama_A": 0.5, "adapters/llama_B": 0.5, "adapters/llama_C": -1.0},
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_sum_does_what_its_inputs_do_together(
    model: Any, fixtures: Path, tmp_path: Path, pair: str
) -> None:
    weights = {fixtures / path: weight for path, weight in PAIRS[pair].items()}
    made = blend(weights, base=fixtures / "bases/llama")
    assert made.error == 0
    assert made.dora == ("DoRA" in pair)
    expected = together(model, weights)
    torch.testing.assert_close(alone(model, made, tmp_path), expected, atol=5e-5, rtol=0)


def test_a_base_is_asked_for_exactly_where_it_counts(fixtures: Path) -> None:
    blend({fixtures / "adapters/llama_A": 0.7, fixtures / "adapters/llama_R": -0.3})
    with pytest.raises(InvalidError, match="cannot be computed without") as caught:
        blend({fixtures / "adapters/llama_A": 0.7, fixtures / "adapters/llama_dora": 0.3})
    assert "--base" in (caught.value.hint or "")


def test_what_was_added_and_taken_away_is_gone_exactly(fixtures: Path) -> None:
    a, b = fixtures / "adapters/llama_A", fixtures / "adapters/llama_B"
    left = blend([(a, 1.0), (b, 1.0), (b, -1.0)])
    once = blend({a: 1.0})
    assert left.files == once.files
    with pytest.raises(InvalidError, match="nothing is left"):
        blend([(a, 1.0), (a, -1.0)])


def test_one_adapter_at_weight_1_has_its_own_factors(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "adapters/llama_A"
    blend({source: 1.0}).save(tmp_path / "a")
    found = load_file(tmp_path / "a/adapter_model.safetensors")
    given = load_file(source / "adapter_model.safetensors")
    scale = json.loads((source / "adapter_config.json").read_text())
    by = scale["lora_alpha"] / scale["r"]
    for key in (key for key in given if "lora_A" in key):
        other = key.replace("lora_A", "lora_B")
        torch.testing.assert_close(
            found[other] @ found[key], by * given[other] @ given[key], atol=1e-6, rtol=1e-6
        )


@pytest.mark.parametrize("method", names())
def test_the_same_inputs_give_the_same_bytes_in_any_order(fixtures: Path, method: str) -> None:
    paths = [fixtures / f"adapters/llama_{name}" for name in ("A", "B")]
    chosen: dict[str, Any] = {"method": method, "density": 0.6, "rank": 5}
    made = set()
    for order, threads in itertools.product(itertools.permutations(paths), (1, 2)):
        torch.set_num_threads(threads)
        weights = {path: 0.7 if path == paths[0] else 0.3 for path in order}
        made.add(tuple(blend(weights, **chosen).files.values()))
    assert len(made) == 1


def test_svd_is_the_best_of_its_rank_and_says_its_error(
    model: Any, fixtures: Path, tmp_path: Path
) -> None:
    weights = {fixtures / "adapters/llama_A": 0.7, fixtures / "adapters/llama_D": 0.3}
    made = blend(weights, method="svd", rank=3)
    whole = blend(weights)
    assert made.rank == 3 and 0 < made.error < 1
    made.save(tmp_path / "made")
    whole.save(tmp_path / "whole")
    low = load_file(tmp_path / "made/adapter_model.safetensors")
    full = load_file(tmp_path / "whole/adapter_model.safetensors")
    lost = total = 0.0
    for key in (key for key in full if "lora_A" in key):
        other = key.replace("lora_A", "lora_B")
        exact = full[other].double() @ full[key].double()
        values = torch.linalg.svdvals(exact)
        gap = float((exact - low[other].double() @ low[key].double()).norm())
        assert gap == pytest.approx(float(values[3:].norm()), abs=1e-5)
        lost, total = lost + gap**2, total + float(exact.norm()) ** 2
    assert made.error == pytest.approx((lost / total) ** 0.5, abs=1e-5)
    assert blend(weights, method="svd", rank=64).error == 0


def test_ranks_are_picked_per_module_for_an_energy(
    model: Any, fixtures: Path, tmp_path: Path
) -> None:
    weights = {fixtures / "adapters/llama_A": 0.7, fixtures / "adapters/llama_D": 0.3}
    made = blend(weights, rank="auto", energy=0.9)
    assert len({module.rank for module in made.modules}) > 1
    assert 0 < made.error <= 0.1**0.5
    config = json.loads(made.files["adapter_config.json"])
    assert config["rank_pattern"] == {m.module: m.rank for m in made.modules}
    alone(model, made, tmp_path)
    with pytest.raises(InvalidError, match="keeps only 0.* of what ties means"):
        blend(weights, method="ties", rank="auto", energy=0.999999)
    assert blend(weights, method="ties", rank="auto", energy=0.8).error <= 0.2**0.5


def test_weights_per_module_are_multiplied_with_those_of_the_adapters(
    model: Any, fixtures: Path, tmp_path: Path
) -> None:
    a, b = fixtures / "adapters/llama_A", fixtures / "adapters/llama_B"
    made = blend([(a, 0.5), (b, 2.0)], at={r"layers\.0": [2.0, 0.0], "v_proj": [0.0, 0.5]})
    expected = {}
    for path, shares in ((a, (1.0, 0.0, 0.5)), (b, (0.0, 1.0, 2.0))):
        config = json.loads((path / "adapter_config.json").read_text())
        tensors = load_file(path / "adapter_model.safetensors")
        for key in (key for key in tensors if "lora_A" in key):
            share = shares[0 if "layers.0" in key else 1 if "v_proj" in key else 2]
            by = share * config["lora_alpha"] / config["r"]
            delta = by * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
            expected[key] = expected.get(key, 0) + delta
    made.save(tmp_path / "made")
    found = load_file(tmp_path / "made/adapter_model.safetensors")
    for key, delta in expected.items():
        torch.testing.assert_close(
            found[key.replace("lora_A", "lora_B")] @ found[key], delta, atol=1e-5, rtol=1e-5
        )
    with pytest.raises(InvalidError, match="has 1 weights, expected 2"):
        blend([(a, 0.5), (b, 2.0)], at={"q_proj": [1.0]})


def with_head(source: Path, target: Path, value: torch.Tensor) -> Path:
    """A copy that replaces the output head too."""
    shutil.copytree(source, target)
    place = target / "adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"modules_to_save": ["lm_head"]}))
    tensors = load_file(target / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = value
    save_file(tensors, target / "adapter_model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.25, 0.75), (0.5, -0.2)])
def test_replaced_parts_move_from_the_base_by_their_weights(
    model: Any, fixtures: Path, tmp_path: Path, weights: tuple[float, float]
) -> None:
    draw = torch.Generator().manual_seed(0)
    head = model.lm_head.weight.detach()
    folders = [
        with_head(
            fixtures / f"adapters/llama_{name}",
            tmp_path / name,
            head + 0.1 * torch.randn(head.shape, generator=draw),
        )
        for name in ("A", "B")
    ]
    given = dict(zip(folders, weights, strict=True))
    needs_base = sum(weights) != 1
    if needs_base:
        with pytest.raises(InvalidError, match="without the weights of lm_head"):
            blend(given)
    made = blend(given, base=fixtures / "bases/llama" if needs_base else None)
    expected = together(model, given)
    torch.testing.assert_close(alone(model, made, tmp_path), expected, atol=5e-5, rtol=0)


def test_a_head_that_one_input_has_alone_stays_its_own_at_weight_1(
    model: Any, fixtures: Path, tmp_path: Path
) -> None:
    value = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1))
    headed = with_head(fixtures / "adapters/llama_A", tmp_path / "a", value)
    made = blend({headed: 1.0, fixtures / "adapters/llama_B": 0.5})
    made.save(tmp_path / "made")
    found = load_file(tmp_path / "made/adapter_model.safetensors")
    assert torch.equal(found["base_model.model.lm_head.weight"], value)


def test_heads_of_the_adapters_own_are_not_mixed(fixtures: Path) -> None:
    case = fixtures / "cases/bert.lora_cls/adapter"
    with pytest.raises(InvalidError, match="a head of the adapters' own"):
        blend({case: 0.5})
    blend({case: 1.0})


def test_changes_without_factors_are_blended_to_a_rank(
    model: Any, fixtures: Path, tmp_path: Path
) -> None:
    weights = {fixtures / "adapters/llama_lokr": 0.5, fixtures / "adapters/llama_A": 0.7}
    with pytest.raises(InvalidError, match="is no low-rank one"):
        blend(weights)
    made = blend(weights, rank=128)
    assert made.error < 1e-6
    expected = together(model, weights)
    torch.testing.assert_close(alone(model, made, tmp_path), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("adapters/llama_prefix1", "takes weight 1, or 0"),
        ("cases/bert.oft_cls/adapter", "turns the input"),
        ("cases/mixtral.lora_experts/adapter", "experts"),
    ],
)
def test_what_no_weight_carries_is_refused_with_the_reason(
    fixtures: Path, path: str, words: str
) -> None:
    name = next((name for name in ("mixtral", "bert") if name in path), "llama")
    base = fixtures / "bases" / name
    with pytest.raises(AdapterError, match=words):
        blend({fixtures / path: 0.5}, base=base)


def test_adapters_of_different_models_are_refused(fixtures: Path) -> None:
    gpt2 = fixtures / "cases/gpt2.lora_c_attn/adapter"
    wide = fixtures / "adapters/llama_A"
    with pytest.raises(MismatchError):
        blend({gpt2: 1.0, wide: 1.0}, base=fixtures / "bases/llama")
    with pytest.warns(AdapterWarning, match="name different bases"):
        blend({gpt2: 1.0, wide: 1.0})


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"method": "tie"}, "no method tie"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": True}, "rank is True"),
        ({"densty": 0.5}, "no option densty"),
        ({"density": 2}, "density is 2"),
        ({"energy": 0}, "energy is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_what_is_asked_for_in_vain_is_said(
    fixtures: Path, chosen: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidError, match=words):
        blend({fixtures / "adapters/llama_A": 1.0}, **chosen)
    for weights in ({}, {fixtures / "adapters/llama_A": float("nan")}):
        with pytest.raises(InvalidError):
            blend(weights)


def test_a_dora_that_scales_a_row_to_nothing_is_refused(fixtures: Path) -> None:
    """1 + g is 0 nowhere by chance: a magnitude of 0 at weight 1 makes it so."""
    dora = fixtures / "adapters/llama_dora"
    made = blend({dora: 1.0}, base=fixtures / "bases/llama")
    zero = made.folder
    assert zero.files
    with pytest.raises(InvalidError, match="scales a row by|no low-rank"):
        blend({zeroed(dora): 1.0}, base=fixtures / "bases/llama")


def zeroed(source: Path) -> Path:
    import tempfile

    target = Path(tempfile.mkdtemp()) / "zeroed"
    shutil.copytree(source, target)
    path = target / "adapter_model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    key = next(key for key in tensors if key.endswith("magnitude_vector"))
    tensors[key][0] = 0
    save_file(tensors, path, {"format": "pt"})
    return target


def test_a_version_made_of_versions_knows_its_parents_and_its_recipe(
    fixtures: Path, tmp_path: Path
) -> None:
    from adapterkit.hub.ingest import add

    with Registry(tmp_path / "home") as registry:
        for name in ("A", "B"):
            add(registry, fixtures / f"adapters/llama_{name}", f"team/{name.lower()}")
        made = blend({"team/a": 0.7, "team/b": 0.3}, registry=registry)
        added = made.add(registry, "team/mix")
        manifest = registry.manifest(added.ref)
        parents = {parent["version"] for parent in manifest.parents}
        held = {f"sha256:{registry.manifest(f'team/{n}').id}" for n in ("a", "b")}
        assert parents == held
        assert manifest.recipe is not None
        assert {i["version"]: i["weight"] for i in manifest.recipe["inputs"]}.keys() == held
        assert manifest.recipe["parameters"]["method"] == "sum"

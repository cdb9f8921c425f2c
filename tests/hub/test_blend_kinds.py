"""Laws of blends of gains and of replaced or shifted parts, on random small models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit.hub import attach, blend
from adapterkit.hub.locate import folder as hinted
from adapterkit.hub.locate import locate
from adapterkit.hub.offline import NeedsBaseError
from adapterkit.hub.read import read_adapter
from adapterkit.hub.tensors import read_finite
from adapterkit.registry.errors import InvalidError

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
TOKENS = torch.tensor([[1, 20, 33, 7, 50, 4]])
ROWS = [3, 20, 33]
KINDS = ("ia3", "bitfit", "ln_tuning", "beft", "tokens")
WEIGHTS = st.floats(-2, 2).map(lambda w: round(w, 3)).filter(bool)
QUICK = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    place = tmp_path_factory.mktemp("base")
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(base).eval()


@pytest.fixture
def write(tmp_path: Path, model: Any) -> Write:
    """An adapter of the kind with random values, on the modules with one of these ends."""

    def make(kind: str, seed: int, ends: tuple[str, ...] = ()) -> Path:
        folder = tmp_path / f"{kind}-{seed}-{'-'.join(ends)}"
        if folder.exists():
            return folder
        folder.mkdir()
        draw = torch.Generator().manual_seed(seed)
        tensors, config = WRITERS[kind](model, draw, ends)
        name = "model.safetensors" if config is None else "adapter_model.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
        if config is not None:
            (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return make


Written = tuple[dict[str, Tensor], dict[str, Any] | None]


def modules(model: Any, ends: tuple[str, ...]) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if name.endswith(ends)]


def ia3(model: Any, draw: torch.Generator, ends: tuple[str, ...]) -> Written:
    tensors = {}
    for name, module in modules(model, ends or ("k_proj", "v_proj", "down_proj")):
        n_out, n_in = module.weight.shape
        shape = (1, n_in) if name.endswith("down_proj") else (n_out, 1)
        tensors[f"base_model.model.{name}.ia3_l"] = 1 + torch.randn(shape, generator=draw) / 3
    targets = list(ends or ("k_proj", "v_proj", "down_proj"))
    forward = [end for end in targets if end == "down_proj"]
    return tensors, {"peft_type": "IA3", "target_modules": targets, "feedforward_modules": forward}


def bitfit(model: Any, draw: torch.Generator, ends: tuple[str, ...]) -> Written:
    return {
        f"{name}.bias": module.bias.detach() + torch.randn(module.bias.shape, generator=draw)
        for name, module in modules(model, ends or ("q_proj", "k_proj", "o_proj"))
    }, None


def ln_tuning(model: Any, draw: torch.Generator, ends: tuple[str, ...]) -> Written:
    targets = ends or ("input_layernorm", "model.norm")
    return {
        f"base_model.model.{name}.ln_tuning_layers.weight": 1
        + torch.randn(module.weight.shape, generator=draw) / 3
        for name, module in modules(model, targets)
    }, {"peft_type": "LN_TUNING", "target_modules": list(targets)}


def beft(model: Any, draw: torch.Generator, ends: tuple[str, ...]) -> Written:
    targets = ends or ("v_proj", "down_proj")
    return {
        f"base_model.model.{name}.beft_bias": torch.randn(1, len(module.weight), generator=draw)
        for name, module in modules(model, targets)
    }, {"peft_type": "BEFT", "target_modules": list(targets)}


def tokens(model: Any, draw: torch.Generator, ends: tuple[str, ...]) -> Written:
    rows = torch.randn(len(ROWS), model.config.hidden_size, generator=draw)
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    return {key: rows}, {
        "peft_type": "TRAINABLE_TOKENS", "target_modules": ["embed_tokens"], "token_indices": ROWS,
    }  # fmt: skip


def prompt(model: Any, draw: torch.Generator, ends: tuple[str, ...]) -> Written:
    length, width = 1 + draw.initial_seed() % 4, model.config.hidden_size
    return {"prompt_embeddings": torch.randn(length, width, generator=draw)}, {
        "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": length,
        "token_dim": width, "num_transformer_submodules": 1,
    }  # fmt: skip


def prefix(model: Any, draw: torch.Generator, ends: tuple[str, ...]) -> Written:
    length, width = 1 + draw.initial_seed() % 4, 16  # of 2 heads of keys and values
    return {"prompt_embeddings": torch.randn(length, 2 * 2 * width, generator=draw)}, {
        "peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": length,
        "token_dim": width, "num_layers": 2, "num_attention_heads": 2,
        "num_transformer_submodules": 1,
    }  # fmt: skip


WRITERS = {
    "prompt": prompt,
    "prefix": prefix,
    "ia3": ia3,
    "bitfit": bitfit,
    "ln_tuning": ln_tuning,
    "beft": beft,
    "tokens": tokens,
}


def run(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits.double()


def together(model: Any, weights: dict[Path, float]) -> Tensor:
    with attach(model, {path.name: path for path in weights}) as adapters:
        adapters.activate({path.name: weight for path, weight in weights.items()})
        return run(model)


def alone(model: Any, made: Any) -> Tensor:
    with attach(model, {"made": made.folder}):
        return run(model)


def held(folder: Any) -> dict[tuple[str, str], Tensor]:
    return read_finite(read_adapter(locate(folder, None)))


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_at_weight_1_is_itself(
    write: Write, base: Path, model: Any, kind: str
) -> None:
    source = write(kind, 1)
    for method in ("sum", "average"):
        made = blend({source: 1.0}, method=method)
        before, after = held(source), held(made.folder)
        assert made.adapter.kind == read_adapter(locate(source, None)).kind
        assert before.keys() == after.keys()
        assert all(torch.equal(after[place], tensor) for place, tensor in before.items())
        assert torch.equal(alone(model, made), together(model, {source: 1.0}))


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(weights=st.lists(WEIGHTS, min_size=1, max_size=3), seed=st.integers(0, 99))
def test_a_blend_attached_is_all_attached(
    write: Write, base: Path, model: Any, kind: str, weights: list[float], seed: int
) -> None:
    given_ = {write(kind, seed + 100 * n): weight for n, weight in enumerate(weights)}
    made = blend(given_, base=base)
    expected = together(model, given_)
    scale = float(expected.abs().max())
    torch.testing.assert_close(alone(model, made), expected, atol=2e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(weights=st.permutations([0.7, -1.3, 0.25]), data=st.data())
def test_the_order_changes_nothing(
    write: Write, base: Path, kind: str, weights: list[float], data: st.DataObject
) -> None:
    given_ = [(write(kind, n), weight) for n, weight in enumerate(weights)]
    files = blend(given_, base=base).files
    assert blend(data.draw(st.permutations(given_)), base=base).files == files


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(weight=WEIGHTS)
def test_what_was_added_and_taken_away_is_gone(
    write: Write, base: Path, kind: str, weight: float
) -> None:
    a, b = write(kind, 1), write(kind, 2)
    left = blend([(a, 1.0), (b, weight), (b, -weight)])
    assert left.files == blend({a: 1.0}).files
    with pytest.raises(InvalidError, match="the weights cancel"):
        blend([(a, weight), (a, -weight)], base=base)


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(weights=st.lists(st.floats(0.1, 3), min_size=1, max_size=3))
def test_an_average_is_tensor_by_tensor_and_needs_no_base(
    write: Write, kind: str, weights: list[float]
) -> None:
    given_ = {write(kind, n): weight for n, weight in enumerate(weights)}
    found = held(blend(given_, method="average").folder)
    for place, tensor in found.items():
        mean = sum(w / sum(weights) * held(path)[place].double() for path, w in given_.items())
        torch.testing.assert_close(tensor.double(), mean, atol=1e-6, rtol=1e-6)


OTHERS = {
    "ia3": ("q_proj", "v_proj"), "bitfit": ("v_proj", "o_proj"), "beft": ("up_proj", "v_proj"),
    "ln_tuning": ("post_attention_layernorm", "model.norm"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_of_other_modules_are_one_of_all(
    write: Write, base: Path, model: Any, kind: str, tmp_path: Path
) -> None:
    given_ = {write(kind, 1): 0.6, write(kind, 2, OTHERS[kind]): -0.5}
    made = blend(given_, base=base)
    assert made.adapter.modules.keys() > held_modules(next(iter(given_)))
    torch.testing.assert_close(alone(model, made), together(model, given_), atol=2e-5, rtol=1e-4)
    if kind != "bitfit":
        fresh = transformers.LlamaForCausalLM.from_pretrained(base).eval()
        theirs = peft.PeftModel.from_pretrained(fresh, made.save(tmp_path / "made")).eval()
        torch.testing.assert_close(run(theirs), alone(model, made), atol=2e-5, rtol=1e-4)


def held_modules(folder: Path) -> set[str]:
    return set(read_adapter(locate(folder, None)).modules)


# Prompts and prefixes


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@QUICK
@given(seeds=st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True))
def test_rows_in_one_file_are_all_attached_in_that_order(
    write: Write, model: Any, kind: str, seeds: list[int]
) -> None:
    given_ = [write(kind, seed) for seed in seeds]
    made = blend(given_)
    expected = together(model, dict.fromkeys(given_, 1.0))
    torch.testing.assert_close(alone(model, made), expected, atol=2e-5, rtol=1e-4)
    rows = torch.cat([tensor for path in given_ for tensor in held(path).values()])
    assert torch.equal(*held(made.folder).values(), rows)
    if len(given_) > 1:
        apart = blend([blend(given_[:1]).folder, blend(given_[1:]).folder])
        assert apart.files == made.files


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@QUICK
@given(data=st.data(), weights=st.lists(st.floats(0.1, 3), min_size=1, max_size=3))
def test_rows_of_one_length_are_averaged_in_any_order(
    write: Write, kind: str, data: st.DataObject, weights: list[float]
) -> None:
    given_ = [(write(kind, 4 * n), weight) for n, weight in enumerate(weights)]
    made = blend(given_, method="average")
    assert blend(data.draw(st.permutations(given_)), method="average").files == made.files
    mean = sum(
        weight / sum(weights) * next(iter(held(path).values())).double() for path, weight in given_
    )
    torch.testing.assert_close(*held(made.folder).values(), mean.float(), atol=1e-6, rtol=1e-6)


# IA3


@QUICK
@given(weights=st.lists(WEIGHTS, min_size=2, max_size=3))
def test_linear_in_the_dialect_peft_is_add_weighted_adapter(
    write: Write, base: Path, weights: list[float]
) -> None:
    """As PEFT has it, modules that only some adapters have are scaled by those alone."""
    ends: list[tuple[str, ...]] = [(), ("q_proj", "v_proj"), ()]
    paths = [write("ia3", n, end) for n, end in zip(range(len(weights)), ends, strict=False)]
    fresh = transformers.LlamaForCausalLM.from_pretrained(base).eval()
    theirs = peft.PeftModel.from_pretrained(fresh, paths[0], "0")
    for n, path in enumerate(paths[1:], 1):
        theirs.load_adapter(path, str(n))
    theirs.base_model.add_weighted_adapter([str(n) for n in range(len(paths))], weights, "sum")
    expected = {
        name.removeprefix("base_model.model.").removesuffix(".ia3_l.sum"): parameter.detach()
        for name, parameter in theirs.named_parameters()
        if name.endswith(".ia3_l.sum")
    }
    given_ = list(zip(paths, weights, strict=True))
    found = held(blend(given_, method="linear", dialect="peft").folder)
    assert {module for module, _ in found} == expected.keys()
    for (module, _), tensor in found.items():
        torch.testing.assert_close(tensor, expected[module], atol=1e-5, rtol=1e-5)


def test_the_fixture_of_add_weighted_adapter(fixtures: Path) -> None:
    cases = json.loads((fixtures / "index.json").read_text())["cases"]
    case = next(case for case in cases if case["kind"] == "multi_ia3" and
                case["operation"]["op"] == "add_weighted_adapter")  # fmt: skip
    paths = [fixtures / adapter["path"] for adapter in case["adapters"]]
    weights = dict(zip(paths, case["operation"]["weights"], strict=True))
    made = blend(weights, method="linear", dialect="peft")
    expected = load_file(fixtures / case["expected"]["file"])
    for (module, _), tensor in held(made.folder).items():
        torch.testing.assert_close(tensor, expected[f"ia3.{module}"], atol=1e-6, rtol=0)
    inputs = load_file(fixtures / case["inputs"]["file"])
    llama = transformers.AutoModelForCausalLM.from_pretrained(fixtures / "bases/llama").eval()
    with attach(llama, {"made": made.folder}), torch.inference_mode():
        found = llama(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[mask], expected["logits"][mask], atol=1e-4, rtol=0)


def test_a_sum_of_ia3s_is_their_product_by_hand(write: Write) -> None:
    a, b = write("ia3", 1), write("ia3", 2)
    x, y = held(a), held(b)
    for (module, role), tensor in held(blend({a: 0.5, b: -2.0}).folder).items():
        l, m = x[module, role].double(), y[module, role].double()  # noqa: E741
        torch.testing.assert_close(
            tensor.double(), (1 + 0.5 * (l - 1)) * (1 - 2 * (m - 1)), atol=1e-6, rtol=1e-6
        )


def test_gains_of_both_sides_of_a_module_are_no_ia3(write: Write, tmp_path: Path) -> None:
    a = write("ia3", 1, ("down_proj",))
    b = write("ia3", 2, ("down_proj",))
    tensors = load_file(b / "adapter_model.safetensors")
    rows = {key: torch.ones(32, 1) for key in tensors}
    save_file(rows, b / "adapter_model.safetensors")
    config = json.loads((b / "adapter_config.json").read_text()) | {"feedforward_modules": []}
    (b / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidError, match="outputs scaled by one adapter and its inputs") as e:
        blend({a: 1.0, b: 1.0})
    assert "--as recipe" in str(e.value.hint)


def test_an_ia3_with_a_rank_or_beside_a_lora_is_a_change_of_weights(
    write: Write, base: Path, model: Any
) -> None:
    a, b = write("ia3", 1, ("k_proj", "v_proj")), write("ia3", 2, ("v_proj",))
    made = blend({a: 1.0, b: 0.0}, base=base, rank=32)
    assert made.adapter.kind == "lora" and made.error < 1e-6
    torch.testing.assert_close(alone(model, made), together(model, {a: 1.0}), atol=2e-5, rtol=1e-4)


# Replaced and shifted parts


@pytest.mark.parametrize("kind", ["bitfit", "ln_tuning", "tokens"])
def test_a_sum_asks_for_the_base_where_its_weights_do_not_add_up_to_1(
    write: Write, kind: str
) -> None:
    a, b = write(kind, 1), write(kind, 2)
    blend({a: 0.25, b: 0.75})
    with pytest.raises(NeedsBaseError):
        blend({a: 0.6, b: 0.3})


def test_differences_of_biases_become_new_biases(
    write: Write, base: Path, model: Any, tmp_path: Path
) -> None:
    """A dump does not say in its files that it holds differences; the result says all in them."""
    new = write("bitfit", 1)
    plain = load_file(new / "model.safetensors")
    state = model.state_dict()
    (tmp_path / "delta").mkdir()
    changes = {key: tensor - state[key] for key, tensor in plain.items()}
    save_file(changes, tmp_path / "delta/model.safetensors")
    delta = hinted(tmp_path / "delta", values="delta")
    other = write("bitfit", 2, ("v_proj", "o_proj"))
    with pytest.raises(NeedsBaseError):
        blend([(delta, 0.5)])
    made = blend([(delta, 0.5), (other, 0.25)], base=base)
    expected = together(model, {new: 0.5, other: 0.25})
    torch.testing.assert_close(alone(model, made), expected, atol=2e-5, rtol=1e-4)


def test_other_rows_of_tokens_are_no_one_adapter(write: Write, tmp_path: Path) -> None:
    a, b = write("tokens", 1), write("tokens", 2)
    config = json.loads((b / "adapter_config.json").read_text()) | {"token_indices": [1, 2, 3]}
    (b / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidError, match="train different token rows"):
        blend({a: 0.5, b: 0.5})


def test_kinds_that_replace_are_not_one(write: Write) -> None:
    with pytest.raises(InvalidError, match="no one adapter is both") as caught:
        blend({write("beft", 1): 1.0, write("ln_tuning", 1): 1.0})
    assert "--as recipe" in str(caught.value.hint)


def test_values_too_large_for_a_dtype_are_refused(write: Write, tmp_path: Path) -> None:
    source = write("beft", 1)
    path = source / "adapter_model.safetensors"
    save_file({key: 1e6 * tensor for key, tensor in load_file(path).items()}, path)
    with pytest.raises(InvalidError, match="too large for float16"):
        blend({source: 1.0}, dtype="float16")
    assert blend({source: 1.0}, dtype="bfloat16").info.dtypes == {"BF16": 4}


def test_norms_beside_a_lora_are_saved_modules_of_it(
    write: Write, base: Path, model: Any, tmp_path: Path
) -> None:
    norms, lora = write("ln_tuning", 1), tmp_path / "lora"
    fresh = transformers.LlamaForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(fresh, config).save_pretrained(lora)
    given_ = {norms: 0.5, lora: 0.7}
    made = blend(given_, base=base)
    assert made.adapter.kind == "lora"
    expected = together(model, given_)
    torch.testing.assert_close(alone(model, made), expected, atol=2e-5, rtol=1e-4)
    fresh = transformers.LlamaForCausalLM.from_pretrained(base).eval()
    theirs = peft.PeftModel.from_pretrained(fresh, made.save(tmp_path / "made")).eval()
    torch.testing.assert_close(run(theirs), expected, atol=2e-5, rtol=1e-4)
    with pytest.raises(InvalidError, match="which a LoRA cannot") as caught:
        blend({write("bitfit", 1): 1.0, lora: 1.0}, base=base)
    assert "--as recipe" in str(caught.value.hint)


def test_the_name_of_an_adapter_in_its_keys_is_left_out(write: Write) -> None:
    plain, named = write("ln_tuning", 1), write("ln_tuning", 2)
    expected = held(blend({plain: 0.5, named: 0.5}).folder)
    path = named / "adapter_model.safetensors"
    own = load_file(path)
    save_file({k.replace(".weight", ".default.weight"): t for k, t in own.items()}, path)
    made = blend({plain: 0.5, named: 0.5})
    assert not any(".default" in stored.key for stored in made.adapter.tensors.values())
    found = held(made.folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[place], tensor) for place, tensor in expected.items())
    config = json.loads((plain / "adapter_config.json").read_text())
    for folder in (plain, named):
        text = json.dumps(config | {"modules_to_save": ["lm_head"]})
        (folder / "adapter_config.json").write_text(text)
    with pytest.raises(InvalidError, match="name in its keys, and saved modules"):
        blend({plain: 0.5, named: 0.5})

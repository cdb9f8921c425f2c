"""Files of prefixes and prompts: every tensor applied or named, in each of their formats."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit.hub import attach, check, describe
from adapterkit.registry.errors import AdapterError, InvalidError, MismatchError, NotFoundError

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
KINDS = {"prefix_tuning", "prompt_tuning", "p_tuning", "p_tuning_v1", "p_tuning_v2"}
State = dict[str, Any]


@pytest.fixture(scope="module")
def cases(fixtures: Path) -> dict[str, Any]:
    index = json.loads((fixtures / "index.json").read_text())["cases"]
    return {
        case["id"]: case
        for case in index
        if case["kind"] in KINDS and case["operation"]["op"] == "forward"
    }


def base_of(fixtures: Path, case: dict[str, Any]) -> Any:
    return load(fixtures / case["base_path"], case["base_load"]["class"])


@lru_cache(maxsize=4)
def load(path: Path, loader: str) -> Any:
    return getattr(transformers, loader).from_pretrained(path).eval()


def read(path: Path) -> State:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def write(path: Path, state: State) -> None:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)


def weights_in(folder: Path) -> Path:
    ends = (".safetensors", ".bin", ".pth")
    return next(path for path in sorted(folder.iterdir()) if path.suffix in ends)


def flat(state: State, start: str = "") -> dict[str, Tensor]:
    """Dotted names, as the reader gives them."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        inner = flat(value, f"{start}{name}.") if isinstance(value, dict) else {}
        found |= inner or {f"{start}{name}": value}
    return found


def changed(state: State, name: str, change: Callable[[State, str], None]) -> State:
    """A copy in which one tensor is missing, renamed or reshaped."""
    new = copy.deepcopy(state)
    holder, key = new, name
    while key not in holder:
        part = next(p for p in holder if isinstance(holder[p], dict) and key.startswith(f"{p}."))
        holder, key = holder[part], key.removeprefix(f"{part}.")
    change(holder, key)
    return new


def drop(state: State, key: str) -> None:
    del state[key]


def rename(state: State, key: str) -> None:
    state[f"{key}_"] = state.pop(key)


def reshape(state: State, key: str) -> None:
    value = state[key]
    state[key] = torch.cat([value, value[:1]]).contiguous()


@pytest.mark.parametrize("change", [drop, rename, reshape])
def test_a_tensor_that_is_missing_renamed_or_reshaped_is_named(
    change: Callable[[State, str], None], cases: dict[str, Any], fixtures: Path, tmp_path: Path
) -> None:
    """Every tensor of every fixture of these kinds. AdapterHub's files repeat tensors under each
    layer, any of which may be missing; renamed or reshaped they contradict the others."""
    for case in cases.values():
        start = fixtures / case["adapters"][0]["path"]
        model, state = base_of(fixtures, case), read(weights_in(start))
        repeats = [name for name in flat(state) if ".pool." in name]
        for number, name in enumerate(flat(state)):
            if change is drop and (name in repeats or repeats):
                continue
            if change is drop and is_frozen(case, name):
                continue
            if change is reshape and is_free(case, name):
                continue
            folder = tmp_path / f"{case['id']}-{number}"
            shutil.copytree(start, folder, copy_function=shutil.copyfile)
            write(weights_in(folder), changed(state, name, change))
            with pytest.raises(AdapterError) as caught:
                attach(model, [folder])
                pytest.fail(f"{case['id']}: {name} was changed and nothing said so")
            said = parts_of(name) if len(flat(state)) > 1 else [name, "holds no tensor"]
            assert any(word in str(caught.value) for word in said), (case["id"], name)
            shutil.rmtree(folder)


def is_frozen(case: dict[str, Any], name: str) -> bool:
    """Of the base, which some of these checkpoints repeat and others do not."""
    own = ("prefix_encoder.", "classifier.")
    return case["adapters"][0]["format"] == "thudm-p-tuning-v2" and not name.startswith(own)


def is_free(case: dict[str, Any], name: str) -> bool:
    """How many rows P-Tuning v1 has stands nowhere: what marks them for the model has to agree."""
    return case["kind"] == "p_tuning_v1" and name == "prompt_embeddings.weight"


def parts_of(name: str) -> list[str]:
    """How a message may call a tensor: by its key, or by its role where it is missing."""
    roles = {
        "prompt_embeddings": "self.prefix rows",
        "wte.weight": "self.wte",
        "prefix_encoder.embedding.weight": "self.prefix self.wte",
        "prompt_embeddings.weight": "rows",
    }
    short = name.replace("lstm_head", "lstm").replace("mlp_head", "mlp")
    short = short.replace("control_trans", "mlp").replace("prefix_encoder.trans", "mlp")
    module = name.removeprefix("base_model.").rpartition(".")[0] or name
    return [name, short, module, *roles.get(name, "").split()]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_virtual_tokens", "4", "num_virtual_tokens is '4', expected an integer"),
        ("num_virtual_tokens", ..., "num_virtual_tokens is None"),
        ("num_virtual_tokens", 7, "prompt_embeddings.*shape"),
        ("num_virtual_tokens", 1 << 40, "num_virtual_tokens"),
        ("num_transformer_submodules", 3, "num_transformer_submodules is 3"),
        ("token_dim", -1, "token_dim is -1"),
        ("num_layers", 5, "prompt_embeddings.*shape"),
        ("new_option", 1, "new_option"),
    ],
)
def test_a_config_field_that_is_wrong_is_named(
    field: str,
    value: Any,
    message: str,
    make: Callable[..., Path],
    cases: dict[str, Any],
    fixtures: Path,
) -> None:
    model = base_of(fixtures, cases["bert.prefix_cls"])
    with pytest.raises(AdapterError, match=f"(?s){message}"):
        attach(model, [make("bert.prefix_cls", **{field: value})])


def folder_of(cases: dict[str, Any], case: str, fixtures: Path) -> Path:
    return fixtures / cases[case]["adapters"][0]["path"]


def edited(source: Path, target: Path, file: str, **fields: Any) -> Path:
    """A copy with some fields of its config changed."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    path = target / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return target


def test_every_format_is_described_without_torch_values(
    cases: dict[str, Any], fixtures: Path
) -> None:
    for case in cases.values():
        adapter = case["adapters"][0]
        info = describe(fixtures / adapter["path"])
        kind = "prefix" if case["kind"] in ("prefix_tuning", "p_tuning_v2") else "prompt"
        assert info.kind == kind
        assert info.n_tensors > 0 and not [f for f in info.findings if f.severity == "error"]


def test_a_whole_checkpoint_made_on_other_weights_is_refused_by_both(
    cases: dict[str, Any], fixtures: Path, tmp_path: Path
) -> None:
    """P-Tuning v2 saves the frozen model too: equal to the base it is reported, else an error."""
    if "bert.ptuning_v2_thudm" not in cases:
        pytest.skip("needs the whole set of fixtures, $ADAPTERKIT_FIXTURES")
    case = cases["bert.ptuning_v2_thudm"]
    source, model = folder_of(cases, case["id"], fixtures), base_of(fixtures, case)
    base = fixtures / case["base_path"]
    assert check(source, base=str(base)).verdict != "other-weights"
    with attach(model, {"a": source}) as adapters:
        rows = {row.tensor: row.primitive for row in adapters.report["a"]}
    assert rows["bert.pooler.dense.weight"] == "copy"
    assert rows["prefix_encoder.embedding.weight"] == "PrefixKV"
    assert rows["classifier.weight"] == "Replace"
    other = tmp_path / "other"
    shutil.copytree(source, other, copy_function=shutil.copyfile)
    state = read(weights_in(other))
    state["bert.encoder.layer.1.output.dense.weight"][0, 0] += 0.01
    write(weights_in(other), state)
    assert check(other, base=str(base)).verdict == "incompatible"
    with pytest.raises(MismatchError, match=r"other-weights.*layer\.1\.output\.dense\.weight"):
        attach(model, [other])
    bf16 = copy.deepcopy(base_of(fixtures, case)).to(torch.bfloat16)
    with attach(bf16, [source]):  # the same weights, rounded
        pass


def test_p_tuning_stands_where_the_caller_says(
    cases: dict[str, Any], fixtures: Path
) -> None:
    case = cases["llama.ptuning_v1_thudm_mlp"]
    source, model = folder_of(cases, case["id"], fixtures), base_of(fixtures, case)
    inputs = load_file(fixtures / case["inputs"]["file"])
    flags = inputs.pop("block_flag")
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with attach(model, [source]) as adapters:
        expected = model.generate(**inputs, block_flag=flags, **settings)
        again = model.generate(**inputs, block_flag=flags, use_cache=False, **settings)
        assert torch.equal(again, expected)
        beams = model.generate(**inputs, block_flag=flags, num_beams=2, **settings)
        assert beams.shape == expected.shape
        with pytest.raises(InvalidError, match="give it, .* to the model; found NoneType"):
            model(**inputs)
        with pytest.raises(InvalidError, match=r"block_flag marks \[4, 4, 4, 3\] of 12"):
            fewer = flags.clone()
            fewer[3, 0] = 0
            model(**inputs, block_flag=fewer)
        adapters.activate({})
        with torch.inference_mode():
            assert torch.equal(model(**inputs, block_flag=flags).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_infix": True}, "use_infix"),
        ({"_my_arg_tune_mode": "bothtune"}, "_my_arg_tune_mode.*bothtune"),
        ({"optim_prefix": False}, "optim_prefix"),
        ({"n_layer": 3}, "n_layer: expected 3, found 2"),
        ({"preseqlen": 4}, r"wte\.weight.*shape"),
    ],
)
def test_other_ways_of_the_authors_code_are_refused(
    fields: dict[str, Any], message: str, cases: dict[str, Any], fixtures: Path, tmp_path: Path
) -> None:
    case = cases["gpt2.prefix_li_liang_deep"]
    source = folder_of(cases, case["id"], fixtures)
    with pytest.raises((NotFoundError, AdapterError), match=f"(?s){message}"):
        attach(base_of(fixtures, case), [edited(source, tmp_path / "a", "config.json", **fields)])


def test_adapterhub_prefixes_that_contradict_their_copies_are_refused(
    cases: dict[str, Any], fixtures: Path, tmp_path: Path
) -> None:
    case = cases["bert.ah_prefix"]
    folder = tmp_path / "a"
    shutil.copytree(folder_of(cases, case["id"], fixtures), folder, copy_function=shutil.copyfile)
    state = read(weights_in(folder))
    name = next(key for key in state if "layer.1" in key and key.endswith("wte.weight"))
    write(weights_in(folder), state | {name: state[name] + 1})
    with pytest.raises(AdapterError, match=r"layer\.1.*other values than"):
        attach(base_of(fixtures, case), [folder])


def test_layers_without_a_prefix_are_refused(
    cases: dict[str, Any], fixtures: Path, tmp_path: Path
) -> None:
    case = cases["bert.ah_prefix"]
    source, folder = folder_of(cases, case["id"], fixtures), tmp_path / "a"
    inner = json.loads((source / "adapter_config.json").read_text())["config"]
    edited(source, folder, "adapter_config.json", config=inner | {"leave_out": [1]})
    with pytest.raises(AdapterError, match="leave_out"):
        attach(base_of(fixtures, case), [folder])


@pytest.mark.parametrize("rows", [1, 2])
def test_a_gate_lets_through_what_the_input_of_its_attention_says(
    rows: int, cases: dict[str, Any], fixtures: Path, tmp_path: Path
) -> None:
    """Wide open it is the prefix without a gate; shut, keys of zero are left."""
    case = cases["bert.ah_prefix"]
    source, model = folder_of(cases, case["id"], fixtures), base_of(fixtures, case)
    inputs = load_file(fixtures / case["inputs"]["file"])
    inner = json.loads((source / "adapter_config.json").read_text())["config"]
    gated = inner | {"use_gating": True, "shared_gating": rows == 1}
    found = {}
    for bias in (60.0, 0.0, -60.0):
        folder = tmp_path / str(bias)
        edited(source, folder, "adapter_config.json", config=gated)
        state = read(weights_in(folder))
        paths = {key.partition(".pool.")[0] for key in state if ".pool." in key}
        for path in paths:
            state[f"{path}.prefix_gates.task.weight"] = torch.zeros(rows, 64)
            state[f"{path}.prefix_gates.task.bias"] = torch.full((rows,), bias)
        write(weights_in(folder), state)
        with attach(model, [folder]), torch.inference_mode():
            found[bias] = model(**inputs).logits
    with attach(model, [source]), torch.inference_mode():
        torch.testing.assert_close(found[60.0], model(**inputs).logits)
    assert (found[0.0] - found[60.0]).abs().max() > 1e-4
    assert (found[-60.0] - found[60.0]).abs().max() > 1e-4
    with torch.inference_mode():  # keys of zero still take their share of attention
        assert (found[-60.0] - model(**inputs).logits).abs().max() > 1e-4

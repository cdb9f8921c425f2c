"""What keeps an adapter from binding to a base: each fault is caught and named."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapterkit.hub import check
from adapterkit.hub.bases.base import Base
from adapterkit.hub.findings import ERROR, Finding
from adapterkit.hub.fit import fit
from adapterkit.hub.formats.adapterhub_type import ARCHITECTURES, BOTTLENECK
from adapterkit.hub.formats.peft_type import PEFT_TYPES
from adapterkit.hub.locate import locate
from adapterkit.hub.read import read_adapter
from adapterkit.hub.task import for_task

Make = Callable[..., Path]
Bases = Callable[[str], Base]
Tensors = dict[str, tuple[str, list[int], bytes]]
P = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"
FIXTURES = Path(os.environ.get("ADAPTERKIT_FIXTURES") or Path(__file__).parents[1] / "data")


def faults(folder: Path, base: Base) -> list[Finding]:
    adapter = read_adapter(locate(folder))
    found = fit(adapter, for_task(base, adapter))
    return sorted({finding for finding in found if finding.severity == ERROR})


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {key.replace(old, new): tensor for key, tensor in tensors.items()}


def zeros(*shape: int) -> tuple[str, list[int], bytes]:
    size = 4
    for n in shape:
        size *= n
    return "F32", list(shape), bytes(size)


def test_what_fits_has_no_faults(make: Make, llama: Base) -> None:
    assert faults(make(), llama) == []


def test_a_wrong_hidden_size_names_both_shapes(make: Make, base_of: Bases) -> None:
    found = faults(make(), base_of("llama_wide"))
    assert {finding.code for finding in found} == {"shape-mismatch"}
    width = base_of("llama_wide").modules[Q0].n_in
    a = next(f for f in found if f.tensor == f"{P}{Q0}.lora_A.weight")
    assert a.expected == f"shape [8, {width}]" and a.found == "shape [8, 64]"


def test_targets_that_match_nothing_are_an_error(make: Make, llama: Base) -> None:
    found = faults(make(target_modules=["c_attn", "query"]), llama)
    absent = next(f for f in found if f.code == "target-absent")
    assert absent.tensor == "target_modules" and "c_attn" in absent.found
    assert len([f for f in found if f.code == "not-targeted"]) == 8  # and nothing binds


def test_one_target_of_several_that_matches_nothing_is_a_doubt(make: Make, llama: Base) -> None:
    adapter = read_adapter(locate(make(target_modules=["q_proj", "v_proj", "c_attn"])))
    (doubt,) = fit(adapter, llama)
    assert (doubt.severity, doubt.code) == ("warning", "target-absent")
    assert doubt.found == "no match for c_attn"


def test_a_tensor_that_binds_to_no_module_is_named(make: Make, llama: Base) -> None:
    folder = make(edit=lambda t: renamed(t, "layers.0.self_attn.q_proj", "blocks.0.attn.q_proj"))
    found = faults(folder, llama)
    absent = [f for f in found if f.code == "no-such-module"]
    lost = f"{P}model.blocks.0.attn.q_proj.lora"
    assert [f.tensor for f in absent] == [f"{lost}_A.weight", f"{lost}_B.weight"]
    assert "no match for model.blocks.0.attn.q_proj" in absent[0].found and absent[0].hint
    missing = [f for f in found if f.code == "missing-tensor"]
    assert [f.tensor for f in missing] == [Q0, Q0]


def test_a_module_the_config_does_not_target_is_named(make: Make, llama: Base) -> None:
    found = faults(make(target_modules=["v_proj"]), llama)
    assert {f.code for f in found} == {"not-targeted"}
    assert {f.found for f in found} == {
        f"model.layers.{i}.self_attn.q_proj, which the config does not target" for i in (0, 1)
    }


@pytest.mark.parametrize(("half", "rest"), [("A", "B"), ("B", "A")])
def test_a_missing_half_of_a_pair_is_named_once(
    make: Make, llama: Base, half: str, rest: str
) -> None:
    def edit(tensors: Tensors) -> None:
        del tensors[f"{P}{Q0}.lora_{half}.weight"]

    (found,) = faults(make(edit=edit), llama)
    assert (found.code, found.tensor, found.expected) == ("missing-tensor", Q0, f"a tensor {half}")


def test_a_layer_without_tensors_is_named(make: Make, llama: Base) -> None:
    folder = make(edit=lambda t: {k: v for k, v in t.items() if "layers.1." not in k})
    found = faults(folder, llama)
    assert {(f.code, f.tensor) for f in found} == {
        ("missing-tensor", f"model.layers.1.self_attn.{name}") for name in ("q_proj", "v_proj")
    }


def test_a_rank_that_is_not_the_configs_names_both(make: Make, llama: Base) -> None:
    found = faults(make(r=16), llama)
    assert {(f.code, f.expected) for f in found} == {("rank-mismatch", "r = 16")}
    assert len(found) == 8 and all("rank 8" in f.found for f in found)


def test_a_rank_pattern_counts(make: Make, llama: Base) -> None:
    found = faults(make(rank_pattern={"layers.0.self_attn.q_proj": 2}), llama)
    assert [f.expected for f in found] == ["r = 2", "r = 2"]
    assert {f.tensor for f in found} == {f"{P}{Q0}.lora_{x}.weight" for x in "AB"}


def test_a_wrong_rank_does_not_hide_another_wrong_size(make: Make, llama: Base) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[f"{P}{Q0}.lora_A.weight"] = zeros(5, 63)

    found = faults(make(edit=edit), llama)
    assert [(f.code, f.tensor) for f in found] == [
        ("rank-mismatch", f"{P}{Q0}.lora_A.weight"), ("shape-mismatch", f"{P}{Q0}.lora_A.weight"),
    ]  # fmt: skip


def test_transposed_factors_are_caught(make: Make, llama: Base) -> None:
    folder = make(edit=lambda t: {k: (d, s[::-1], b) for k, (d, s, b) in t.items()})
    assert len({f.tensor for f in faults(folder, llama)}) == 8


@pytest.mark.parametrize("prefix", ["", "module.", P + P, "_orig_mod." + P, P + "module."])
def test_a_wrong_prefix_is_named_with_the_right_one(
    make: Make, llama: Base, prefix: str
) -> None:
    folder = make(edit=lambda t: {prefix + k.removeprefix(P): v for k, v in t.items()})
    found = [f for f in faults(folder, llama) if f.code == "wrong-prefix"]
    assert len(found) == 8
    assert f"{P}{Q0}.lora_A.weight" in {f.expected for f in found}


def test_a_layer_out_of_range_is_named_with_the_range(make: Make, llama: Base) -> None:
    folder = make(edit=lambda t: renamed(t, "layers.1.", "layers.27."))
    found = [f for f in faults(folder, llama) if f.code == "layer-out-of-range"]
    assert len(found) == 4
    assert found[0].expected == "layers 0 to 1 of the base" and found[0].found == "layer 27"


@pytest.mark.parametrize("number", ["9" * 12, "9" * 5000])
def test_a_layer_of_thousands_of_digits_is_only_a_name(
    make: Make, llama: Base, number: str
) -> None:
    folder = make(edit=lambda t: renamed(t, "layers.1.", f"layers.{number}."))
    assert {"no-such-module"} <= {f.code for f in faults(folder, llama)}


def test_a_resized_vocabulary_says_so_and_how_to_go_on(make: Make, base_of: Bases) -> None:
    rows = base_of("llama").modules["model.embed_tokens"].shape[0]
    more = rows + 7

    def edit(tensors: Tensors) -> None:
        tensors[P + "lm_head.weight"] = zeros(more, 64)
        tensors[P + "model.embed_tokens.weight"] = zeros(more, 64)

    found = faults(make(edit=edit, modules_to_save=["lm_head"]), base_of("llama"))
    assert [f.code for f in found] == ["vocabulary-resized"] * 2
    assert all(f"{rows} rows" in f.expected and f"{more} rows" in f.hint for f in found)


def test_a_lora_of_a_head_with_another_rank_is_not_a_vocabulary(make: Make, llama: Base) -> None:
    rows = llama.modules["lm_head"].shape[0]

    def edit(tensors: Tensors) -> None:
        tensors[P + "lm_head.lora_A.weight"] = zeros(6, 64)
        tensors[P + "lm_head.lora_B.weight"] = zeros(rows + 1, 6)

    found = faults(make(edit=edit, target_modules=["q_proj", "v_proj", "lm_head"]), llama)
    assert {f.code for f in found} == {"rank-mismatch", "shape-mismatch"}
    right = {"rank_pattern": {"lm_head": 6}, "target_modules": ["q_proj", "v_proj", "lm_head"]}
    (resized,) = faults(make(edit=edit, **right), llama)
    assert resized.code == "vocabulary-resized" and f"{rows + 1} rows" in resized.hint


def test_an_option_without_its_tensors_is_caught(make: Make, llama: Base) -> None:
    for option, role in (("use_dora", "magnitude"), ("lora_bias", "B_bias")):
        found = faults(make(**{option: True}), llama)
        assert len(found) == 4
        assert all(f.expected == f"a tensor {role}" and option in f.found for f in found)


def test_tensors_without_their_option_are_caught_once_each(make: Make, base_of: Bases) -> None:
    found = faults(make("llama.dora", use_dora=False), base_of("llama"))
    keys = [f.tensor for f in found]
    assert keys and len(keys) == len(set(keys))
    assert all(f.code == "unexpected-tensor" and "magnitude" in f.tensor for f in found)


def test_a_magnitude_without_factors_is_caught_without_a_base(make: Make) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[P + "lm_head.lora_magnitude_vector"] = zeros(8)

    (found,) = [f for f in read_adapter(locate(make(edit=edit))).findings if f.severity == ERROR]
    assert (found.code, found.tensor) == ("missing-tensor", "lm_head")


def test_a_saved_module_without_its_weight_is_caught(make: Make, llama: Base) -> None:
    (found,) = faults(make(modules_to_save=["lm_head"]), llama)
    assert (found.code, found.tensor) == ("missing-tensor", "lm_head")
    assert "replace.weight" in found.expected


def test_token_rows_that_differ_from_the_config_are_caught_without_a_base(make: Make) -> None:
    case = "llama.lora_tokens"
    config = json.loads((make(case) / "adapter_config.json").read_text())
    tokens = config["trainable_token_indices"]
    rows = tokens if isinstance(tokens, list) else next(iter(tokens.values()))
    assert rows
    found = [
        (f.code, f.found)
        for wrong in ([*rows, 0], None)
        for f in read_adapter(locate(make(case, trainable_token_indices=wrong))).findings
        if f.severity == ERROR
    ]
    assert [code for code, _ in found] == ["shape-mismatch", "unexpected-tensor"]
    assert str(len(rows)) in found[0][1]


def test_a_token_past_the_table_is_caught(make: Make, llama: Base) -> None:
    case, table = "llama.lora_tokens", llama.modules["model.embed_tokens"].shape[0]
    config = json.loads((make(case) / "adapter_config.json").read_text())
    tokens = config["trainable_token_indices"]
    rows = tokens if isinstance(tokens, list) else next(iter(tokens.values()))
    wrong = [*rows[:-1], table]
    (found,) = faults(make(case, trainable_token_indices=wrong), llama)
    assert (found.code, found.found) == ("token-out-of-range", f"row {table}")


@pytest.mark.parametrize("dtype", ["I8", "U8", "I64", "BOOL", "F8_E4M3", "C64"])
def test_a_dtype_that_is_no_float_is_caught(make: Make, llama: Base, dtype: str) -> None:
    from adapterkit.hub.headers import DTYPE_BITS

    def edit(tensors: Tensors) -> None:
        _, shape, _ = tensors[f"{P}{Q0}.lora_A.weight"]
        size = shape[0] * shape[1] * DTYPE_BITS[dtype] // 8
        tensors[f"{P}{Q0}.lora_A.weight"] = dtype, shape, bytes(size)

    (found,) = faults(make(edit=edit), llama)
    assert (found.code, found.found) == ("wrong-dtype", f"dtype {dtype}")


@pytest.mark.parametrize("dtype", ["U8", "BOOL", "F8_E4M3", "C64"])
@pytest.mark.parametrize("case", ["bert.prefix_cls", "bert.prompt_cls", "bert.lora_cls"])
def test_a_head_beside_any_kind_is_of_floats(
    make: Make, base_of: Bases, case: str, dtype: str
) -> None:
    from adapterkit.hub.headers import DTYPE_BITS

    def edit(tensors: Tensors) -> None:
        (key,) = (key for key in tensors if key.endswith("classifier.bias"))
        _, shape, _ = tensors[key]
        tensors[key] = dtype, shape, bytes(shape[0] * DTYPE_BITS[dtype] // 8)

    (found,) = faults(make(case, edit), base_of("bert"))
    assert (found.code, found.found) == ("wrong-dtype", f"dtype {dtype}")


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_factor_that_is_one_number_is_caught(make: Make, llama: Base, factor: str) -> None:
    key = f"{P}{Q0}.lora_{factor}.weight"

    def edit(tensors: Tensors) -> None:
        tensors[key] = "F32", [], bytes(4)

    (found,) = faults(make(edit=edit), llama)
    assert (found.code, found.tensor, found.found) == ("shape-mismatch", key, "shape []")


def test_a_target_of_a_type_without_lora_is_not_supported(make: Make, llama: Base) -> None:
    found = faults(make(target_modules=["q_proj", "v_proj", "input_layernorm"]), llama)
    assert {(f.code, f.found) for f in found} == {("unsupported", "a norm module")}


def test_another_name_of_the_base_is_a_doubt(make: Make, llama: Base) -> None:
    adapter = read_adapter(locate(make(base_model_name_or_path="acme/other-7b")))
    (doubt,) = fit(adapter, llama)
    assert (doubt.code, doubt.severity, doubt.expected) == (
        "other-base-name", "warning", "acme/other-7b",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("made_for", "base"),
    [
        ("meta/Llama-3", "/models/llama-3"),
        ("/data/llama-3/", "./llama-3"),
        (r"C:\models\llama-3", "llama-3"),
        ("meta/Llama-3", "/cache/models--meta--llama-3/snapshots/" + "c" * 40),
        ("meta/Llama-3", "/cache/models--meta--llama-3/snapshots/" + "c" * 40 + "/"),
    ],
)
def test_two_spellings_of_one_base_are_no_doubt(
    make: Make, llama: Base, made_for: str, base: str
) -> None:
    adapter = read_adapter(locate(make(base_model_name_or_path=made_for)))
    assert fit(adapter, replace(llama, name=base)) == []


def test_another_task_is_a_doubt(make: Make, llama: Base) -> None:
    report = check(make(task_type="SEQ_2_SEQ_LM"), base=llama)
    assert "other-task" in {w.code for w in report.warnings}


def test_all_faults_are_said_at_once(make: Make, base_of: Bases) -> None:
    def edit(tensors: Tensors) -> Tensors:
        del tensors[f"{P}{Q0}.lora_B.weight"]
        tensors[P + "extra.lora_A.weight"] = zeros(8, 4)
        tensors["junk"] = zeros(1)
        return renamed(tensors, "layers.1.self_attn.v", "layers.9.self_attn.v")

    found = faults(make(edit=edit, brand_new=1, use_qalora=True), base_of("llama_wide"))
    assert {f.code for f in found} == {
        "missing-tensor", "no-such-module", "unexpected-tensor", "layer-out-of-range",
        "unknown-field", "unsupported", "shape-mismatch",
    }  # fmt: skip


def read_cases() -> list[tuple[str, str]]:
    """(case, base) of every adapter that is read, one for each set of bytes."""
    found: dict[str, tuple[str, str]] = {}
    for case in json.loads((FIXTURES / "index.json").read_text())["cases"]:
        for adapter in case["adapters"]:
            path = adapter["path"]
            known = "adapter_model.safetensors" in adapter["files"]
            if (known and adapter.get("peft_type") in PEFT_TYPES) or is_hub(adapter):
                found.setdefault(path, (path, case["base_path"]))
    return list(found.values())


def is_hub(adapter: dict[str, Any]) -> bool:
    """Whether it is of an architecture of AdapterHub that is read."""
    if adapter["format"] != "adapters":
        return False
    config = json.loads((FIXTURES / adapter["path"] / "adapter_config.json").read_text())["config"]
    return (config.get("architecture") or BOTTLENECK) in ARCHITECTURES


@pytest.fixture(scope="session")
def described() -> dict[str, Base]:
    return {}


@pytest.mark.parametrize(("path", "base_path"), read_cases(), ids=lambda path: path)
def test_no_tensor_can_be_lost_renamed_or_reshaped_unnoticed(
    path: str,
    base_path: str,
    fixtures: Path,
    described: dict[str, Base],
    base_of: Bases,
) -> None:
    """Of every adapter and for every one of its tensors."""
    adapter = read_adapter(locate(fixtures / path))
    base = described.setdefault(base_path, base_of(Path(base_path).name))
    base = for_task(base, adapter)
    before = {f for f in fit(adapter, base) if f.severity == ERROR}
    if before:  # refused as it is: another base's, or an option that is not applied
        return
    for place, stored in adapter.tensors.items():
        rest = {key: tensor for key, tensor in adapter.tensors.items() if key != place}
        wider = replace(stored, shape=(*stored.shape[:-1], stored.shape[-1] + 1))
        changes = {
            "removed": rest,
            "renamed": rest | {(place[0] + "_", place[1]): stored},
            "reshaped": rest | {place: wider},
        }
        if place[1] == "table" or place[1].startswith("wrapper."):  # copies of the base's own
            del changes["removed"]
        for change, tensors in changes.items():
            found = problems(adapter, tensors, base)
            assert names(place, stored.key, found), f"{stored.key} {change}"


def problems(adapter: Any, tensors: Any, base: Base) -> list[Finding]:
    from adapterkit.hub.kinds import kind

    changed = replace(adapter, tensors=tensors)
    found = kind(adapter.kind).problems(changed)
    changed = replace(changed, findings=(*adapter.findings, *found))
    return [f for f in fit(changed, base) if f.severity == ERROR]


def names(place: tuple[str, str], key: str, found: list[Finding]) -> bool:
    """Whether a finding names the tensor, its module, or the entry of the config it belongs to."""
    entries = {"the input embedding", "bias"} if place[1] in ("tokens", "replace.bias") else set()
    if not place[0]:  # of no module, so it goes by its role, in a union by that of its part
        entries = {place[1], re.sub(r"^\d+\.", "", place[1])}
    if place[1].endswith(".wte"):  # rows as wide as the layer behind them takes
        entries |= {f.tensor for f in found if "control_trans.0" in f.tensor}
    return any(
        f.tensor in {key, place[0], *entries} or place[0].endswith("." + f.tensor) for f in found
    )

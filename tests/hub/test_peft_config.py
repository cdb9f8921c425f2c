"""`adapter_config.json` of PEFT: every field is understood, refused by name, or said to be odd."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.fields import LoraFields
from adapterkit.hub.findings import ERROR, UNSUPPORTED, WARNING
from adapterkit.hub.formats.peft_lora import REFUSED
from adapterkit.hub.formats.peft_type import OTHER_TYPES, PEFT_TYPES
from adapterkit.hub.locate import locate
from adapterkit.hub.read import read_adapter
from adapterkit.registry.errors import DamagedError, NotFoundError

Make = Callable[..., Path]
NUMBERS: list[Any] = ["4", 4.0, [4], {}, True, False]
TEXTS: list[Any] = [1, True, [], {}, ["x"]]
# field -> values of a wrong type or outside of what makes sense
WRONG: dict[str, list[Any]] = {
    "r": [*NUMBERS, None, 0, -1, 1 << 17, 10**50],
    "lora_alpha": ["8", [8], True, None, float("nan"), float("inf"), -float("inf")],
    "use_rslora": ["true", 1, 0, [], {}],
    "use_dora": ["true", 1, 0, [], {}],
    "lora_bias": ["true", 1, "none", []],
    "fan_in_fan_out": ["false", 1, []],
    "ensure_weight_tying": ["x", 1],
    "bias": ["some", "", 1, True, ["none"], {}],
    "target_modules": [1, True, {}, {"q": 1}, ["q_proj", 1], ["q", None], [""], [[]], "(", "*"],
    "exclude_modules": [1, True, {}, ["q", 1], [""], "("],
    "modules_to_save": [1, True, {}, ["q", 1], [""], [None]],
    "layers_to_transform": ["1", 1.0, True, [1, "2"], [-1], -1, {}],
    "layers_pattern": [1, {}, ["x", 1], [""]],
    "rank_pattern": [[], "x", 1, *({"q": x} for x in ("4", 0, -1, 4.0, True, None, []))],
    "alpha_pattern": [[], "x", 1, *({"q": x} for x in ("4", True, None, float("nan"), []))],
    "trainable_token_indices": [1, "x", [1, "2"], [-1], [1, 1], {"e": []}, {"e": 1}, {"e": [1.0]}],
    "init_lora_weights": [1, [], {}, "nonsense", 0.5],
    "base_model_name_or_path": [*TEXTS, "x" * 5000],
    "revision": TEXTS,
    "task_type": TEXTS,
    "peft_version": TEXTS,
}  # fmt: skip
CASES = [(field, value) for field, values in WRONG.items() for value in values]


def read(folder: Path, *allowed: str) -> Adapter:
    return read_adapter(locate(folder), allowed)


def codes(adapter: Adapter, severity: str) -> dict[str, str]:
    return {f.tensor: f.code for f in adapter.findings if f.severity == severity}


@pytest.mark.parametrize(("field", "value"), CASES, ids=[f"{f}={v!r:.20}" for f, v in CASES])
def test_a_wrong_value_is_damage_that_names_the_field(make: Make, field: str, value: Any) -> None:
    with pytest.raises(DamagedError) as caught:
        read(make(**{field: value}))
    message = str(caught.value)
    assert field in message and "adapter_config.json" in message or "not a valid regular" in message
    assert len(message) < 1000


def test_all_wrong_values_are_said_at_once(make: Make) -> None:
    wrong = {"r": "4", "lora_alpha": None, "use_dora": 1, "bias": "x", "target_modules": 5}
    with pytest.raises(DamagedError) as caught:
        read(make(**wrong))
    for field, value in wrong.items():
        assert f"{field} is {value!r}, expected" in str(caught.value)


@pytest.mark.parametrize("field", sorted(WRONG.keys() - {"r", "lora_alpha", "target_modules"}))
def test_null_and_absent_mean_the_default(make: Make, field: str) -> None:
    expected = read(make(**{field: ...}))
    found = read(make(**{field: None}))
    assert (found.fields, found.targets) == (expected.fields, expected.targets)
    assert not codes(found, ERROR)


@pytest.mark.parametrize(
    ("config", "field"),
    [({"layers_to_transform": []}, "layers"), ({"exclude_modules": ""}, "exclude")],
)
def test_empty_asks_for_nothing(make: Make, config: dict[str, Any], field: str) -> None:
    assert getattr(read(make(**config)).targets, field) is None


def test_what_is_left_out_is_as_in_peft(make: Make) -> None:
    adapter = read(make(r=..., lora_alpha=...))
    assert (adapter.fields.rank, adapter.fields.alpha) == (8, 8)


def test_patterns_are_resolved_for_the_modules_of_the_file(make: Make) -> None:
    layer = "model.layers.{}.self_attn.{}"
    adapter = read(make(
        rank_pattern={"layers.0.self_attn.q_proj": 3, r"layers\.\d\.self_attn\.q_proj": 5},
        alpha_pattern={"v_proj": 1.5},
        use_rslora=True,
    ))  # fmt: skip
    fields: LoraFields = adapter.fields
    assert fields.ranks == {layer.format(0, "q_proj"): 3, layer.format(1, "q_proj"): 5}
    assert fields.alphas == dict.fromkeys([layer.format(i, "v_proj") for i in (0, 1)], 1.5)
    assert fields.scaling(layer.format(0, "v_proj")) == 1.5 / fields.rank**0.5


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_is_not_applied_is_refused_by_name_and_reason(
    make: Make, option: str
) -> None:
    adapter = read(make(**{option: [1]}))
    (finding,) = [f for f in adapter.findings if f.severity == ERROR]
    assert (finding.code, finding.tensor) == (UNSUPPORTED, option)
    assert finding.found == REFUSED[option]
    with pytest.raises(NotFoundError, match=f"not supported.*\n.*{option}"):
        adapter.require_sound()


@pytest.mark.parametrize("option", REFUSED)
@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_an_option_that_asks_for_nothing_is_fine(make: Make, option: str, value: Any) -> None:
    assert not codes(read(make(**{option: value})), ERROR)


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "CorDA", "loftq", "lora_ga"])
def test_an_init_that_changes_the_base_is_refused(make: Make, init: str) -> None:
    adapter = read(make(init_lora_weights=init))
    assert codes(adapter, ERROR) == {"init_lora_weights": UNSUPPORTED}
    with pytest.raises(NotFoundError, match="subtracts the adapter's start from the base"):
        adapter.require_sound()


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "Gaussian"])
def test_an_init_without_effect_is_fine(make: Make, init: Any) -> None:
    assert not codes(read(make(init_lora_weights=init)), ERROR)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_field_that_asks_for_nothing_is_a_warning(make: Make, value: Any) -> None:
    adapter = read(make(brand_new=value))
    assert codes(adapter, WARNING)["brand_new"] == "unknown-field"
    assert adapter.unknown_fields == ("brand_new",)
    adapter.require_sound()


@pytest.mark.parametrize("value", [True, 0, 1, 0.0, "x", [0], {"a": None}])
def test_an_unknown_field_with_a_value_is_an_error_unless_allowed(make: Make, value: Any) -> None:
    folder = make(brand_new=value)
    adapter = read(folder)
    (finding,) = [f for f in adapter.findings if f.severity == ERROR]
    assert (finding.code, finding.tensor) == ("unknown-field", "brand_new")
    assert finding.hint.startswith("--allow-field brand_new")
    with pytest.raises(DamagedError, match="brand_new"):
        adapter.require_sound()
    allowed = read(folder, "brand_new")
    allowed.require_sound()
    assert codes(allowed, WARNING)["brand_new"] == "unknown-field"
    assert allowed.unknown_fields == ("brand_new",)


def test_allowing_one_field_allows_no_other(make: Make) -> None:
    assert codes(read(make(one=1, two=2), "one"), ERROR) == {"two": "unknown-field"}


def test_allowing_does_not_turn_off_a_refusal(make: Make) -> None:
    adapter = read(make(layer_replication=[[0, 1]]), "layer_replication")
    assert codes(adapter, ERROR) == {"layer_replication": UNSUPPORTED}


def test_every_problem_of_a_folder_is_said_at_once(make: Make) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        (a, *_) = tensors
        tensors["module." + a] = tensors.pop(a)

    adapter = read(make(edit=edit, brand_new=1, use_qalora=True, use_dora=True))
    with pytest.raises(DamagedError) as caught:
        adapter.require_sound()
    for word in ("brand_new", "use_qalora", "wrong-prefix", "use_dora is true", "incomplete"):
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", sorted(OTHER_TYPES - PEFT_TYPES.keys()))
def test_a_known_type_that_is_not_applied_is_refused_by_name(make: Make, kind: str) -> None:
    with pytest.raises(NotFoundError, match=f"type {kind} are known, but not applied") as caught:
        read(make(peft_type=kind))
    assert "LORA" in str(caught.value.hint)


@pytest.mark.parametrize("kind", ["SUPERLORA", "", None, 5, ["LORA"], {"a": 1}, True, "L" * 5000])
def test_an_unknown_type_is_refused_by_name(make: Make, kind: Any) -> None:
    with pytest.raises(NotFoundError, match="is not a known adapter type") as caught:
        read(make(peft_type=kind))
    assert str(kind)[:20] in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", ["lora", "Lora", "trainable_tokens"])
def test_a_type_in_lower_case_is_refused_with_its_spelling(make: Make, kind: str) -> None:
    with pytest.raises(DamagedError, match=f"peft_type is {kind}, expected {kind.upper()}"):
        read(make(peft_type=kind))


def test_a_config_without_a_type_is_of_another_tool_or_of_none(make: Make) -> None:
    hub = {"model_type": "bert", "model_name": "bert-base", "peft_type": ...}
    with pytest.raises(DamagedError, match="name is None, expected the adapter's name"):
        read(make(**hub))
    with pytest.raises(DamagedError, match="lora_parameters is None, expected an object"):
        read(make(fine_tune_type="lora", peft_type=...))
    with pytest.raises(NotFoundError, match="peft_type is missing"):
        read(make(peft_type=...))


def test_trainable_tokens_need_their_list(make: Make) -> None:
    with pytest.raises(DamagedError, match="token_indices"):
        read(make("llama.trainable_tokens", token_indices=...))
    adapter = read(make("llama.trainable_tokens"))
    assert adapter.kind == "trainable_tokens" and adapter.fields.replaced.tokens[""]


def test_targets_of_all_shapes_are_understood(make: Make) -> None:
    assert read(make(target_modules=["b", "a"])).targets.modules == ("b", "a")
    assert read(make(target_modules=".*x")).targets.modules == ".*x"
    assert read(make(layers_to_transform=3, layers_pattern="h")).targets.layers == (3,)


@pytest.mark.parametrize("targets", [[], "", None])
def test_a_lora_without_targets_is_an_error(make: Make, targets: Any) -> None:
    with pytest.raises(DamagedError, match="target_modules"):
        read(make(target_modules=targets)).require_sound()


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save", "layers_pattern"])
def test_a_list_is_bounded(make: Make, field: str) -> None:
    with pytest.raises(DamagedError, match=f"{field}.*10000 names at most"):
        read(make(**{field: [f"m{i}" for i in range(10_001)]}))


def test_names_of_thousands_of_characters_stay_out_of_messages(make: Make) -> None:
    name = "\x1b" + "n" * 5000
    adapter = read(make(**{name: "v" * 5000}, rank_pattern={name: 4}))
    with pytest.raises(DamagedError) as caught:
        adapter.require_sound()
    assert len(str(caught.value)) < 2000 and "\x1b" not in str(caught.value)


def test_nothing_a_config_names_is_imported(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(auto_mapping={"parent_library": "payload", "base_model_class": "X"})
    (folder / "payload.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    read(folder).require_sound()


def test_the_config_is_kept_as_it_is(make: Make) -> None:
    folder = make(brand_new={"deep": [1, None]})
    adapter = read(folder)
    assert adapter.config == json.loads((folder / "adapter_config.json").read_text())


def test_a_folder_without_config_or_weights_says_what_is_missing(make: Make) -> None:
    folder = make()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(DamagedError, match="adapter_model.bin is not a file of torch.save"):
        read(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(NotFoundError, match="adapter_model.safetensors is missing"):
        read(folder)
    (folder / "sub").mkdir()
    (folder / "README.md").write_text("x")
    (folder / "adapter_config.json").rename(folder / "sub" / "adapter_config.json")
    with pytest.raises(NotFoundError, match="adapter_config.json is missing") as caught:
        read(folder)
    assert "sub/adapter_config.json" in str(caught.value.hint)



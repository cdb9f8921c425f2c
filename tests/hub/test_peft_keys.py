"""Keys of a PEFT file: each is placed, or named with what is wrong with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterkit.hub.fields import ReplacedFields
from adapterkit.hub.findings import ERROR, INFO, WARNING
from adapterkit.hub.formats.peft_keys import Keys, read_keys
from adapterkit.hub.formats.peft_lora import LORA
from adapterkit.hub.locate import locate
from adapterkit.hub.matching import Targets
from adapterkit.hub.read import read_adapter
from adapterkit.registry.errors import DamagedError

P = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"


def keys(*names: str, bias: str = "none", saved: tuple[str, ...] = ()) -> Keys:
    return read_keys(names, LORA, ReplacedFields(bias=bias), Targets(saved=saved))


@pytest.mark.parametrize(
    ("key", "place"),
    [
        (f"{Q}.lora_A.weight", (Q, "A")),
        (f"{Q}.lora_B.weight", (Q, "B")),
        (f"{Q}.lora_B.bias", (Q, "B_bias")),
        (f"{Q}.lora_magnitude_vector", (Q, "magnitude")),
        (f"{Q}.lora_magnitude_vector.weight", (Q, "magnitude")),
        (f"{Q}.base_layer.bias", (Q, "replace.bias")),
        ("wte.lora_embedding_A", ("wte", "embedding_A")),
        ("wte.lora_embedding_B", ("wte", "embedding_B")),
        ("wte.base_layer.weight", ("wte", "table")),
        ("model.embed_tokens.weight", ("model.embed_tokens", "table")),
        ("wte.token_adapter.trainable_tokens_delta", ("wte", "tokens")),
        ("wte.trainable_tokens_delta", ("wte", "tokens")),
    ],
)
def test_every_ending_has_its_place(key: str, place: tuple[str, str]) -> None:
    found = keys(P + key)
    assert found.places == {P + key: place}
    assert not found.strays and not found.findings


def test_saved_modules_are_replacements_and_their_wrappers_copies() -> None:
    found = keys(
        P + "score.weight", P + "score.dense.bias", P + "score.modules_to_save.weight",
        P + "score.original_module.bias", saved=("score",),
    )  # fmt: skip
    assert list(found.places.values()) == [
        ("score", "replace.weight"),
        ("score.dense", "replace.bias"),
        ("score", "wrapper.modules_to_save.weight"),
        ("score", "wrapper.original_module.bias"),
    ]
    assert [(f.severity, f.code) for f in found.findings] == [(INFO, "wrapper-copy")] * 2


def test_biases_are_replacements_only_where_the_config_trains_them() -> None:
    assert keys(P + "h.0.bias", bias="all").places == {P + "h.0.bias": ("h.0", "replace.bias")}
    for bias in ("none", "lora_only"):
        assert keys(P + "h.0.bias", bias=bias).strays == [P + "h.0.bias"]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (f"{Q}.lora_A.weight", f"{P}{Q}.lora_A.weight"),
        (f"{P}{P}{Q}.lora_A.weight", f"{P}{Q}.lora_A.weight"),
        (f"{P}module.{Q}.lora_A.weight", f"{P}{Q}.lora_A.weight"),
        (f"module.{P}{Q}.lora_A.weight", f"{P}{Q}.lora_A.weight"),
        (f"_orig_mod.{P}{Q}.lora_B.weight", f"{P}{Q}.lora_B.weight"),
        (f"{P}_orig_mod.module.{Q}.lora_B.weight", f"{P}{Q}.lora_B.weight"),
    ],
)
def test_a_wrong_prefix_is_an_error_that_says_the_right_one(key: str, expected: str) -> None:
    (finding,) = keys(key).findings
    assert (finding.severity, finding.code, finding.tensor) == (ERROR, "wrong-prefix", key)
    assert finding.expected == expected


@pytest.mark.parametrize(
    "key",
    [
        P + "h.0.weight", P + "lora_A.weight", P + ".lora_A.weight", P, "", "x",
        P + f"{Q}.lora_AB.weight", P + f"{Q}.lora_A\u200b.weight",
        P + f"{Q}.lora_E", P + f"{Q}.lora_A", P + "score.weight",
        P + f"{Q}.lora_A.weight.absmax", "__other__",
    ],
)  # fmt: skip
def test_a_key_nothing_can_be_made_of_is_an_error_that_names_it(key: str) -> None:
    found = keys(key)
    assert found.strays == [key] and not found.places
    (finding,) = found.findings
    assert (finding.severity, finding.tensor) == (ERROR, key)


@pytest.mark.parametrize("name", ["default", "my-adapter", "weight2", "a b"])
def test_the_name_of_the_adapter_in_keys_is_repaired_and_said(name: str) -> None:
    found = keys(
        f"{P}{Q}.lora_A.{name}.weight", f"{P}{Q}.lora_B.{name}.bias",
        f"{P}wte.lora_embedding_A.{name}", f"{P}{Q}.lora_magnitude_vector.{name}.weight",
        f"{P}wte.trainable_tokens_delta.{name}",
    )  # fmt: skip
    assert list(found.places.values()) == [
        (Q, "A"), (Q, "B_bias"), ("wte", "embedding_A"), (Q, "magnitude"), ("wte", "tokens"),
    ]  # fmt: skip
    (finding,) = found.findings
    assert (finding.severity, finding.code) == (WARNING, "adapter-name-in-keys")
    assert repr(name) in finding.found


def test_several_adapters_in_one_file_are_an_error_that_names_them() -> None:
    found = keys(f"{P}{Q}.lora_A.one.weight", f"{P}{Q}.lora_A.two.weight")
    severities = {(f.severity, f.code) for f in found.findings}
    assert (ERROR, "several-adapters") in severities
    assert (ERROR, "duplicate-tensor") in severities
    (finding,) = [f for f in found.findings if f.code == "several-adapters"]
    assert finding.found == "one, two"


def test_a_key_with_and_without_the_name_is_a_duplicate() -> None:
    found = keys(f"{P}{Q}.lora_A.weight", f"{P}{Q}.lora_A.default.weight")
    (finding,) = [f for f in found.findings if f.severity == ERROR]
    assert finding.code == "duplicate-tensor"
    assert finding.found == f"also {P}{Q}.lora_A.weight"


@pytest.mark.parametrize(
    "key", ["module." * 500_000 + "x", P + "a." * 500_000 + "weight", P + "x.lora_A." * 300_000]
)
def test_a_key_of_megabytes_takes_no_time(key: str) -> None:
    started = time.process_time()
    found = keys(key, saved=("score",))
    assert time.process_time() - started < 2
    assert len(str(found.findings[0])) < 1000


def test_all_odd_keys_of_a_file_are_said_at_once(make: Callable[..., Path]) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        first, second, third, *_ = tensors
        tensors["module." + first] = tensors.pop(first)
        tensors[second.replace("lora_B", "lora_Q")] = tensors.pop(second)
        tensors[P + "unrelated"] = tensors[third]

    adapter = read_adapter(locate(make(edit=edit)))
    assert len(adapter.unconsumed) == 3
    with pytest.raises(DamagedError) as caught:
        adapter.require_sound()
    for word in ("wrong-prefix", "lora_Q", "unrelated", "save the adapter again"):
        assert word in str(caught.value)


def test_an_adapter_saved_with_its_name_is_the_same_adapter(make: Callable[..., Path]) -> None:
    def edit(tensors: dict[str, Any]) -> dict[str, Any]:
        return {key.replace(".weight", ".default.weight"): t for key, t in tensors.items()}

    plain, named = read_adapter(locate(make())), read_adapter(locate(make(edit=edit)))
    named.require_sound()
    assert named.tensors.keys() == plain.tensors.keys()
    assert [f.code for f in named.findings] == ["adapter-name-in-keys"]

"""Each `peft_type` beside LORA: what its config may say, and what is wrong with its files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from adapterkit.hub import attach, describe
from adapterkit.hub.bases.base import Base
from adapterkit.hub.diff import diff
from adapterkit.hub.findings import ERROR
from adapterkit.hub.fit import fit
from adapterkit.hub.formats.peft_config import COMMON
from adapterkit.hub.formats.peft_type import PEFT_TYPES, peft_type
from adapterkit.hub.locate import locate
from adapterkit.hub.read import read_adapter
from adapterkit.registry.errors import DamagedError, NotFoundError

Make = Callable[..., Path]
P, Q0 = "base_model.model.", "model.layers.0.self_attn.q_proj"
MIXER = f"{P}{Q0}.lora_AB.weight"
MOSLORA, ADALORA, VERA = "llama.moslora_v10", "gpt2.adalora", "llama.vera_regenerate"
# (case, field, value) of a wrong type or outside of what makes sense
WRONG: list[tuple[str, str, Any]] = [
    *((MOSLORA, "lora_use_mixer", value) for value in ("yes", 1, [True])),
    *((MOSLORA, "lora_use_mixer_pattern", value) for value in ("x", [1], {"q_proj": 1})),
    *((ADALORA, "init_r", value) for value in (0, -1, "5", None, 4.0, True)),
    *((ADALORA, "lora_alpha", value) for value in ("5", None, float("nan"))),
    *((ADALORA, "rank_pattern", value) for value in ("x", {"a.lora_E": 3}, {"a.lora_E": [True]})),
    *((VERA, "projection_prng_key", value) for value in ("7", -1, None, 1 << 64, 1.5, True)),
    *((VERA, "save_projection", value) for value in ("no", 0, [])),
    *((VERA, "r", value) for value in (0, "8", None)),
    *((VERA, "bias", value) for value in ("lora_only", 1)),
    *(("llama.loha", "r", value) for value in (0, "8", None, 1 << 20)),
    *(("llama.loha", "alpha", value) for value in ("8", None, float("inf"))),
    *(("llama.lokr_full", "rank_pattern", value) for value in ([], {"q": "4"}, {"q": 0})),
    *(("llama.lokr_full", "alpha_pattern", value) for value in ([], {"q": "4"})),
]


def errors(folder: Path, base: Base) -> dict[str, str]:
    """tensor or field -> code."""
    adapter = read_adapter(locate(folder))
    return {f.tensor: f.code for f in fit(adapter, base) if f.severity == ERROR}


@pytest.mark.parametrize("name", [name for name in PEFT_TYPES if name != "BOTTLENECK"])
def test_every_field_that_peft_writes_is_known(name: str) -> None:
    """But for those of the fork that PEFT does not have."""
    peft = pytest.importorskip("peft")
    written = {field.name for field in dataclasses.fields(peft.PEFT_TYPE_TO_CONFIG_MAPPING[name])}
    row = peft_type(name, {}, ())
    assert written <= COMMON | row.known | row.inert | row.refused.keys()


@pytest.mark.parametrize(("case", "field", "value"), WRONG)
def test_a_wrong_value_is_damage_that_names_the_field(
    make: Make, case: str, field: str, value: Any
) -> None:
    with pytest.raises(DamagedError, match=field):
        read_adapter(locate(make(case, **{field: value})))


@pytest.mark.parametrize(
    ("case", "variant", "ranks"),
    [
        (MOSLORA, "MoSLoRA", {6: 8}),
        (ADALORA, "AdaLoRA", {5: 2}),
        (VERA, "VeRA", {8: 4}),
        ("llama.loha", "LoHa", {3: 4}),
        ("llama.lokr_full", "LoKr", {40: 4}),
        ("gpt2.ln_tuning", "LN tuning", {}),
        ("qwen2.beft", "BEFT", {}),
    ],
)
def test_a_description_says_the_variant_and_its_ranks(
    fixtures: Path, case: str, variant: str, ranks: dict[int, int]
) -> None:
    info = describe(fixtures / "cases" / case / "adapter")
    assert (info.variant, dict(info.ranks)) == (variant, ranks)


@pytest.mark.parametrize(
    "case",
    [MOSLORA, ADALORA, VERA, "llama.loha", "llama.lokr_full", "gpt2.ln_tuning", "qwen2.beft"],
)
def test_a_kind_without_factors_in_its_file_can_be_compared_too(fixtures: Path, case: str) -> None:
    folder = fixtures / "cases" / case / "adapter"
    found = diff(folder, folder)
    assert found.modules and not found.config
    assert all(module.distance in (0, None) for module in found.modules)


def test_patterns_of_moslora_are_looked_up_jointly(make: Make) -> None:
    """As in peft up to 0.13: the first key of either table counts for rank, alpha and mixer."""
    config = {
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 5, "v_proj": 2},
        "lora_use_mixer_pattern": {"v_proj": False, "k_proj": False},
    }
    fields = read_adapter(locate(make(MOSLORA, **config))).fields
    value, key = (Q0.replace("q_proj", name) for name in ("v_proj", "k_proj"))
    assert (fields.rank_of(Q0), fields.scaling(Q0)) == (3, 9 / 3)  # the alpha of q_proj is not seen
    assert (fields.rank_of(value), fields.scaling(value)) == (6, 2 / 6)
    assert not fields.has_mixer(value)
    assert fields.has_mixer(key)  # a key that is in neither of the other tables is not seen either


def test_a_mixer_that_the_config_lost_is_applied_and_said(
    make: Make, fixtures: Path, bad_inputs: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(fixtures / "bases" / "llama").eval()
    tokens, found = torch.arange(12)[None], []
    flagged, lost = make(MOSLORA), make(MOSLORA, lora_use_mixer=..., lora_use_mixer_pattern=...)
    for folder in (flagged, lost, bad_inputs / "bad" / "moslora_flag_missing"):
        with pytest.warns(match="base-not-recorded") as seen, attach(model, folder):
            found.append(model(tokens).logits)
        assert ("mixer-not-declared" in str(seen[0].message)) == (folder != flagged)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("config", "change", "tensor", "code"),
    [
        ({}, "removed", Q0, "missing-tensor"),
        ({}, "not square", MIXER, "shape-mismatch"),
        ({"lora_use_mixer": False}, "", MIXER, "unexpected-tensor"),
        ({"use_dora": True}, "", "use_dora", "unsupported"),
        ({"r": 5}, "", MIXER, "shape-mismatch"),
    ],
)
def test_a_mixer_is_never_dropped(
    make: Make, llama: Base, config: dict[str, Any], change: str, tensor: str, code: str
) -> None:
    def edit(tensors: Any) -> None:
        dtype, shape, data = tensors.pop(MIXER)
        if change != "removed":
            wide = [shape[0] * 2, shape[1] // 2] if change else shape
            tensors[MIXER] = (dtype, wide, data)

    assert errors(make(MOSLORA, edit, **config), llama)[tensor] == code


def test_a_mixer_without_its_factors_is_an_error(make: Make, llama: Base) -> None:
    def edit(tensors: Any) -> None:
        del tensors[f"{P}{Q0}.lora_A.weight"], tensors[f"{P}{Q0}.lora_B.weight"]

    assert errors(make(MOSLORA, edit), llama)[Q0] == "missing-tensor"


def test_projections_and_the_flag_that_says_where_they_are_must_agree(
    make: Make, llama: Base
) -> None:
    def edit(tensors: Any) -> None:
        tensors["base_model.vera_A"] = ("F32", [8, 128], bytes(4 * 8 * 128))

    found = errors(make(VERA, save_projection=True), llama)
    assert found == {"shared_A": "missing-tensor", "shared_B": "missing-tensor"}
    assert errors(make(VERA, edit), llama) == {"base_model.vera_A": "unexpected-tensor"}
    found = errors(make(VERA, edit, save_projection=True), llama)
    assert found == {"shared_B": "missing-tensor"}


def test_another_seed_draws_other_projections(make: Make, fixtures: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(fixtures / "bases" / "llama").eval()
    found = []
    for seed in (1234, 1235):
        with pytest.warns(), attach(model, make(VERA, projection_prng_key=seed)):
            found.append(model(torch.arange(5)[None]).logits)
    assert not torch.allclose(*found)


@pytest.mark.parametrize("case", ["llama.loha", "llama.lokr_full", "qwen2.beft", "gpt2.ln_tuning"])
def test_modules_of_a_type_that_the_kind_cannot_change_are_refused_by_name(
    make: Make, base_of: Callable[[str], Base], case: str
) -> None:
    base = base_of(case.partition(".")[0])
    table = next(name for name, module in base.modules.items() if module.type == "embedding")
    found = errors(make(case, target_modules=[table]), base)
    assert found[table] == "unsupported"


def test_factors_of_convolutions_are_named_as_nothing_known(make: Make, llama: Base) -> None:
    def edit(tensors: Any) -> None:
        tensors[f"{P}{Q0}.hada_t1"] = ("F32", [3, 3, 3, 3], bytes(4 * 81))

    assert errors(make("llama.loha", edit), llama) == {f"{P}{Q0}.hada_t1": "unexpected-tensor"}


@pytest.mark.parametrize("field", ["use_dora", "lora_bias", "layer_replication"])
def test_what_adalora_cannot_do_is_refused_by_name(make: Make, field: str) -> None:
    with pytest.raises(NotFoundError, match=field):
        read_adapter(locate(make(ADALORA, **{field: [1]}))).require_sound()


def test_no_kind_names_a_file_key_and_no_format_holds_a_formula() -> None:
    hub = Path(__file__).parents[2] / "hub"
    endings = {
        ending.removesuffix(".weight").lstrip(".")
        for name in PEFT_TYPES
        for ending in peft_type(name, {}, ("x.lora_AB.weight",)).endings
    }
    for path in (hub / "kinds").glob("*.py"):
        text = path.read_text()
        assert not [e for e in endings if f'"{e}' in text or f".{e}" in text], path.name
    for path in (hub / "formats").glob("*.py"):
        found = re.findall(r"\btorch\b|@ |primitives", code(path))
        assert not found, path.name


def code(path: Path) -> str:
    """Without docstrings and comments."""
    import ast

    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            body[0] = ast.Expr(ast.Constant(0))
    return ast.unparse(tree)


def test_a_pruned_file_is_read_by_its_pattern(make: Make, base_of: Callable[[str], Base]) -> None:
    """PEFT keeps the rows whose entry is true, and goes on dividing by the initial rank."""
    module = "transformer.h.0.attn.c_attn"

    def edit(tensors: Any) -> None:
        for name, axis in (("A", 0), ("E", 0), ("B", 1)):
            key = f"{P}{module}.lora_{name}"
            dtype, shape, data = tensors[key]
            shape[axis] = 2
            tensors[key] = (dtype, shape, data[: 4 * shape[0] * shape[1]])

    kept = {f"{module}.lora_E": [True, False, True, False, False]}
    adapter = read_adapter(locate(make(ADALORA, edit, rank_pattern=kept)))
    assert not [f for f in fit(adapter, base_of("gpt2")) if f.severity == ERROR]
    assert adapter.fields.rank_of(module) == 2
    assert adapter.fields.scaling(module) == 10 / (5 + 1e-5)
    assert errors(make(ADALORA, edit), base_of("gpt2")).keys() == {
        f"{P}{module}.lora_{name}" for name in "AEB"
    }

"""Bottlenecks and Compacters of AdapterHub, and those of LLM-Adapters: configs, formulas, use."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from adapterkit.hub import attach, describe, diff
from adapterkit.hub.locate import locate
from adapterkit.hub.quant import format_of
from adapterkit.hub.read import read_adapter
from adapterkit.registry.errors import AdapterError, DamagedError, InvalidError, MismatchError

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
WEIGHTS, CONFIG = "adapter.safetensors", "adapter_config.json"
REQUIRED = {
    "mh_adapter": False, "output_adapter": True, "reduction_factor": 8, "non_linearity": "relu",
}  # fmt: skip
IDS = torch.arange(3, 19).reshape(2, 8)
# Cases whose tensors are removed, renamed and reshaped one by one.
WHOLE = ("bert.ah_bn_gating", "bert.ah_compacter", "bert.ah_compacter_pp", "bert.ah_seq_bn_inv",
         "gpt2.ah_par_bn")  # fmt: skip


Tensors = dict[str, Tensor]
Edit = Callable[[Tensors], object]


@pytest.fixture
def copied(fixtures: Path, tmp_path: Path) -> Callable[..., Path]:
    """`copied(case, edit, field=value)`: a copy of a case's adapter, its tensors edited in place,
    its config changed; ... takes a field out."""

    def copy(case: str, edit: Edit | None = None, **config: Any) -> Path:
        folder = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for source in (fixtures / "cases" / case / "adapter").iterdir():
            shutil.copyfile(source, folder / source.name)
        tensors = load_file(folder / WEIGHTS)
        if edit is not None:
            edit(tensors)
        save_file(tensors, folder / WEIGHTS)
        outer = json.loads((folder / CONFIG).read_text())
        fields = {**outer["config"], **config}
        outer["config"] = {name: value for name, value in fields.items() if value is not ...}
        (folder / CONFIG).write_text(json.dumps(outer))
        return folder

    return copy


def write(folder: Path, tensors: Mapping[str, Tensor], family: str, **config: Any) -> Path:
    """A folder as the library writes it. config: beside the required fields."""
    folder.mkdir(exist_ok=True)
    outer = {
        "config": {**REQUIRED, **config}, "hidden_size": None, "model_class": "Any",
        "model_name": f"bases/{family}", "model_type": family, "name": "task",
        "version": "adapters.1.3.0",
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(outer))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)
    return folder


def network(path: str, width: int, size: int, seed: int = 0) -> Tensors:
    """A bottleneck's two projections at `path`, large enough to matter."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "adapter_down.0.weight": (size, width), "adapter_down.0.bias": (size,),
        "adapter_up.weight": (width, size), "adapter_up.bias": (width,),
    }  # fmt: skip
    return {
        f"{path}.adapters.task.{name}": 0.5 * torch.randn(shape, generator=draw)
        for name, shape in shapes.items()
    }


def load(fixtures: Path, base: str, **settings: Any) -> Any:
    """One model for all tests of a base: each finds it as the one before had to leave it."""
    make = loaded.__wrapped__ if settings else loaded
    return make(fixtures, base, **settings)


@lru_cache
def loaded(fixtures: Path, base: str, **settings: Any) -> Any:
    loaders = {"bert": "AutoModelForSequenceClassification", "t5": "AutoModelForSeq2SeqLM"}
    loader = getattr(transformers, loaders.get(base, "AutoModelForCausalLM"))
    return loader.from_pretrained(fixtures / "bases" / base, **settings).eval()


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    extra = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids, **extra).logits
    return found


@contextmanager
def noted(model: Any, *paths: str) -> Iterator[dict[str, Tensor]]:
    """By path: the first input of a module, and under `path:out` its output."""
    seen: dict[str, Tensor] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen[path] = args[0] if args else next(iter(kwargs.values()))
            seen[f"{path}:out"] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [
        model.get_submodule(path).register_forward_hook(note(path), with_kwargs=True)
        for path in paths
    ]
    yield seen
    for handle in handles:
        handle.remove()


# What the config says.


@pytest.mark.parametrize("field", REQUIRED)
def test_a_required_field_that_is_missing_is_named(copied: Any, field: str) -> None:
    with pytest.raises(DamagedError, match=f"{field} is None, expected"):
        read_adapter(locate(copied("gpt2.ah_par_bn", **{field: ...})))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mh_adapter", "yes"), ("output_adapter", 1), ("cross_adapter", []),
        ("original_ln_before", 1.0), ("original_ln_after", "no"), ("ln_before", 3),
        ("ln_after", "true"), ("is_parallel", 1), ("use_gating", "on"), ("phm_layer", 2),
        ("adapter_residual_before_ln", "x"), ("residual_before_ln", "pre_add"),
        ("residual_before_ln", 2), ("reduction_factor", "16"), ("reduction_factor", 0),
        ("reduction_factor", -4), ("reduction_factor", {"0": None}),
        ("reduction_factor", {"first": 2}), ("reduction_factor", 1e-300),
        ("reduction_factor", True), ("non_linearity", "prelu"), ("non_linearity", 3),
        ("scaling", "fixed"), ("scaling", [1.0]), ("scaling", float("inf")), ("scaling", None),
        ("leave_out", [-1]), ("leave_out", "0"), ("inv_adapter_reduction_factor", None),
    ],
)  # fmt: skip
def test_a_field_of_a_wrong_type_is_named(copied: Any, field: str, value: Any) -> None:
    also = {"inv_adapter": "nice"} if field == "inv_adapter_reduction_factor" else {}
    with pytest.raises(DamagedError, match=f"{field} is "):
        read_adapter(locate(copied("gpt2.ah_par_bn", **also, **{field: value})))


@pytest.mark.parametrize(
    "field",
    ["phm_dim", "phm_rank", "phm_bias", "shared_phm_rule", "factorized_phm_rule", "shared_W_phm",
     "factorized_phm_W"],
)  # fmt: skip
def test_the_fields_of_a_compacter_have_types_too(copied: Any, field: str) -> None:
    with pytest.raises(DamagedError, match=f"{field} is 'x', expected"):
        read_adapter(locate(copied("bert.ah_compacter", **{field: "x"})))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"inv_adapter": "glow", "inv_adapter_reduction_factor": 2}, "inv_adapter.*'glow'"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln.*post_add"),
        ({"new_option": 7}, "new_option"),
    ],
)
def test_what_is_not_applied_is_refused_by_name(copied: Any, fields: Any, named: str) -> None:
    folder = copied("bert.ah_double_seq_bn", **fields)
    with pytest.raises(AdapterError, match=f"(?s){named}"):
        read_adapter(locate(folder)).require_sound()


@pytest.mark.parametrize("field", ["dropout", "init_weights", "init_weights_seed", "learn_phm",
                                   "phm_c_init", "phm_init_range", "hypercomplex_nonlinearity",
                                   "stochastic_depth"])  # fmt: skip
def test_what_only_training_asks_for_changes_nothing(copied: Any, field: str) -> None:
    read_adapter(locate(copied("gpt2.ah_par_bn", **{field: 0.5}))).require_sound()


def test_a_factor_that_no_layer_has_is_named(copied: Any, fixtures: Path) -> None:
    folder = copied("bert.ah_double_seq_bn", reduction_factor={"0": 4})
    with pytest.raises(MismatchError, match="(?s)reduction_factor.*none for layer 1"):
        attach(load(fixtures, "bert"), folder)


def test_sizes_that_a_compacter_cannot_divide_are_named(copied: Any, fixtures: Path) -> None:
    with pytest.raises(MismatchError, match="phm_dim.*sizes that 4 divides.* 64 and 6 of layer 1"):
        attach(load(fixtures, "bert"), copied("bert.ah_compacter", reduction_factor=10))


def test_names_of_activations_are_those_of_the_library(copied: Any) -> None:
    for name in ("ReLU", "leakyrelu", "Swish", "gelu_new"):
        read_adapter(locate(copied("gpt2.ah_par_bn", non_linearity=name))).require_sound()


# Nothing is left out.


@pytest.mark.parametrize("case", WHOLE)
def test_a_tensor_that_is_missing_renamed_or_reshaped_is_named(
    copied: Any, fixtures: Path, case: str
) -> None:
    model = load(fixtures, case.partition(".")[0])
    keys = list(load_file(fixtures / "cases" / case / "adapter" / WEIGHTS))
    for key in keys[:: max(1, len(keys) // 6)]:
        def rename(tensors: Tensors, key: str = key) -> None:
            tensors[f"{key}_x"] = tensors.pop(key)

        def widen(tensors: Tensors, key: str = key) -> None:
            tensors[key] = torch.cat([tensors[key], tensors[key][:1]])

        def flatten(tensors: Tensors, key: str = key) -> None:
            tensors[key] = tensors[key][None, None]

        with pytest.raises(AdapterError, match="missing-tensor"):
            attach(model, copied(case, lambda tensors, key=key: tensors.pop(key)))
        for change, named in ((rename, f"{key}_x"), (widen, key), (flatten, key)):
            with pytest.raises(AdapterError, match=re.escape(named)):
                attach(model, copied(case, change))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("case", ["bert.ah_compacter", "gpt2.ah_par_bn"])
def test_scalars_in_place_of_matrices_are_named(copied: Any, case: str) -> None:
    def flatten(tensors: Tensors) -> None:
        for key in tensors:
            tensors[key] = torch.tensor(1.0)

    folder = copied(case, flatten)
    assert not describe(folder).ranks
    with pytest.raises(DamagedError, match="dimensions") as caught:
        read_adapter(locate(folder)).require_sound()
    assert len(str(caught.value).splitlines()) > 4


def test_values_that_are_not_finite_are_named(copied: Any, fixtures: Path) -> None:
    key = "transformer.h.1.output_adapters.adapters.task.adapter_up.bias"
    with pytest.raises(DamagedError, match=re.escape(key)):
        attach(load(fixtures, "gpt2"), copied("gpt2.ah_par_bn", lambda t: t[key].fill_(torch.nan)))


def test_a_norm_that_is_stored_twice_has_to_be_one(copied: Any, fixtures: Path) -> None:
    folder = copied("bert.ah_double_seq_bn", ln_before=True)
    tensors = load_file(folder / WEIGHTS)
    made = {}
    for key, tensor in tensors.items():
        if ".adapter_down.0.weight" in key:
            norm = torch.rand(64) + 0.5
            stem = key.replace("adapter_down.0.weight", "")
            for end, value in (("weight", norm), ("bias", norm - 1)):
                made[f"{stem}adapter_norm_before.{end}"] = value
                made[f"{stem}adapter_down.0.{end}"] = value.clone()
        made[key.replace("adapter_down.0.", "adapter_down.1.")] = tensor
    save_file(made, folder / WEIGHTS)
    model = load(fixtures, "bert")
    attach(model, folder).detach()
    made["bert.encoder.layer.0.output.adapters.task.adapter_norm_before.bias"][3] += 1
    save_file(made, folder / WEIGHTS)
    with pytest.raises(DamagedError, match="two copies"):
        attach(model, folder)


def test_every_tensor_is_reported_with_what_it_became(fixtures: Path) -> None:
    with attach(load(fixtures, "bert"), fixtures / "cases/bert.ah_seq_bn_inv/adapter") as adapters:
        (report,) = adapters.report.values()
    stored = load_file(fixtures / "cases/bert.ah_seq_bn_inv/adapter" / WEIGHTS)
    assert {row.tensor for row in report} == stored.keys()
    assert {row.primitive for row in report} <= {"Bottleneck+Coupling", "Coupling+Bottleneck"}
    assert report.size == sum(tensor.nbytes for tensor in stored.values())


def test_a_family_without_a_row_is_refused_by_name(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(
        "gpt_neox", vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    tensors = network("gpt_neox.layers.0.output_adapters", 16, 2)
    with pytest.raises(MismatchError, match=r"gpt_neox.*\[unsupported\]") as caught:
        attach(model, write(tmp_path / "a", tensors, "gpt_neox"))
    assert "docs/add-a-family.md" in f"{caught.value}{caught.value.hint}"


def test_a_listing_says_what_it_is(fixtures: Path) -> None:
    cases = {
        "bert.ah_seq_bn_inv": ("Pfeiffer bottleneck", {8: 2}),
        "bert.ah_double_seq_bn": ("Houlsby bottleneck", {16: 4}),
        "gpt2.ah_par_bn": ("parallel bottleneck", {12: 2}),
        "bert.ah_compacter": ("Compacter", {8: 4}),
        "bert.ah_compacter_pp": ("Compacter++", {8: 2}),
        "llama.bottleneck_llm_adapters": ("LLM-Adapters series bottleneck", {12: 6}),
    }
    for case, (variant, ranks) in cases.items():
        info = describe(fixtures / "cases" / case / "adapter")
        assert (info.variant, dict(info.ranks)) == (variant, ranks)


def test_a_comparison_sees_every_tensor(fixtures: Path) -> None:
    one, two = (fixtures / "adapters" / f"bert_ah_{name}" for name in "ab")
    found = diff(one, two)
    assert len(found.modules) == len(load_file(one / WEIGHTS))
    assert all(row.distance for row in found.modules)
    compacter = fixtures / "cases/bert.ah_compacter/adapter"
    same = diff(compacter, compacter)
    assert len(same.modules) == len(load_file(compacter / WEIGHTS))
    assert {row.distance for row in same.modules} == {0.0}


# What it computes: layer 0 of the base, its output place, by the formulas of adapters 1.3.


LAYER0 = {
    "bert": ("bert.encoder.layer.0.output", "bert.encoder.layer.0.output.dense",
             "bert.encoder.layer.0.intermediate", "bert.encoder.layer.0"),
    "gpt2": ("transformer.h.0.output_adapters", "transformer.h.0.mlp", "transformer.h.0.ln_2",
             "transformer.h.0"),
}  # fmt: skip


def by_formula(p: Tensors, h: Tensor, x0: Tensor, norm: Any, **config: Any) -> Tensor:
    """The layer's output. p: tensors of the place by their last names."""
    post = norm or (lambda total: total)
    z = residual = h
    if config.get("is_parallel"):
        z = x0
    elif config.get("original_ln_before"):
        z = post(h + x0)
        if config.get("residual_before_ln") == "post_add":
            residual = h + x0
        elif config.get("residual_before_ln") is False:
            residual = z
    up = functional.relu(z @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]
    up = config.get("scaling", 1.0) * up
    if "gate" in p:
        up = up * torch.sigmoid(z @ p["gate"].T + p["gate_bias"]).mean(1, keepdim=True)
    affine = (p["after"], p["after_bias"]) if "after" in p else None
    if affine and config.get("adapter_residual_before_ln") and not config.get("is_parallel"):
        y = functional.layer_norm(up + residual, up.shape[-1:], *affine)
    else:
        y = (functional.layer_norm(up, up.shape[-1:], *affine) if affine else up) + residual
    return y if config.get("original_ln_after") is False else post(y + x0)


NAMES = {
    "adapter_down.0.weight": "down", "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up", "adapter_up.bias": "up_bias", "gate.weight": "gate",
    "gate.bias": "gate_bias", "adapter_norm_after.weight": "after",
    "adapter_norm_after.bias": "after_bias",
}  # fmt: skip
WIRINGS: dict[str, dict[str, Any]] = {
    "houlsby": {},
    "pfeiffer": {"original_ln_before": True},
    "residual after the norm": {"original_ln_before": True, "residual_before_ln": False},
    "residual after the sum": {"original_ln_before": True, "residual_before_ln": "post_add"},
    "no norm behind": {"original_ln_after": False},
    "norm before only": {"original_ln_before": True, "original_ln_after": False},
    "parallel": {"is_parallel": True, "scaling": 4.0},
    "parallel, no norm behind": {"is_parallel": True, "original_ln_after": False},
    "own norm": {"ln_after": True},
    "own norm of the sum": {"ln_after": True, "adapter_residual_before_ln": True},
    "own norm, parallel": {"ln_after": True, "is_parallel": True,
                           "adapter_residual_before_ln": True},
    "sum inside, without a norm": {"adapter_residual_before_ln": True},
    "gate": {"use_gating": True, "original_ln_before": True},
    "negative scaling, as an integer": {"scaling": -2},
}  # fmt: skip


@pytest.mark.parametrize("base", LAYER0)
@pytest.mark.parametrize("config", WIRINGS.values(), ids=list(WIRINGS))
def test_a_layer_is_what_the_formula_says(
    fixtures: Path, tmp_path: Path, base: str, config: dict[str, Any]
) -> None:
    path, h_path, x0_path, layer = LAYER0[base]
    model = load(fixtures, base)
    width = model.config.hidden_size
    tensors: Tensors = {}
    for number in range(2):
        place = path.replace(".0.", f".{number}.")
        tensors |= network(place, width, width // 8, seed=number)
        stem = f"{place}.adapters.task"
        if config.get("use_gating"):
            tensors[f"{stem}.gate.weight"] = torch.randn(1, width)
            tensors[f"{stem}.gate.bias"] = torch.randn(1)
        if config.get("ln_after"):
            tensors[f"{stem}.adapter_norm_after.weight"] = torch.rand(width) + 0.5
            tensors[f"{stem}.adapter_norm_after.bias"] = torch.randn(width)
    folder = write(tmp_path / "a", tensors, base, **config)
    norm = model.get_submodule(f"{path}.LayerNorm") if base == "bert" else None
    stem = f"{path}.adapters.task."
    p = {NAMES[k.removeprefix(stem)]: t for k, t in tensors.items() if k.startswith(stem)}
    with noted(model, h_path, x0_path, layer) as seen, torch.inference_mode():
        before = logits(model)
        h, x0 = seen[f"{h_path}:out"], seen[x0_path]
        expected = by_formula(p, h, x0, norm, **config)
        with attach(model, folder):
            changed = logits(model)
            torch.testing.assert_close(seen[f"{layer}:out"], expected, atol=2e-5, rtol=1e-5)
    assert (changed - before).abs().max() > 1e-3
    assert torch.equal(logits(model), before)


PHMS: dict[str, dict[str, Any]] = {
    "one rule": {},
    "a rule for each": {"shared_phm_rule": False},
    "rules as products": {"factorized_phm_rule": True},
    "own rules as products": {"shared_phm_rule": False, "factorized_phm_rule": True},
    "whole weights": {"factorized_phm_W": False},
    "one weight": {"shared_W_phm": True},
    "one whole weight": {"shared_W_phm": True, "factorized_phm_W": False},
    "no bias": {"phm_bias": False, "phm_rank": 2},
}


class Phm:
    """Random tensors of a Compacter, and the matrices that they multiply out to."""

    def __init__(self, n: int, config: Mapping[str, Any]) -> None:
        self.n, self.config = n, config
        self.shared: Tensors = {}
        self._whole: dict[str, Tensor] = {}

    def rule(self, own: Tensors) -> Tensor:
        if not self.config.get("shared_phm_rule", True):
            return self._rule(own)
        if "rule" not in self._whole:
            self._whole["rule"] = self._rule(self.shared)
        return self._whole["rule"]

    def weight(self, own: Tensors, name: str, n_in: int, n_out: int) -> Tensor:
        if not self.config.get("shared_W_phm"):
            return self._weight(own, "W", n_in, n_out)
        if name not in self._whole:
            self._whole[name] = self._weight(self.shared, f"W_{name}", n_in, n_out)
        return self._whole[name]

    def _rule(self, where: Tensors) -> Tensor:
        n = self.n
        if not self.config.get("factorized_phm_rule"):
            return where.setdefault("phm_rule", torch.randn(n, n, n))
        left = where.setdefault("phm_rule_left", torch.randn(n, n, 1))
        return left @ where.setdefault("phm_rule_right", torch.randn(n, 1, n))

    def _weight(self, where: Tensors, stem: str, n_in: int, n_out: int) -> Tensor:
        n, rank = self.n, self.config.get("phm_rank", 1)
        if self.config.get("factorized_phm_W") is False:
            return where.setdefault(stem, 0.2 * torch.randn(n, n_in // n, n_out // n))
        left = where.setdefault(f"{stem}_left", 0.3 * torch.randn(n, n_in // n, rank))
        right = where.setdefault(f"{stem}_right", 0.3 * torch.randn(n, rank, n_out // n))
        return left @ right


@pytest.mark.parametrize("config", PHMS.values(), ids=list(PHMS))
def test_a_compacter_is_a_bottleneck_of_kronecker_products(
    fixtures: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    """The same logits as the dense bottleneck that its matrices, multiplied out, make."""
    torch.manual_seed(1)
    phm, (width, size) = Phm(4, config), (64, 8)
    compact: Tensors = {}
    dense: Tensors = {}
    ends = {"down": ("adapter_down.0", width, size), "up": ("adapter_up", size, width)}
    for layer in range(2):
        for name, (end, n_in, n_out) in ends.items():
            stem = f"bert.encoder.layer.{layer}.output.adapters.task.{end}"
            own: Tensors = {}
            pairs = zip(phm.rule(own), phm.weight(own, name, n_in, n_out), strict=True)
            matrix = torch.stack([torch.kron(a, b) for a, b in pairs]).sum(0)
            bias = torch.zeros(n_out)
            if config.get("phm_bias", True):
                bias = own["b"] = torch.randn(n_out)
            compact |= {f"{stem}.{key}": tensor for key, tensor in own.items()}
            dense |= {f"{stem}.weight": matrix.T, f"{stem}.bias": bias}
    compact |= {f"bert.shared_parameters.task.{key}": t for key, t in phm.shared.items()}
    model = load(fixtures, "bert")
    with attach(model, write(tmp_path / "a", compact, "bert", phm_layer=True, **config)):
        found = logits(model)
    with attach(model, write(tmp_path / "b", dense, "bert")):
        torch.testing.assert_close(found, logits(model), atol=1e-5, rtol=1e-5)


def test_all_places_of_an_encoder_decoder_model(fixtures: Path, tmp_path: Path) -> None:
    """Layers are counted over both stacks; cross attention has a place of its own."""
    model = load(fixtures, "t5")
    width = model.config.d_model
    n = model.config.num_layers
    paths = [f"encoder.block.{i}.layer.{j}" for i in range(n) for j in (0, 1)]
    paths += [f"decoder.block.{i}.layer.{j}" for i in range(n) for j in (0, 1, 2)]
    paths = [path for path in paths if not path.startswith("decoder.block.0.")]
    tensors: Tensors = {}
    for seed, path in enumerate(paths):
        tensors |= network(path, width, width // 8, seed)
    settings = {"mh_adapter": True, "cross_adapter": True, "leave_out": [n]}
    before = logits(model)
    with attach(model, write(tmp_path / "a", tensors, "t5", **settings)) as adapters:
        assert len(adapters.report[str(tmp_path / "a")]) == len(tensors)
        last = f"decoder.block.{n - 1}.layer.1"
        with noted(model, f"{last}.EncDecAttention", f"{last}.layer_norm", last) as seen:
            changed = logits(model)
        stem = f"{last}.adapters.task."
        p = {NAMES[k.removeprefix(stem)]: t for k, t in tensors.items() if k.startswith(stem)}
        h, x0 = seen[f"{last}.EncDecAttention:out"], seen[f"{last}.layer_norm"]
        with torch.inference_mode():
            torch.testing.assert_close(seen[f"{last}:out"], by_formula(p, h, x0, None))
    assert (changed - before).abs().max() > 1e-3
    with pytest.raises(MismatchError, match=r"decoder.block.0.cross_attention.*missing"):
        attach(model, write(tmp_path / "b", tensors, "t5", **{**settings, "leave_out": [n + 1]}))


SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0}  # fmt: skip
# adapters 1.3 `models/*/mixin_*.py`: what each family calls its places, and where.
FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "roberta": (SMALL, [
        f"roberta.encoder.layer.{n}.{end}" for n in (0, 1) for end in ("attention.output", "output")
    ]),
    "distilbert": (
        {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}, [
            f"distilbert.transformer.layer.{n}.{end}_adapters"
            for n in (0, 1) for end in ("attention", "output")
        ]),
    "bart": (
        {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
         "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
         "decoder_ffn_dim": 24, "max_position_embeddings": 32, "num_labels": 2},
        [f"model.encoder.layers.0.{end}_adapters" for end in ("attention", "output")]
        + [f"model.decoder.layers.0.{end}_adapters"
           for end in ("attention", "cross_attention", "output")]),
    "mistral": ({**SMALL, "num_key_value_heads": 1, "head_dim": 8}, [
        f"model.layers.{n}.{end}_adapters" for n in (0, 1) for end in ("attention", "output")
    ]),
    "qwen2": ({**SMALL, "num_key_value_heads": 1}, [
        f"model.layers.{n}.{end}_adapters" for n in (0, 1) for end in ("attention", "output")
    ]),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_places_are_found_by_the_names_of_every_family(tmp_path: Path, family: str) -> None:
    settings, paths = FAMILIES[family]
    torch.manual_seed(2)
    config = transformers.AutoConfig.for_model(family, **settings)
    loader: Any = transformers.AutoModelForCausalLM
    if family in ("roberta", "distilbert", "bart"):
        loader = transformers.AutoModelForMaskedLM
    model = loader.from_config(config).eval()
    before = logits(model)
    for n, path in enumerate(paths):  # each of them acts
        tensors = {key: t for p in paths for key, t in network(p, 16, 2, seed=n).items()}
        for key in tensors:
            if ".adapter_up." in key and not key.startswith(f"{path}."):
                tensors[key] = torch.zeros_like(tensors[key])
        folder = write(tmp_path / f"a{n}", tensors, family, mh_adapter=True, cross_adapter=True)
        with attach(model, folder) as adapters:
            assert len(adapters.report[str(folder)]) == len(tensors)
            assert (logits(model) - before).abs().max() > 1e-5
    assert torch.equal(logits(model), before)


def test_an_adapter_of_the_body_fits_a_model_with_a_head(copied: Any, fixtures: Path) -> None:
    def bare(tensors: Tensors) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)

    model = load(fixtures, "gpt2")
    with attach(model, fixtures / "cases/gpt2.ah_par_bn/adapter"):
        expected = logits(model)
    with attach(model, copied("gpt2.ah_par_bn", bare)):
        assert torch.equal(logits(model), expected)


# Weights.


def test_a_weight_scales_what_is_added(copied: Any, fixtures: Path) -> None:
    def halve(tensors: Tensors) -> None:
        for key in tensors:
            if ".adapter_up." in key:
                tensors[key] *= -0.5

    model = load(fixtures, "gpt2")
    before = logits(model)
    with attach(model, {"a": fixtures / "cases/gpt2.ah_par_bn/adapter"}) as adapters:
        adapters.activate({"a": -0.5})
        found = logits(model)
        adapters.activate({"a": 0})
        assert torch.equal(logits(model), before)
    with attach(model, copied("gpt2.ah_par_bn", halve)):
        torch.testing.assert_close(found, logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"original_ln_before": True, "residual_before_ln": "post_add"},
        {"original_ln_before": True, "residual_before_ln": False},
        {"original_ln_after": False},
        {"original_ln_after": False, "is_parallel": True},
    ],
)
def test_what_stands_in_for_the_layer_takes_no_weight(
    copied: Any, fixtures: Path, config: dict[str, Any]
) -> None:
    model = load(fixtures, "bert")
    with attach(model, {"a": copied("bert.ah_double_seq_bn", **config)}) as adapters:
        before = logits(model)
        with pytest.raises(InvalidError, match=r"a=0\.5: no weight but 0 and 1"):
            adapters.activate({"a": 0.5})
        assert torch.equal(logits(model), before)


def test_an_invertible_one_takes_no_weight(fixtures: Path) -> None:
    source = fixtures / "cases/bert.ah_seq_bn_inv/adapter"
    with (
        attach(load(fixtures, "bert"), {"a": source}) as adapters,
        pytest.raises(InvalidError, match=r"a=-1: no weight but 0 and 1"),
    ):
        adapters.activate({"a": -1})


def test_two_at_one_place_act_in_the_order_given(fixtures: Path) -> None:
    model = load(fixtures, "bert")
    sources = {name: fixtures / "adapters" / f"bert_ah_{name}" for name in "ab"}
    with attach(model, sources) as adapters:
        one = logits(model)
        adapters.activate(["b", "a"])
        other = logits(model)
        adapters.activate({"a": 1, "b": 1})
        assert torch.equal(logits(model), one)
    assert (one - other).abs().max() > 1e-3


# Beside others, and in use.


def test_every_kind_acts_beside_it(fixtures: Path) -> None:
    """The network reads what LoRA and IA3 have made of the layer. Llama's output place is tapped
    by neither of them, whatever was active first."""
    model = load(fixtures, "llama")
    layer = "model.layers.0"
    folder = fixtures / "cases/llama.ah_par_bn/adapter"
    stem = f"{layer}.output_adapters.adapters.task."
    stored = load_file(folder / WEIGHTS)
    p = {NAMES[k.removeprefix(stem)]: t for k, t in stored.items() if k.startswith(stem)}
    sources = {
        "net": folder,
        "lora": fixtures / "cases/llama.lora_all_linear/adapter",
        "ia3": fixtures / "cases/llama.ia3/adapter",
    }
    taps = (f"{layer}.mlp", f"{layer}.post_attention_layernorm", layer)
    with attach(model, sources) as adapters, torch.inference_mode(), noted(model, *taps) as seen:
        adapters.activate(["lora", "ia3"])
        logits(model)
        expected = by_formula(
            p, seen[f"{taps[0]}:out"], seen[taps[1]], None, is_parallel=True, scaling=4.0
        )
        for names in (["lora", "ia3", "net"], ["net", "ia3", "lora"]):
            adapters.activate(names)
            logits(model)
            torch.testing.assert_close(seen[f"{layer}:out"], expected)


def test_detaching_in_any_order_of_use_leaves_the_model_as_it_was(fixtures: Path) -> None:
    model = load(fixtures, "llama")
    before, own = logits(model), {id(m) for m in model.modules() if "forward" in vars(m)}
    state = list(model.state_dict())
    sources = {
        "net": fixtures / "cases/llama.bottleneck_llm_adapters/adapter",
        "lora": fixtures / "cases/llama.lora_all_linear/adapter",
    }
    for order in (["net", "lora"], ["lora", "net"]):
        adapters = attach(model, sources)
        for name in order:
            adapters.activate([name])
            logits(model)
        adapters.activate(order)
        logits(model)
        assert list(model.state_dict()) == state
        adapters.detach()
        assert torch.equal(logits(model), before)
        assert {id(m) for m in model.modules() if "forward" in vars(m)} == own
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("base", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_same_with_and_without_a_cache(
    fixtures: Path, tmp_path: Path, base: str, beams: int
) -> None:
    model = load(fixtures, base)
    if base == "t5":
        width, tensors = model.config.d_model, {}
        for stack, last in (("encoder", 1), ("decoder", 2)):
            for n in range(model.config.num_layers):
                place = f"{stack}.block.{n}.layer.{last}"
                tensors |= network(place, width, width // 8, seed=n)
        folder = write(tmp_path / "a", tensors, "t5")
    else:
        folder = fixtures / f"cases/{base}.ah_par_bn/adapter"
    settings = {"num_beams": beams, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with attach(model, folder):
        cached = model.generate(IDS, use_cache=True, **settings)
        whole = model.generate(IDS, use_cache=False, **settings)
        assert torch.equal(cached, whole)
        if beams == 1 and base != "t5":
            last = logits(model, cached[:, :-1])[:, -1].argmax(-1)
            assert torch.equal(last, cached[:, -1])


def test_compiled_code_is_one_graph_with_the_same_result(fixtures: Path) -> None:
    model = load(fixtures, "llama", dtype=torch.float32)
    with attach(model, fixtures / "cases/llama.ah_par_bn/adapter"):
        expected = logits(model)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(logits(compiled), expected)
    torch.compiler.reset()


def test_threads_share_one_model(fixtures: Path) -> None:
    """What a layer adds is kept between two of its modules: for each thread its own."""
    model = load(fixtures, "bert")
    batches = [torch.arange(n, n + 12).reshape(1 + n % 2, -1) for n in range(3, 35)]
    with attach(model, fixtures / "cases/bert.ah_double_seq_bn/adapter"):
        expected = [logits(model, ids) for ids in batches]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda ids: logits(model, ids), batches))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_half_precision_and_autocast_keep_the_dtype_and_the_result(fixtures: Path) -> None:
    folder = fixtures / "cases/llama.ah_par_bn/adapter"
    model = load(fixtures, "llama")
    base = logits(model)
    with attach(model, folder):
        exact = logits(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = logits(model)
    half = load(fixtures, "llama", dtype=torch.bfloat16)
    with attach(half, folder):
        low = logits(half)
    assert (exact - base).abs().max() > 1
    for found in (cast, low):
        assert found.dtype == torch.bfloat16
        assert (found.float() - exact).abs().max() < 0.25


@pytest.mark.parametrize(
    "case", ["llama.ah_par_bn", "llama.bottleneck_llm_adapters",
             "llama.bottleneck_llm_adapters_parallel"],
)  # fmt: skip
def test_a_quantized_base_gives_what_its_dequantized_weights_do(fixtures: Path, case: str) -> None:
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = load(fixtures, "llama", quantization_config=config, device_map={"": "cpu"})
    dense = load(fixtures, "llama", dtype=torch.float32)
    for name, module in packed.named_modules():
        if isinstance(module, nn.Linear) and format_of(module).method(module) != "none":
            dense.get_submodule(name).weight.data = format_of(module).read_weight(module)
    folder = fixtures / "cases" / case / "adapter"
    with attach(packed, folder), attach(dense, folder):
        found, expected = logits(packed), logits(dense)
    assert (found - expected).abs().max() < 2e-2


# LLM-Adapters.


def llm(folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    fields = {"peft_type": "BOTTLENECK", "bottleneck_size": 6, "target_modules": ["up_proj"],
              "non_linearity": "tanh", **config}  # fmt: skip
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def pair(module: str, n_in: int, n_out: int) -> Tensors:
    stem = f"base_model.model.model.layers.{{}}.{module}"
    return {
        f"{stem.format(layer)}.adapter_{name}.weight": 0.3 * torch.randn(*shape)
        for layer in range(2)
        for name, shape in (("down", (6, n_in)), ("up", (n_out, 6)))
    }


@pytest.mark.parametrize("module", ["up_proj", "down_proj"])
@pytest.mark.parametrize("parallel", [False, True])
def test_an_llm_adapter_is_what_its_formula_says(
    fixtures: Path, tmp_path: Path, module: str, parallel: bool
) -> None:
    model = load(fixtures, "llama")
    path = f"mlp.{module}"
    linear = model.model.layers[0].get_submodule(path)
    n_in, n_out = linear.in_features, linear.out_features
    before = module == "up_proj" and not parallel
    sizes = (n_in, n_out) if parallel else (n_in, n_in) if before else (n_out, n_out)
    tensors = pair(path, *sizes)
    settings = {"target_modules": [module], "use_parallel_adapter": parallel, "scaling": 0.5}
    stem = f"base_model.model.model.layers.0.{path}.adapter_"
    down, up = tensors[f"{stem}down.weight"], tensors[f"{stem}up.weight"]

    def net(v: Tensor) -> Tensor:
        return 0.5 * torch.tanh(v @ down.T) @ up.T

    name = f"model.layers.0.{path}"
    with attach(model, llm(tmp_path / "a", tensors, **settings)), torch.inference_mode():
        with noted(model, name) as seen:
            logits(model)
        found = seen[f"{name}:out"]
    with noted(model, name) as seen:
        logits(model)
    x = seen[name]
    with torch.inference_mode():
        if parallel:
            expected = linear(x) + net(x)
        elif before:
            expected = linear(x + net(x))
        else:
            expected = linear(x) + net(linear(x))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_module_that_the_fork_has_no_place_for_is_named(tmp_path: Path) -> None:
    folder = llm(tmp_path / "a", pair("self_attn.q_proj", 64, 64), target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="(?s)target_modules.*q_proj"):
        read_adapter(locate(folder)).require_sound()
    llm(tmp_path / "a", pair("self_attn.q_proj", 64, 64), target_modules=["q_proj"],
        use_parallel_adapter=True)  # fmt: skip
    read_adapter(locate(folder)).require_sound()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"bottleneck_size": 0}, "bottleneck_size"), ({"bottleneck_size": None}, "bottleneck_size"),
        ({"scaling": "big"}, "scaling"), ({"non_linearity": 7}, "non_linearity"),
        ({"use_parallel_adapter": "x"}, "use_parallel_adapter"),
        ({"use_adapterp": 3}, "use_adapterp"), ({"bias": "some"}, "bias"),
        ({"scaling": "learned"}, "scaling"), ({"bottleneck_size": 7}, r"shape \[7, in\]"),
        ({"other": 1}, "other"),
    ],
)  # fmt: skip
def test_a_wrong_config_of_the_fork_is_named(tmp_path: Path, config: Any, named: str) -> None:
    folder = llm(tmp_path / "a", pair("mlp.up_proj", 64, 64), **config)
    with pytest.raises(AdapterError, match=f"(?s){named}"):
        read_adapter(locate(folder)).require_sound()

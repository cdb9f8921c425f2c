"""Folders of AdapterHub's library: what is read, refused by name, and computed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit.hub import BatchSplit, Stack, attach, check
from adapterkit.hub.findings import ERROR, listing
from adapterkit.hub.locate import locate
from adapterkit.hub.quant import format_of
from adapterkit.hub.read import read_adapter
from adapterkit.registry.errors import AdapterError, DamagedError, MismatchError, NotFoundError

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
QUICK = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WEIGHTS = st.floats(-2, 2).map(lambda w: round(w, 3))
ALPHA, RANK = 3.0, 2
CONFIGS = ("adapter_config.json", "head_config.json")
P = dict[str, Tensor]
PLAIN = {"architecture": "lora", "r": RANK, "alpha": ALPHA, "attn_matrices": ["q", "v"]}
LAYER = "bert.encoder.layer.{}.{}"
QUERY, VALUE = "attention.self.query", "attention.self.value"


def write(folder: Path, tensors: P, config: dict[str, Any] | None = None, **around: Any) -> Path:
    """A folder as the library saves it; `loras.NAME` is put in here."""
    name = around.get("name", "task")
    full = {
        "config": {**PLAIN, **(config or {})},
        "hidden_size": 16,
        "model_class": "BertForSequenceClassification",
        "model_name": "some/bert",
        "model_type": "bert",
        "name": name,
        "version": "adapters.1.3.0",
        **around,
    }
    folder.mkdir(exist_ok=True, parents=True)
    kept = {field: value for field, value in full.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(kept))
    save_file(
        {key.replace("@", name): t.contiguous() for key, t in tensors.items()},
        folder / "adapter.safetensors",
    )
    return folder


@pytest.fixture(scope="module")
def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    torch.nn.init.normal_(model.transformer.h[0].attn.c_attn.bias)
    return model


def randoms(sizes: dict[str, tuple[int, ...]], seed: int) -> P:
    draw = torch.Generator().manual_seed(seed)
    return {role: torch.randn(size, generator=draw) / 2 for role, size in sizes.items()}


def placed(model: Any, sizes: dict[str, tuple[int, ...]], seed: int = 0) -> P:
    """The same tensors, by role, for query and value of every layer, others in each."""
    found: P = {}
    for i, name in product(range(model.config.num_hidden_layers), (QUERY, VALUE)):
        made = randoms(sizes, 100 * seed + 10 * i + len(name))
        found |= {f"{LAYER.format(i, name)}.loras.@.{role}": t for role, t in made.items()}
    return found


N = 16
LORA = {"lora_A": (RANK, N), "lora_B": (N, RANK)}
GATE = {"gate.weight": (1, N), "gate.bias": (1,)}
SQUARE = {"vera_B": (N, N), "vera_D": (RANK, RANK)}
SHARED = {
    "bert.shared_parameters.@.lora_A": (RANK, N),
    "bert.shared_parameters.@.lora_B": (N, RANK),
}
NO_B: dict[str, Any] = {"vera_b": 0.0, "vera_d": 0.1}
Row = tuple[dict[str, Any], dict[str, tuple[int, ...]], Callable[[Any, P, Tensor], Tensor]]


def scaled(p: P, delta: Tensor, w: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """DoRA of this library: the norm lacks alpha / r, the bias is scaled."""
    f = p["m.weight"].flatten() / (w + delta).norm(dim=1)
    return f * (x @ (w + ALPHA / RANK * delta).mT + b)


def lora(p: P) -> Tensor:
    return p["lora_B"] @ p["lora_A"]


def vera(p: P) -> Tensor:
    return p["vera_B"] @ p["shared_B"] @ p["vera_D"] @ p["shared_A"]


# kind -> (config, sizes by role, the output from weight, bias, tensors and input, float64)
KINDS: dict[str, Any] = {
    "LoRA": (
        {},
        LORA,
        lambda w, b, p, x: x @ (w + ALPHA / RANK * p["lora_B"] @ p["lora_A"]).mT + b,
    ),
    "gated LoRA": (
        {"use_gating": True},
        LORA | GATE,
        lambda w, b, p, x: (
            x @ w.mT
            + b
            + (x @ p["gate.weight"].mT + p["gate.bias"]).sigmoid().mean(1, keepdim=True)
            * (x @ lora(p).mT)
        ),
    ),
    "DoRA": (
        {"use_dora": True},
        LORA | {"m.weight": (N, 1)},
        lambda w, b, p, x: scaled(p, lora(p), w, b, x),
    ),
    "IA3": (
        {"composition_mode": "scale", "r": 1},
        {"lora_B": (N, 1)},
        lambda w, b, p, x: ALPHA * p["lora_B"].flatten() * (x @ w.mT + b),
    ),
    "VeRA": (NO_B, SQUARE, lambda w, b, p, x: x @ (w + ALPHA / RANK * vera(p)).mT + b),
    "VeRA+DoRA": (
        NO_B | {"use_dora": True},
        SQUARE | {"m.weight": (N, 1)},
        lambda w, b, p, x: scaled(p, vera(p), w, b, x),
    ),
}


def adapter_of(kind: str, model: Any, folder: Path, seed: int = 0) -> Path:
    config, sizes, _ = KINDS[kind]
    tensors = placed(model, sizes, seed)
    return write(folder, tensors | (randoms(SHARED, seed) if "VeRA" in kind else {}), config)


def expected(kind: str, layer: Any, folder: Path, name: str, x: Tensor) -> Tensor:
    stored = {k: t.double() for k, t in load_file(folder / "adapter.safetensors").items()}
    prefix = f"{name}.loras.task."
    p = {k.removeprefix(prefix): t for k, t in stored.items() if k.startswith(prefix)}
    p |= {f"shared_{k[-1]}": t for k, t in stored.items() if "shared_parameters" in k}
    w, b = layer.weight.detach().double(), layer.bias.detach().double()
    found: Tensor = KINDS[kind][2](w, b, p, x.double())
    return found


@pytest.mark.parametrize("kind", sorted(KINDS))
@QUICK
@given(seed=st.integers(0, 99), weight=WEIGHTS, beside=WEIGHTS)
def test_a_forward_is_the_dense_formula_and_linear_in_the_weight(
    bert: Any, tmp_path: Path, kind: str, seed: int, weight: float, beside: float
) -> None:
    """Beside a LoRA; a gain, (IA)3, is 1 + w (l - 1) of everything."""
    name = LAYER.format(1, VALUE)
    layer = bert.get_submodule(name)
    one = adapter_of(kind, bert, tmp_path / f"{kind}{seed}", seed)
    other = adapter_of("LoRA", bert, tmp_path / "other", 1000)
    x = torch.randn(3, 5, N, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), attach(bert, {"one": one, "other": other}) as adapters:
        adapters.activate({"other": beside, "one": weight})
        found = layer(x).double()
    plain = x.double() @ layer.weight.detach().double().mT + layer.bias.detach().double()
    start = plain + beside * (expected("LoRA", layer, other, name, x) - plain)
    if kind == "IA3":
        gain = expected(kind, layer, one, name, x) / plain
        want = start * (1 + weight * (gain - 1))
    else:
        want = start + weight * (expected(kind, layer, one, name, x) - plain)
    size = want.abs().max().clamp(min=1)
    torch.testing.assert_close(found / size, want / size, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_detaching_leaves_no_bit_changed(bert: Any, tmp_path: Path, kind: str) -> None:
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        before = bert(tokens).logits
        with attach(bert, adapter_of(kind, bert, tmp_path / "a")):
            assert not torch.equal(bert(tokens).logits, before)
        assert torch.equal(bert(tokens).logits, before)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_quantized_base_gets_the_same_change(
    fixtures: Path, tmp_path: Path, method: str, kind: str
) -> None:
    """On the output of the quantized layer itself, with constants of its dequantized weight."""
    bits: dict[str, Any] = {"load_in_8bit": True}
    if method == "nf4":
        bits = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32,
                "bnb_4bit_quant_type": "nf4"}  # fmt: skip
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        fixtures / "bases" / "bert", dtype=torch.float32, device_map={"": "cpu"},
        quantization_config=transformers.BitsAndBytesConfig(**bits),
    ).eval()  # fmt: skip
    config, sizes, formula = KINDS[kind]
    wide = {role: tuple(64 if n == N else n for n in size) for role, size in sizes.items()}
    shared = {k: tuple(64 if n == N else n for n in size) for k, size in SHARED.items()}
    tensors = placed(model, wide) | (randoms(shared, 0) if "VeRA" in kind else {})
    folder = write(tmp_path / "a", tensors, config, hidden_size=64)
    name = LAYER.format(1, QUERY)
    layer = model.get_submodule(name)
    x = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        w, plain = format_of(layer).read_weight(layer).double(), layer(x).double()
        with attach(model, folder):
            found = layer(x).double()
    stored = {k: t.double() for k, t in load_file(folder / "adapter.safetensors").items()}
    prefix = f"{name}.loras.task."
    p = {k.removeprefix(prefix): t for k, t in stored.items() if k.startswith(prefix)}
    p |= {f"shared_{k[-1]}": t for k, t in stored.items() if "shared_parameters" in k}
    b, wide_x = layer.bias.detach().double(), x.double()
    want = formula(w, b, p, wide_x)
    # the product with codes differs from that with the dequantized weight: int8 rounds x as well
    error = (plain - (wide_x @ w.mT + b)).abs().max()
    size = 1 + (want.abs() / (wide_x @ w.mT + b).abs().clamp(min=0.1)).max()
    assert (found - want).abs().max() <= size * error + 1e-4 * want.abs().max()


SUBSETS = [s for s in product((True, False), repeat=3) if any(s)]


@pytest.mark.parametrize("enabled", SUBSETS)
@pytest.mark.parametrize("kind", ["LoRA", "gated LoRA", "IA3"])
def test_the_fused_matrix_of_gpt2_is_changed_part_by_part(
    gpt2: Any, tmp_path: Path, kind: str, enabled: tuple[bool, ...]
) -> None:
    """Against a loop over q, k and v; those without factors keep what they had."""
    k, n = sum(enabled), 8
    sizes = {
        "LoRA": {"lora_A": (k * RANK, n), "lora_B": (k * n, RANK)},
        "IA3": {"lora_B": (k * n, 1)},
    }
    sizes["gated LoRA"] = sizes["LoRA"] | {"gate.weight": (k, n), "gate.bias": (k,)}
    p = randoms(sizes[kind], 3)
    names = [matrix for matrix, on in zip("qkv", enabled, strict=True) if on]
    folder = write(
        tmp_path / "a",
        {f"transformer.h.0.attn.c_attn.loras.@.{role}": t for role, t in p.items()},
        {**KINDS[kind][0], "attn_matrices": names},
        hidden_size=n, model_type="gpt2", model_class="GPT2LMHeadModel",
    )  # fmt: skip
    layer = gpt2.transformer.h[0].attn.c_attn
    x = torch.randn(2, 4, n, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        plain = layer(x).double()
        with attach(gpt2, folder):
            found = layer(x).double()
    parts, place = list(plain.split(n, -1)), 0
    wide, p = x.double(), {role: t.double() for role, t in p.items()}
    for at, on in enumerate(enabled):
        rows = slice(place * n, (place + 1) * n)
        if kind == "IA3":
            parts[at] = ALPHA * parts[at] * (p["lora_B"][rows, 0] if on else 1)
        elif on:
            low = wide @ p["lora_A"][place * RANK : (place + 1) * RANK].mT @ p["lora_B"][rows].mT
            scale: Any = ALPHA / RANK
            if kind == "gated LoRA":
                score = wide @ p["gate.weight"][place] + p["gate.bias"][place]
                scale = score.sigmoid().mean(1)[:, None, None]
            parts[at] = parts[at] + scale * low
        place += on
    torch.testing.assert_close(found, torch.cat(parts, -1), atol=1e-5, rtol=1e-5)


def test_diagonal_matrices_leave_the_shared_factors_of_vera_stored_once(
    bert: Any, tmp_path: Path
) -> None:
    tensors = {key: torch.diag(t.diagonal()) for key, t in placed(bert, SQUARE).items()} | randoms(
        SHARED, 0
    )
    folder = write(tmp_path / "a", tensors, NO_B)
    layer, x = bert.get_submodule(LAYER.format(0, QUERY)), torch.ones(1, 2, N)
    with torch.no_grad(), attach(bert, {"a": folder}) as adapters:
        found = layer(x)
        shared = 4 * 2 * N * RANK
        assert shared <= adapters.report["a"].size < shared + 4 * 4 * (N + 2 * RANK) * 4
        want = expected("VeRA", layer, folder, LAYER.format(0, QUERY), x)
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=0)


def errors(folder: Path, base: Any) -> str:
    """All errors of a check on a live model's folder, as text."""
    return listing(check(folder, base=base).errors)


@pytest.fixture(scope="module")
def base(bert: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("some") / "bert"
    bert.save_pretrained(folder)
    return folder


@pytest.fixture
def plain(bert: Any) -> P:
    return placed(bert, LORA)


def test_a_complete_folder_has_no_fault(base: Path, plain: P, tmp_path: Path) -> None:
    report = check(write(tmp_path / "a", plain), base=base)
    assert {f.code for f in report.findings} == {"base-not-recorded"}


def test_the_name_inside_the_keys_is_the_configs(base: Path, plain: P, tmp_path: Path) -> None:
    """Whatever it is, `loras` even; a key of another adapter is an error that names it."""
    assert not errors(write(tmp_path / "a", plain, name="loras"), base)
    other = {key.replace("@", "other"): t for key, t in plain.items() if "layer.1" in key}
    mixed = {key: t for key, t in plain.items() if "layer.0" in key} | other
    text = errors(write(tmp_path / "b", mixed), base)
    assert text.count("other-adapter") == 4 and "one of other" in text
    assert "missing-tensor" in text


@pytest.mark.parametrize(
    "key",
    [
        f"{LAYER.format(0, QUERY)}.loras.@.lora_C",
        f"{LAYER.format(0, QUERY)}.lora_A",
        "loras.@.lora_A",
        f"{LAYER.format(0, QUERY)}.adapters.@.adapter_up.weight",
        f"{LAYER.format(0, QUERY)}.shared_parameters.@.lora_A",
        "classifier.weight",
    ],
)
def test_a_tensor_that_belongs_to_nothing_is_named(
    base: Path, plain: P, tmp_path: Path, key: str
) -> None:
    text = errors(write(tmp_path / "a", plain | {key: torch.ones(2, 2)}), base)
    assert "unexpected-tensor" in text and key.replace("@", "task") in text


def test_a_model_with_a_head_and_its_body_take_the_same_adapter(
    bert: Any, plain: P, tmp_path: Path
) -> None:
    """Names have the body's in front, or not, on either side; a file may be of either class."""
    bare = {key.removeprefix("bert."): t for key, t in plain.items()}
    folders = [write(tmp_path / "with", plain), write(tmp_path / "without", bare)]
    x, outputs = torch.arange(6)[None], []
    for model, folder in product((bert, bert.bert), folders):
        with torch.no_grad(), attach(model, folder):
            outputs.append((model if model is bert.bert else model.bert)(x).pooler_output)
    with torch.no_grad():
        assert not torch.allclose(bert.bert(x).pooler_output, outputs[0], atol=1e-4)
    assert all(torch.equal(found, outputs[0]) for found in outputs)


@pytest.mark.parametrize(
    ("around", "names"),
    [
        ({"model_type": "roberta"}, "model_type"),
        ({"hidden_size": 32}, "hidden_size"),
    ],
)
def test_a_base_that_is_not_the_one_it_was_made_for_is_refused(
    bert: Any, base: Path, plain: P, tmp_path: Path, around: dict[str, Any], names: str
) -> None:
    folder = write(tmp_path / "a", plain, **around)
    text = errors(folder, base)
    assert "other-model" in text and names in text
    with pytest.raises(MismatchError, match=names):
        attach(bert, folder)


def test_another_name_or_class_of_the_base_is_a_doubt(base: Path, plain: P, tmp_path: Path) -> None:
    folder = write(
        tmp_path / "a", plain, model_name="google/other", model_class="BertForQuestionAnswering"
    )
    report = check(folder, base=base)
    assert not report.errors
    assert {"other-base-name", "other-task"} <= {f.code for f in report.warnings}


def test_layers_left_out_have_no_tensors(base: Path, plain: P, tmp_path: Path) -> None:
    first = {key: t for key, t in plain.items() if "layer.0" in key}
    assert not errors(write(tmp_path / "a", first, {"leave_out": [1]}), base)
    assert "missing-tensor" in errors(write(tmp_path / "b", first), base)
    assert "not-targeted" in errors(write(tmp_path / "c", plain, {"leave_out": [1]}), base)


@pytest.mark.parametrize(
    ("flags", "module"),
    [
        ({"intermediate_lora": True}, "intermediate.dense"),
        ({"output_lora": True}, "output.dense"),
        ({"attn_matrices": ["q", "k", "v"]}, "attention.self.key"),
    ],
)
def test_each_flag_means_modules_and_their_tensors_are_then_required(
    base: Path, plain: P, tmp_path: Path, flags: dict[str, Any], module: str
) -> None:
    text = errors(write(tmp_path / "a", plain, flags), base)
    assert text.count("missing-tensor") == 4
    assert LAYER.format(0, module) in text and LAYER.format(1, module) in text


@pytest.mark.parametrize("version", ["adapters.1.0.1", "adapters.1.1.0.dev0"])
def test_before_1_1_alpha_was_ignored(bert: Any, plain: P, tmp_path: Path, version: str) -> None:
    old = write(tmp_path / "old", plain, {"alpha": 16}, version=version)
    same = write(tmp_path / "same", plain, {"alpha": RANK})
    new = write(tmp_path / "new", plain, {"alpha": 16}, version="adapters.1.1.0")
    found = []
    for folder in (old, same, new):
        with torch.no_grad(), attach(bert, folder):
            found.append(bert(torch.arange(6)[None]).logits)
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])
    codes = {f.code for f in read_adapter(locate(old)).findings}
    assert "alpha-ignored" in codes


def test_files_of_adapter_transformers_are_read_and_say_so(
    base: Path, plain: P, tmp_path: Path
) -> None:
    folder = write(
        tmp_path / "a", plain, version=..., type="text_task", config_id="9076f36a74755ac4"
    )
    report = check(folder, base=base)
    assert not report.errors
    assert "old-version" in {f.code for f in report.warnings}


@pytest.mark.parametrize(
    ("version", "said", "meant"),
    [(..., "gelu", "gelu_new"), (..., "gelu_orig", "gelu"), (..., "relu", "relu"),
     ("adapters.1.3.0", "gelu", "gelu"), ("3.2.1", "gelu", "gelu")],
)  # fmt: skip
def test_the_first_versions_had_other_names_for_activations(
    tmp_path: Path, version: Any, said: str, meant: str
) -> None:
    config = {"architecture": None, "reduction_factor": 4, "mh_adapter": False,
              "output_adapter": True, "non_linearity": said}  # fmt: skip
    folder = write(tmp_path / "a", {}, version=version)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": config}))
    start = "bert.encoder.layer.0.output.adapters.task.adapter_"
    sizes = {"down.0.weight": (4, 16), "down.0.bias": (4,), "up.weight": (16, 4), "up.bias": (16,)}
    tensors = {start + name: torch.ones(size) for name, size in sizes.items()}
    save_file(tensors, folder / "adapter.safetensors")
    assert read_adapter(locate(folder)).fields.act == meant


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"alpha": "8"}, "alpha is '8'"),
        ({"alpha": float("nan")}, "alpha|NaN"),
        ({"attn_matrices": ["q", "w"]}, "attn_matrices"),
        ({"attn_matrices": {"q": 1}}, "attn_matrices"),
        ({"composition_mode": "multiply"}, "composition_mode"),
        ({"selfattn_lora": "yes"}, "selfattn_lora"),
        ({"leave_out": [-1]}, "leave_out"),
        ({"use_gating": 1}, "use_gating"),
    ],
)
def test_a_field_of_the_wrong_type_is_named_with_what_was_expected(
    plain: P, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(DamagedError, match=message):
        read_adapter(locate(write(tmp_path / "a", plain, config)))


@pytest.mark.parametrize(
    ("around", "message"),
    [
        ({"name": None}, "name is None"),
        ({"name": "a.b"}, "name is 'a.b'"),
        ({"name": 3}, "name is 3"),
        ({"model_type": ["bert"]}, "model_type"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"version": "adapters.one"}, "version"),
        ({"config": "pfeiffer"}, "config is 'pfeiffer'"),
    ],
)
def test_a_fault_around_the_config_is_named(
    plain: P, tmp_path: Path, around: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path / "a", plain)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | around))
    with pytest.raises(DamagedError, match=message):
        read_adapter(locate(folder))


@pytest.mark.parametrize(
    ("architecture", "message"),
    [("mtl_lora", "AdapterHub adapters of architecture mtl_lora are known"),
     ("unheard", "architecture unheard are not known"), ([1], "not known")],
)  # fmt: skip
def test_an_architecture_that_is_not_read_is_refused_by_name(
    plain: P, tmp_path: Path, architecture: object, message: str
) -> None:
    with pytest.raises(NotFoundError, match=message):
        read_adapter(locate(write(tmp_path / "a", plain, {"architecture": architecture})))


@pytest.mark.parametrize(
    ("config", "around", "field"),
    [
        ({"new_field": 1}, {}, "new_field"),
        ({}, {"new_field": 1}, "new_field"),
        ({"composition_mode": "scale", "use_gating": True, "r": 1}, {}, "use_gating"),
        ({"composition_mode": "scale", "r": 2}, {}, "r"),
        ({"use_gating": True, "use_dora": True}, {}, "use_gating"),
    ],
)
def test_a_field_that_would_have_to_be_applied_is_an_error_that_names_it(
    plain: P, tmp_path: Path, config: dict[str, Any], around: dict[str, Any], field: str
) -> None:
    adapter = read_adapter(locate(write(tmp_path / "a", plain, config, **around)))
    assert field in {f.tensor for f in adapter.findings if f.severity == ERROR}
    with pytest.raises(AdapterError, match=field):
        adapter.require_sound()


def with_head(folder: Path, tensors: P, **config: Any) -> Path:
    full = {
        "config": None, "hidden_size": 16, "label2id": {"A": 0, "B": 1, "C": 2}, "name": None,
        "model_class": "BertForSequenceClassification", "model_type": "bert", "num_labels": 3,
        "model_name": "some/bert", "version": "adapters.1.3.0", **config,
    }  # fmt: skip
    (folder / "head_config.json").write_text(json.dumps(full))
    save_file(tensors, folder / "model_head.safetensors")
    return folder


HEAD = {"classifier.weight": (3, 16), "classifier.bias": (3,)}


def test_a_head_takes_the_place_of_the_bases(bert: Any, plain: P, tmp_path: Path) -> None:
    head = randoms(HEAD, 1)
    folder = with_head(write(tmp_path / "a", plain), head)
    bare = write(tmp_path / "b", plain)
    x = torch.arange(6)[None]
    with torch.no_grad():
        with attach(bert, folder) as adapters:
            found = bert(x).logits
            bound = {row.tensor: row.primitive for row in adapters.report[str(folder)]}
        assert bound["classifier.weight"] == "Replace"
        with attach(bert, bare):
            pooled = bert.bert(x).pooler_output
    want = pooled @ head["classifier.weight"].mT + head["classifier.bias"]
    torch.testing.assert_close(found, want)
    adapter = read_adapter(locate(folder))
    assert any("3 labels" in f.found for f in adapter.findings if f.code == "head")
    assert set(adapter.files) >= {"head_config.json", "model_head.safetensors"}


def test_a_head_the_base_has_no_place_for_is_named(
    bert: Any, base: Path, plain: P, tmp_path: Path
) -> None:
    folder = with_head(write(tmp_path / "a", plain), randoms(HEAD | {"heads.x.1.bias": (3,)}, 1))
    assert "heads.x.1.bias" in errors(folder, base)
    body = with_head(write(tmp_path / "b", plain), randoms(HEAD, 1))
    with pytest.raises(MismatchError, match=r"classifier\.weight"):
        attach(bert.bert, body)
    grown = {"classifier.weight": (5, 16), "classifier.bias": (5,)}
    larger = with_head(write(tmp_path / "c", plain), randoms(grown, 1))
    assert "shape [3, 16]" in errors(larger, base)
    half = with_head(write(tmp_path / "d", plain), randoms({"classifier.weight": (3, 16)}, 1))
    assert "missing-tensor" in errors(half, base)


def test_half_a_head_is_an_error(plain: P, tmp_path: Path) -> None:
    folder = with_head(write(tmp_path / "a", plain), randoms(HEAD, 1), model_type="roberta")
    with pytest.raises(DamagedError, match="other-model-type"):
        read_adapter(locate(folder)).require_sound()
    (folder / "model_head.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"model_head\.safetensors is missing"):
        read_adapter(locate(folder))


FLEXIBLE = {
    "head_type": "classification", "num_labels": 5, "layers": 2, "activation_function": "tanh",
    "use_pooler": False, "bias": True, "dropout_prob": None, "label2id": {"A": 0},
}  # fmt: skip


def flexible(folder: Path, tensors: P, **config: Any) -> Path:
    return with_head(
        folder, tensors, config=FLEXIBLE | config, name="task", model_class="BertAdapterModel"
    )


TWO = {
    "heads.task.1.weight": (16, 16), "heads.task.1.bias": (16,), "heads.task.4.weight": (5, 16),
    "heads.task.4.bias": (5,),
}  # fmt: skip
ONE = {"heads.task.1.weight": (5, 16)}


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_flexible_head_stands_in_place_of_the_models(
    bert: Any, plain: P, tmp_path: Path, layers: int, pooled: bool
) -> None:
    """Of other layers and labels than the model's own; on the first token, or what pools it."""
    head = randoms(TWO if layers == 2 else ONE, 1)
    config = {"layers": layers, "use_pooler": pooled, "bias": layers == 2}
    folder = flexible(write(tmp_path / "a", plain), head, **config)
    x = torch.arange(8).reshape(2, 4)
    with torch.no_grad():
        before = bert(x).logits
        with attach(bert, write(tmp_path / "b", plain)):
            body = bert.bert(x)
        with attach(bert, {"a": folder}) as adapters:
            found = bert(x).logits
            bound = {row.tensor: row.primitive for row in adapters.report["a"]}
        assert torch.equal(bert(x).logits, before)
    want = body.pooler_output if pooled else body.last_hidden_state[:, 0]
    if layers == 2:
        want = (want @ head["heads.task.1.weight"].mT + head["heads.task.1.bias"]).tanh()
        want = want @ head["heads.task.4.weight"].mT + head["heads.task.4.bias"]
    else:
        want = want @ head["heads.task.1.weight"].mT
    torch.testing.assert_close(found, want)
    assert all("Head" in bound[key] for key in head)


def test_a_flexible_head_takes_weight_1_from_one_adapter(
    bert: Any, plain: P, tmp_path: Path
) -> None:
    folders = {name: flexible(write(tmp_path / name, plain), randoms(TWO, 1)) for name in "ab"}
    folders["c"] = with_head(write(tmp_path / "c", plain), randoms(HEAD, 1))
    with attach(bert, {"a": folders["a"]}) as adapters:
        for name in "bc":
            adapters.add(name, folders[name])
            with pytest.raises(AdapterError, match=rf"found a=1, {name}=1"):
                adapters.activate(["a", name])
        with pytest.raises(AdapterError, match=r"found a=0\.5"):
            adapters.activate({"a": 0.5})
        adapters.activate({"a": 1, "b": 0})
        adapters.add("d", write(tmp_path / "d", plain))
        adapters.activate(Stack("d", "a"))
        with pytest.raises(AdapterError, match="a brings a head of its own, which composes"):
            adapters.activate(BatchSplit("a", "d", batch_sizes=1))


def test_what_acts_inside_what_a_flexible_head_passes_by_is_refused_with_it(
    bert: Any, plain: P, tmp_path: Path
) -> None:
    """Nobody asks the pooler any more, nor what another adapter adds to it."""
    inner = tmp_path / "pooler"
    inner.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["pooler.dense"]}
    (inner / "adapter_config.json").write_text(json.dumps(config))
    key = "base_model.model.bert.pooler.dense.lora_{}.weight"
    factors = randoms({key.format("A"): (2, 16), key.format("B"): (16, 2)}, 1)
    save_file(factors, inner / "adapter_model.safetensors")
    head = flexible(write(tmp_path / "a", plain), randoms(TWO, 1))
    pooled = flexible(write(tmp_path / "b", plain), randoms(TWO, 1), use_pooler=True)
    with attach(bert, {"a": head}) as adapters:
        adapters.add("inner", inner)
        with pytest.raises(AdapterError, match="found a=1, inner=1"):
            adapters.activate(["inner", "a"])
        assert dict(adapters.active) == {"a": 1}
        adapters.add("b", pooled)
        adapters.activate(["inner", "b"])


def test_a_flexible_head_needs_a_model_for_its_task(bert: Any, plain: P, tmp_path: Path) -> None:
    folder = flexible(write(tmp_path / "a", plain), randoms(TWO, 1))
    with pytest.raises(MismatchError, match=r"heads\.task\.1\.weight"):
        attach(bert.bert, folder)
    tagging = flexible(write(tmp_path / "b", plain), randoms(TWO, 1), head_type="tagging")
    with pytest.raises(MismatchError, match="no-place-for-head"):
        attach(bert, tagging)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (TWO, {"head_type": "dependency_parsing"}, "dependency_parsing"),
        (TWO, {"layers": 3}, "missing-tensor"),
        (TWO, {"num_labels": 4}, "shape-mismatch"),
        (TWO, {"layers": 1}, "unexpected-tensor"),
        (TWO, {"bias": False}, "heads.task.4.bias"),
        (TWO, {"activation_function": None}, r"heads\.task\.4\.weight"),
        (TWO, {"new_field": 1}, "new_field"),
        (TWO | {"heads.other.1.bias": (3,)}, {}, r"heads\.other\.1\.bias"),
        (TWO, {"layers": "2"}, "layers is '2'"),
        (TWO, {"activation_function": "exec"}, "activation_function"),
    ],
)
def test_what_is_wrong_with_a_flexible_head_is_named(
    base: Path, plain: P, tmp_path: Path, tensors: dict[str, Any], config: Any, message: str
) -> None:
    folder = flexible(write(tmp_path / "a", plain), randoms(tensors, 1), **config)
    text = errors(folder, base)
    assert re.search(message, text), text


ODD: list[Any] = [
    None, -1, 1e400, 2**70, "q", [[1]], {"a": {"b": []}},
]  # fmt: skip
UNION = {"architecture": "union", "configs": [PLAIN, {"architecture": "reft", "r": 1}]}
REFT = {
    "architecture": "reft", "r": 2, "layers": "all", "prefix_positions": 1, "suffix_positions": 1,
    "orthogonality": False, "tied_weights": False, "non_linearity": None,
}  # fmt: skip


@pytest.mark.parametrize("start", [PLAIN, REFT, UNION, KINDS["VeRA+DoRA"][0] | PLAIN])
def test_no_value_of_any_field_is_more_than_an_error(
    base: Path, plain: P, tmp_path: Path, start: dict[str, Any]
) -> None:
    """In the method's config, around it, and in the head's: each by each odd value."""
    folder = flexible(write(tmp_path / "a", plain, start), randoms(TWO, 1))
    places = {name: json.loads((folder / name).read_text()) for name in CONFIGS}
    for name, whole in places.items():
        for inner in (None, "config"):
            fields = whole if inner is None else whole[inner]
            for field, odd in product([*fields, "surprise"], ODD):
                changed = {**fields, field: odd}
                full = changed if inner is None else {**whole, inner: changed}
                (folder / name).write_text(json.dumps(full))
                report = check(folder, base=base)  # whatever it says, it says it
                assert field != "surprise" or odd is None or report.errors
        (folder / name).write_text(json.dumps(whole))

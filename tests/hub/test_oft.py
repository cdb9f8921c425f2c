"""OFT: rotations of the input, exact on every weight format, and never as large as the weight."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit.hub import attach, check
from adapterkit.hub.bases.base import Base
from adapterkit.hub.fields import OftFields
from adapterkit.hub.kinds.oft import blocks
from adapterkit.hub.quant import format_of
from adapterkit.registry.errors import InvalidError, NotFoundError

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
Make = Callable[..., Path]
Edit = Callable[[dict[str, Any]], None]
TOKENS = torch.tensor([[3, 14, 15, 92], [65, 35, 8, 9]])
LAYER = "model.layers.0.self_attn.q_proj"
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}
INT8 = {"load_in_8bit": True}
PLAIN = {
    "peft_type": "OFT", "r": 0, "oft_block_size": 16, "target_modules": ["q_proj", "down_proj"],
    "use_cayley_neumann": False, "peft_version": "0.21.2", "block_share": False, "coft": False,
    "eps": 6e-5, "num_cayley_neumann_terms": 5, "bias": "none", "module_dropout": 0.1,
}  # fmt: skip


def load(fixtures: Path, **quantization: Any) -> Any:
    extra: dict[str, Any] = {}
    if quantization:
        config = transformers.BitsAndBytesConfig(**quantization)
        extra = {"quantization_config": config, "device_map": {"": "cpu"}}
    return transformers.AutoModelForCausalLM.from_pretrained(
        fixtures / "bases" / "llama", dtype=torch.float32, **extra
    ).eval()


@pytest.fixture
def write(tmp_path: Path, llama: Base) -> Callable[..., Path]:
    """`write(edit, block_share=True)`: an OFT folder of random blocks for the llama base."""

    def make(edit: Edit | None = None, **changes: Any) -> Path:
        config = {name: v for name, v in (PLAIN | changes).items() if v is not ...}
        size, shared = config.get("oft_block_size"), config.get("block_share")
        tensors: dict[str, Tensor] = {}
        torch.manual_seed(len(list(tmp_path.iterdir())))
        for name, module in llama.modules.items():
            if name.endswith(("q_proj", "down_proj")):
                b = size or module.n_in // (config["r"] or 1)
                shape = (1 if shared else module.n_in // b, b * (b - 1) // 2)
                tensors[f"base_model.model.{name}.oft_R.weight"] = torch.randn(shape) / 8
        if edit is not None:
            edit(tensors)
        folder = tmp_path / f"oft{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return make


def skew(entries: Tensor) -> Tensor:
    """Row by row above the diagonal, in float64."""
    b = next(b for b in range(1, 99) if b * (b - 1) // 2 == entries.shape[1])
    q = torch.zeros(len(entries), b, b, dtype=torch.float64)
    for n, row in enumerate(entries.double()):
        place = 0
        for i in range(b):
            for j in range(i + 1, b):
                q[n, i, j], q[n, j, i] = row[place], -row[place]
                place += 1
    return q


def rotation(entries: Tensor, n_in: int) -> Tensor:
    """blockdiag(R), (in, in), by the exact Cayley transform R = (I - Q) (I + Q)^-1."""
    q = skew(entries)
    one = torch.eye(q.shape[-1]).double()
    r = (one - q) @ torch.linalg.inv(one + q)
    return torch.block_diag(*r.expand(n_in // q.shape[-1], -1, -1))


@pytest.mark.parametrize("quantization", [{}, NF4, INT8], ids=["fp32", "nf4", "int8"])
@pytest.mark.parametrize("shared", [False, True])
def test_inputs_are_turned_before_the_product_on_every_weight_format(
    fixtures: Path, write: Callable[..., Path], quantization: dict[str, Any], shared: bool
) -> None:
    model = load(fixtures, **quantization)
    layer = model.get_submodule(LAYER)
    folder = write(block_share=shared)
    entries = load_file(folder / "adapter_model.safetensors")
    r = rotation(entries[f"base_model.model.{LAYER}.oft_R.weight"], layer.in_features)
    torch.testing.assert_close(r @ r.mT, torch.eye(len(r)).double())
    x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        w = format_of(layer).read_weight(layer).double()
        alone = layer((x.double() @ r).float())
        with attach(model, [folder]):
            found = layer(x)
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    atol = 0.2 if "load_in_8bit" in quantization else 2e-5  # int8 rounds activations as well
    torch.testing.assert_close(found.double(), x.double() @ (w @ r.mT).mT, atol=atol, rtol=0)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 4), b=st.integers(2, 9), seed=st.integers(0, 999), size=st.floats(0.01, 3)
)
def test_exact_blocks_are_the_cayley_transform_and_orthogonal(
    n: int, b: int, seed: int, size: float
) -> None:
    draw = torch.Generator().manual_seed(seed)
    entries = size * torch.randn(n, b * (b - 1) // 2, generator=draw)
    r = blocks(OftFields(size=b, count=0), entries)
    torch.testing.assert_close(torch.block_diag(*r.double()), rotation(entries, n * b),
                               atol=1e-6, rtol=0)  # fmt: skip
    torch.testing.assert_close(r @ r.mT, torch.eye(b).expand(n, b, b), atol=1e-5, rtol=0)


def test_the_series_stops_where_peft_stops() -> None:
    entries = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)) / 8
    q = skew(entries)
    one = torch.eye(4).double()
    powers = [one, q, q @ q, q @ q @ q, q @ q @ q @ q]
    rows = {1: [1], 2: [1, 2], 3: [1, 2, 2, 1], 4: [1, 2, 2, 1], 5: [1, 2, 2, 2, 1]}
    for terms, factors in rows.items():
        expected = sum(f * p for f, p in zip(factors, powers, strict=False)) + torch.zeros_like(q)
        found = blocks(OftFields(size=4, count=0, terms=terms), entries)
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    old = blocks(OftFields(size=4, count=0, terms=5, last_twice=True), entries)
    expected = one + 2 * sum(powers[1:]) + torch.zeros_like(q)
    torch.testing.assert_close(old.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("terms", range(1, 8))
@pytest.mark.parametrize("clip", [None, 0.4])
@pytest.mark.parametrize("shared", [False, True])
def test_blocks_are_those_of_peft(terms: int, clip: float | None, shared: bool) -> None:
    layer = pytest.importorskip("peft.tuners.oft.layer")
    torch.manual_seed(terms)
    rows = 1 if shared else 3
    module = layer.OFTRotationModule(
        rows, 6, 4, 12, coft=clip is not None, eps=clip or 0.0, block_share=shared,
        num_cayley_neumann_terms=terms,
    )  # fmt: skip
    entries = torch.randn(rows, 6) / 8
    module.weight.data.copy_(entries)
    fields = OftFields(size=4, count=0, shared=shared, terms=terms, limit=clip)
    found = blocks(fields, entries).expand(3, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(torch.block_diag(*found), module.get_weight())


def test_a_file_without_a_version_is_read_as_peft_wrote_it_then(
    fixtures: Path, write: Callable[..., Path]
) -> None:
    """Versions are in configs since 0.18, which also changed the last term of the series."""
    model = load(fixtures)
    layer, x = model.get_submodule(LAYER), torch.randn(1, 64)
    files = {v: write(use_cayley_neumann=True, peft_version=v) for v in ("0.17.1", "0.18.0", ...)}
    tensors = load_file(files["0.18.0"] / "adapter_model.safetensors")
    for folder in files.values():  # the same blocks in all
        save_file(tensors, folder / "adapter_model.safetensors")
    seen = {}
    for version, folder in files.items():
        with torch.no_grad(), attach(model, [folder]):
            seen[version] = layer(x)
    assert torch.equal(seen["0.17.1"], seen[...])
    assert not torch.equal(seen["0.17.1"], seen["0.18.0"])


def test_the_number_of_blocks_and_their_size_follow_from_each_other(
    write: Callable[..., Path], llama: Base
) -> None:
    assert not check(write(r=4, oft_block_size=0), base=llama).errors
    report = check(write(r=4, oft_block_size=16), base=llama)
    assert "oft_block_size is 16, expected 0" in str(report.findings[0])


@pytest.mark.parametrize(("n_in", "wanted", "size"), [(64, 16, 16), (64, 24, 16), (64, 28, 32),
                                                      (12, 5, 4), (10, 64, 10)])  # fmt: skip
def test_a_size_that_does_not_divide_the_inputs_is_the_nearest_that_does(
    n_in: int, wanted: int, size: int
) -> None:
    assert OftFields(size=wanted, count=0).block_size(n_in) == size


def living() -> dict[int, Tensor]:
    """All tensors there are, by id."""
    gc.collect()
    return {id(found): found for found in gc.get_objects() if issubclass(type(found), Tensor)}


def test_no_tensor_is_as_large_as_a_weight(fixtures: Path, write: Callable[..., Path]) -> None:
    """W R would be a second model; the blocks are a few percent of it."""
    model = load(fixtures)
    smallest = model.get_submodule(LAYER).weight.nbytes  # that of down_proj is larger
    before = living()
    with torch.no_grad(), attach(model, [write(), write()]):
        model(TOKENS)
        new = [found for number, found in living().items() if number not in before]
        assert len(new) >= 4
        assert max(found.untyped_storage().nbytes() for found in new) < smallest


@pytest.mark.parametrize("quantization", [{}, NF4, INT8], ids=["fp32", "nf4", "int8"])
def test_detach_leaves_no_rotation_and_no_gain_behind(
    fixtures: Path, write: Callable[..., Path], quantization: dict[str, Any]
) -> None:
    """Compared with the same base run without us: bitsandbytes itself changes what it stores."""
    untouched, model = load(fixtures, **quantization), load(fixtures, **quantization)
    with torch.no_grad():
        expected = untouched(TOKENS).logits
        with attach(model, {"ia3": fixtures / "adapters/llama_ia3_1", "oft": write()}) as adapters:
            assert (model(TOKENS).logits - expected).abs().max() > 0.1
            adapters.activate({"ia3": -0.5, "oft": 1})
            model(TOKENS)
        assert torch.equal(model(TOKENS).logits, expected)
    pairs = zip(model.parameters(), untouched.parameters(), strict=True)
    assert all(torch.equal(a.data, b.data) for a, b in pairs)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)
                and "forward" not in vars(untouched.get_submodule(name))]  # fmt: skip


@pytest.mark.parametrize("weight", [0.5, -1, 2])
def test_a_part_of_a_rotation_is_refused_and_changes_nothing(
    fixtures: Path, write: Callable[..., Path], weight: float
) -> None:
    model = load(fixtures)
    with torch.no_grad(), attach(model, {"turn": write()}) as adapters:
        turned = model(TOKENS).logits
        with pytest.raises(InvalidError, match=rf"turn={weight:g}.*not a rotation"):
            adapters.activate({"turn": weight})
        assert torch.equal(model(TOKENS).logits, turned)


def test_rotations_are_applied_in_the_order_given(
    fixtures: Path, write: Callable[..., Path]
) -> None:
    model = load(fixtures)
    layer, x = model.get_submodule(LAYER), torch.randn(1, 64)
    folders = {"a": write(), "b": write(oft_block_size=8)}
    stored = {name: load_file(f / "adapter_model.safetensors") for name, f in folders.items()}
    key = f"base_model.model.{LAYER}.oft_R.weight"
    r = {name: rotation(tensors[key], 64).float() for name, tensors in stored.items()}
    with torch.no_grad():
        expected = {order: layer(x @ r[order[0]] @ r[order[1]]) for order in ("ab", "ba")}
        with attach(model, folders) as adapters:
            for order in ("ab", "ba"):
                adapters.activate(list(order))
                torch.testing.assert_close(layer(x), expected[order])


def errors(folder: Path, base: Base) -> Iterator[str]:
    return (str(finding) for finding in check(folder, base=base).errors)


def test_a_tensor_that_is_missing_renamed_or_reshaped_is_named(
    write: Callable[..., Path], llama: Base
) -> None:
    whole = write()
    assert not [*errors(whole, llama)]
    for key in load_file(whole / "adapter_model.safetensors"):
        module = key.removeprefix("base_model.model.").removesuffix(".oft_R.weight")
        edits: list[tuple[str, Edit]] = [
            (module, lambda t, key=key: t.__delitem__(key)),
            (f"{key}x", lambda t, key=key: t.update({f"{key}x": t.pop(key)})),
            (key, lambda t, key=key: t.update({key: t[key].mT.contiguous()})),
            (key, lambda t, key=key: t.update({key: t[key][:, :-1].contiguous()})),
            (key, lambda t, key=key: t.update({key: t[key][:1].contiguous()})),
        ]
        for named, edit in edits:
            assert any(named in error for error in errors(write(edit), llama)), named


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"r": "4"}, "an integer"),
        ({"oft_block_size": None}, "an integer"),
        ({"oft_block_size": 0}, "as r is 0"),
        ({"coft": "yes"}, "true or false"),
        ({"eps": "small"}, "a finite number"),
        ({"eps": -1}, "0 or more"),
        ({"num_cayley_neumann_terms": 10**9}, "an integer from 1 to 1000"),
        ({"use_cayley_neumann": 1}, "true or false"),
        ({"block_share": "no"}, "true or false"),
        ({"bias": "lora_only"}, "one of none, all, oft_only"),
        ({"peft_version": "newest"}, "a version"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(
    write: Callable[..., Path], llama: Base, change: dict[str, Any], expected: str
) -> None:
    folder = write()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    found = str(check(folder, base=llama).findings[0])
    (field,) = change
    assert field in found
    assert expected in found


def test_oft_only_replaces_the_biases_of_the_turned_modules(
    make: Make, base_of: Callable[[str], Base], fixtures: Path
) -> None:
    def add(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if key.endswith(".oft_R.weight")]:
            bias = key.replace(".oft_R.weight", ".base_layer.bias")
            tensors[bias] = ("F32", [64], torch.ones(64).numpy().tobytes())

    found = [*errors(make("bert.oft_cls", bias="oft_only"), base_of("bert"))]
    assert sum("replace.bias" in error for error in found) == 4
    whole = make("bert.oft_cls", add, bias="oft_only")
    assert not [*errors(whole, base_of("bert"))]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        fixtures / "bases" / "bert", dtype=torch.float32
    ).eval()
    layer = model.bert.encoder.layer[0].attention.self.query
    with torch.no_grad(), attach(model, [whole]):
        torch.testing.assert_close(layer(torch.zeros(1, 64)), torch.ones(1, 64))


def old_blocks(tensors: dict[str, Any]) -> None:
    """As PEFT 0.7 to 0.15 stored them."""
    for key in list(tensors):
        tensors[key.replace("oft_R.weight", "oft_r")] = torch.randn(4, 16, 16)
        del tensors[key]


def test_the_old_form_is_refused_by_name(fixtures: Path, write: Callable[..., Path]) -> None:
    folder = write(old_blocks, oft_block_size=..., r=4, peft_version=...)
    with pytest.raises(NotFoundError, match=r"oft_r: .*PEFT up to 0\.15"):
        attach(load(fixtures), [folder])


def test_the_rotation_of_an_embedding_is_refused_by_name(
    fixtures: Path, write: Callable[..., Path]
) -> None:
    def add(tensors: dict[str, Any]) -> None:
        key = "base_model.model.model.embed_tokens.oft_embedding_R.weight"
        tensors[key] = torch.randn(8, 28)

    folder = write(add, target_modules=["q_proj", "down_proj", "embed_tokens"])
    with pytest.raises(NotFoundError, match=r"oft_embedding_R.*embedding"):
        attach(load(fixtures), [folder])

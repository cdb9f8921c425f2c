"""LoRA on convolutions: against PEFT, and against dense float64 maths."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapterkit.hub import attach
from adapterkit.registry.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")


class Config(transformers.PretrainedConfig):  # type: ignore[misc]
    model_type = "convolutions"


class Nets(transformers.PreTrainedModel):  # type: ignore[misc]
    """One convolution of every kind, beside each other."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.line = nn.Conv1d(4, 6, 3, stride=2, padding=1)
        self.plane = nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), bias=False)
        self.point = nn.Conv2d(4, 6, 1)
        self.space = nn.Conv3d(2, 4, 2)
        self.groups = nn.Conv2d(4, 6, 3, groups=2, padding="same")
        self.deep = nn.Conv1d(4, 4, 3, groups=4)
        self.wide = nn.Conv2d(4, 6, 3, dilation=2)
        self.round = nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular")
        self.post_init()


INPUTS = {
    "line": (4, 9), "plane": (4, 5, 6), "point": (4, 3, 3), "space": (2, 3, 3, 3),
    "groups": (4, 5, 5), "deep": (4, 7), "wide": (4, 7, 7), "round": (4, 9),
}  # fmt: skip
USABLE = ("line", "plane", "point", "space", "groups", "deep")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return Nets(Config()).eval()


Tensors = dict[str, Tensor]


def drawn(model: Any, names: tuple[str, ...], rank: int, seed: int, **extra: bool) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for name in names:
        layer = getattr(model, name)
        key, kernel = f"base_model.model.{name}", layer.kernel_size
        ones = (1,) * len(kernel)
        a, b = (rank, layer.in_channels, *kernel), (layer.out_channels, rank // layer.groups, *ones)
        tensors[f"{key}.lora_A.weight"] = torch.randn(a, generator=draw) / 3
        tensors[f"{key}.lora_B.weight"] = torch.randn(b, generator=draw) / 3
        if extra.get("use_dora"):
            m = torch.rand((1, layer.out_channels, *ones), generator=draw) + 0.5
            tensors[f"{key}.lora_magnitude_vector"] = m
        if extra.get("lora_bias"):
            tensors[f"{key}.lora_B.bias"] = torch.randn(layer.out_channels, generator=draw)
    return tensors


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(tensors: Tensors, **config: Any) -> Path:
        folder = tmp_path / f"adapter{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        known = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": list(USABLE)}
        (folder / "adapter_config.json").write_text(json.dumps(known | config))
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return make


def run(model: Any, names: tuple[str, ...], dtype: torch.dtype = torch.float32) -> Tensors:
    found = {}
    for name in names:
        draw = torch.Generator().manual_seed(len(name))
        x = torch.randn((2, *INPUTS[name]), generator=draw).to(dtype)
        with torch.no_grad():
            found[name] = getattr(model, name)(x)
    return found


class Sum(nn.Module):
    """y + s conv_B(conv_A(x)), with the base's strides and padding; float64."""

    def __init__(self, layer: nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        base: Any = layer
        while isinstance(base, Sum):
            base = base.layer
        kind, rank = type(base), len(a)
        self.layer, self.scale = layer, scale
        self.down = kind(
            base.in_channels, rank, base.kernel_size, base.stride, base.padding, bias=False
        )
        self.up = kind(rank, base.out_channels, 1, groups=base.groups, bias=False)
        self.down.weight.data, self.up.weight.data = a.double(), b.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.scale * self.up(self.down(x))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(
        st.tuples(
            st.integers(1, 2), st.integers(0, 99),
            st.floats(-1.5, 1.5).map(lambda w: round(w, 2)).filter(bool),
        ),
        min_size=1, max_size=3,
    )
)  # fmt: skip
def test_what_is_added_is_two_convolutions(
    model: Any, write: Callable[..., Path], rows: list[Any]
) -> None:
    """One, two and three dimensions, strides, padding, groups; several adapters of other ranks."""
    dense = copy.deepcopy(model).double()
    folders, weights = {}, {}
    for place, (half, seed, weight) in enumerate(rows):
        tensors = drawn(model, USABLE, 4 * half, seed)
        folders[f"a{place}"] = write(tensors, r=4 * half)
        weights[f"a{place}"] = weight
        for name in USABLE:
            a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
            setattr(dense, name, Sum(getattr(dense, name), a, b, weight * 6 / (4 * half)))
    with attach(model, folders) as adapters:
        adapters.activate(weights)
        found = run(model, USABLE)
    for name, expected in run(dense, USABLE, torch.float64).items():
        torch.testing.assert_close(found[name].double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("weight", [1, -0.5])
def test_dora_scales_the_rows_of_kernels(
    model: Any, write: Callable[..., Path], weight: float
) -> None:
    """W' = diag(m / |V|) V, V = W + s B A with kernels flattened, the bias as it was."""
    names = ("line", "plane", "point")
    tensors = drawn(model, names, 4, 1, use_dora=True)
    dense = copy.deepcopy(model).double()
    for name in names:
        a, b, m = (
            tensors[f"base_model.model.{name}.{part}"].double().flatten(1)
            for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        )
        layer = getattr(dense, name)
        w = layer.weight.data.flatten(1)
        v = w + 1.5 * b @ a
        new = (m.flatten() / v.norm(dim=1))[:, None] * v
        layer.weight.data = (w + weight * (new - w)).reshape(layer.weight.shape)
    folder = write(tensors, use_dora=True, target_modules=list(names))
    with attach(model, {"a": folder}) as adapters:
        adapters.activate({"a": weight})
        found = run(model, names)
    for name, expected in run(dense, names, torch.float64).items():
        torch.testing.assert_close(found[name].double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}]
)
def test_the_outputs_are_pefts(tmp_path: Path, options: dict[str, bool]) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = Nets(Config()).eval()
    # PEFT's own DoRA fails for groups, and needs a bias for lora_bias
    names = USABLE if options in ({}, {"use_rslora": True}) else ("line", "point", "space")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(names), **options)
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape) / 3)
        expected = run(wrapped.base_model.model, names)
        wrapped.save_pretrained(str(tmp_path))
    plain = wrapped.unload()
    assert not torch.allclose(run(plain, names)["line"], expected["line"], atol=1e-2)
    with attach(plain, tmp_path):
        for name, found in run(plain, names).items():
            torch.testing.assert_close(found, expected[name], atol=2e-5, rtol=1e-5)


def test_the_patches_of_an_image_are_convolved_as_peft_does(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=16, patch_size=4,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    pixels = torch.randn(2, 3, 16, 16)
    targets = r".*\.(projection|q_proj|query)"
    lora = peft.LoraConfig(r=3, target_modules=targets, modules_to_save=["classifier"])
    wrapped = peft.get_peft_model(model, lora).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape) / 4)
        expected = wrapped(pixel_values=pixels).logits
        wrapped.save_pretrained(str(tmp_path))
        held = load_file(tmp_path / "adapter_model.safetensors")
        assert any(value.ndim == 4 for value in held.values())
        plain = wrapped.unload()
        with attach(plain, tmp_path):
            torch.testing.assert_close(
                plain(pixel_values=pixels).logits, expected, atol=1e-5, rtol=0
            )


def test_detach_leaves_the_base_bit_for_bit(model: Any, write: Callable[..., Path]) -> None:
    before = run(model, USABLE)
    with attach(model, [write(drawn(model, USABLE, 4, 1))]):
        now = run(model, USABLE)
        assert not any(torch.equal(now[name], before[name]) for name in USABLE)
    assert all(torch.equal(value, before[name]) for name, value in run(model, USABLE).items())


@pytest.mark.parametrize("name", ["wide", "round"])
def test_what_is_no_change_of_the_weight_is_refused(
    model: Any, write: Callable[..., Path], name: str
) -> None:
    """PEFT leaves out the dilation of A, and pads it with zeros."""
    with pytest.raises(AdapterError, match=f"{name}: expected one of"):
        attach(model, [write(drawn(model, (name,), 4, 1), target_modules=[name])])


def test_what_groups_do_not_take_is_refused(model: Any, write: Callable[..., Path]) -> None:
    tensors = drawn(model, ("groups",), 4, 1, use_dora=True)
    with pytest.raises(AdapterError, match="one with 2 groups, where what is added is no change"):
        attach(model, [write(tensors, target_modules=["groups"], use_dora=True)])
    with pytest.raises(AdapterError, match="a multiple of its 4 groups, found rank 6"):
        attach(model, [write(drawn(model, ("deep",), 6, 1), target_modules=["deep"], r=6)])


@pytest.mark.parametrize(
    ("key", "edit"),
    [
        ("plane.lora_A.weight", lambda t: t[:, :-1]),
        ("plane.lora_A.weight", lambda t: t[..., :1]),
        ("plane.lora_A.weight", lambda t: t[:-1]),
        ("line.lora_A.weight", lambda t: t.flatten(1)),
        ("groups.lora_B.weight", lambda t: torch.cat((t, t), 1)),
        ("point.lora_B.weight", lambda t: t[:-1]),
    ],
)
def test_a_kernel_of_another_shape_is_named(
    model: Any, write: Callable[..., Path], key: str, edit: Callable[[Tensor], Tensor]
) -> None:
    tensors = drawn(model, USABLE, 4, 1)
    tensors[f"base_model.model.{key}"] = edit(tensors[f"base_model.model.{key}"]).contiguous()
    with pytest.raises(AdapterError, match=key):
        attach(model, [write(tensors)])


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("effective", [False, True])
def test_products_of_kernels_are_pefts(
    tmp_path: Path, kind: str, rank: int, effective: bool
) -> None:
    """Two factors, or three with a core between them; a kernel of LoKr whole or as a product."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = Nets(Config()).eval()
    names = ("line", "plane", "point", "groups", "deep")
    split = {"decompose_factor": 1} if kind == "LoKrConfig" else {}  # so that rank 2 is a product
    config = getattr(peft, kind)(
        r=rank, alpha=3, target_modules=list(names), use_effective_conv2d=effective,
        rank_pattern={"plane": rank + 1}, **split,
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "hada_" in name or "lokr_" in name:
                parameter.copy_(torch.randn(parameter.shape) / 2)
        expected = run(wrapped.base_model.model, names)
        wrapped.save_pretrained(str(tmp_path))
    plain = wrapped.unload()
    assert not torch.allclose(run(plain, names)["line"], expected["line"], atol=1e-2)
    with attach(plain, tmp_path) as adapters:
        for name, found in run(plain, names).items():
            torch.testing.assert_close(found, expected[name], atol=2e-5, rtol=1e-5)
        held = load_file(tmp_path / "adapter_model.safetensors")
        assert {row.tensor for row in adapters.report[str(tmp_path)]} == held.keys()


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_factor_of_a_kernel_of_another_shape_is_named(
    tmp_path: Path, kind: str, effective: bool, axis: int
) -> None:
    peft = pytest.importorskip("peft")
    model = Nets(Config()).eval()
    config = getattr(peft, kind)(
        r=2, alpha=3, target_modules=["plane"], use_effective_conv2d=effective
    )
    wrapped = peft.get_peft_model(model, config).eval()
    wrapped.save_pretrained(str(tmp_path))
    plain, path = wrapped.unload(), tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for key, value in tensors.items():
        if value.shape[axis] > 1:
            cut = value.narrow(axis, 0, value.shape[axis] - 1).contiguous()
            save_file(tensors | {key: cut}, path)
            with pytest.raises(AdapterError, match=key):
                attach(plain, tmp_path)

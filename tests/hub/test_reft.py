"""ReFT against its formula, token by token in float64, and against torch's own parametrization."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from adapterkit.hub import Stack, attach, check
from adapterkit.hub.compose.blocks import BatchSplit
from adapterkit.hub.kinds.reft import orthonormal
from adapterkit.hub.locate import folder as with_hints
from adapterkit.hub.locate import locate
from adapterkit.hub.read import read_adapter
from adapterkit.registry.errors import DamagedError, InvalidError, MismatchError

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
QUICK = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WIDTH, RANK = 16, 3
CONFIG = {
    "architecture": "reft", "r": RANK, "layers": "all", "prefix_positions": 2,
    "suffix_positions": 1, "orthogonality": False, "tied_weights": False, "non_linearity": None,
    "output_reft": True, "dropout": 0.05, "dtype": None, "init_weights_seed": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def write(folder: Path, seed: int = 0, present: tuple[int, ...] = (0, 1), **config: Any) -> Path:
    """A folder of random interventions."""
    full = {**CONFIG, **config}
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in present:
        for unit in range(1 if full["tied_weights"] else 2):
            start = f"model.layers.{layer}.reft_layer.refts.task.units.{unit}"
            tensors[f"{start}.learned_source.weight"] = torch.randn(RANK, WIDTH, generator=draw)
            tensors[f"{start}.learned_source.bias"] = torch.randn(RANK, generator=draw)
            projection = torch.randn(RANK, WIDTH, generator=draw)
            if full["orthogonality"]:
                tensors |= kept(f"{start}.projection.parametrizations.weight.", projection)
            else:
                tensors[f"{start}.projection.weight"] = projection
    folder.mkdir(exist_ok=True, parents=True)
    around = {
        "config": full, "hidden_size": WIDTH, "model_class": "LlamaForCausalLM",
        "model_name": "some/llama", "model_type": "llama", "name": "task",
        "version": "adapters.1.3.0",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(around))
    save_file(tensors, folder / "adapter.safetensors")
    return folder


def kept(start: str, matrix: Tensor) -> dict[str, Tensor]:
    """What torch keeps of a projection whose rows are orthonormal."""
    layer = orthogonal(linear(matrix))
    return {
        start + name.removeprefix("parametrizations.weight."): t.contiguous()
        for name, t in layer.state_dict().items()
    }


def linear(matrix: Tensor) -> nn.Linear:
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    layer.weight = nn.Parameter(matrix)
    return layer


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_the_projection_is_the_one_that_torch_makes(rows: int) -> None:
    """From what its parametrization keeps, moved away from where it started."""
    torch.manual_seed(rows)
    layer: Any = orthogonal(nn.Linear(5, rows, bias=False))
    original = layer.parametrizations.weight.original
    with torch.no_grad():
        original += torch.randn_like(original).tril(-1) / 3
        original += torch.randn_like(original).triu(1) / 3
        found = orthonormal(original, layer.parametrizations.weight[0].base)
    torch.testing.assert_close(found, layer.weight.detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found @ found.mT, torch.eye(rows), atol=1e-6, rtol=0)


def moved(h: Tensor, p: dict[str, Tensor], unit: str, subtract: bool, act: Any) -> Tensor:
    source = act(p[f"{unit}.learned_source.weight"] @ h + p[f"{unit}.learned_source.bias"])
    projection = p[f"{unit}.projection.weight"]
    return (source - projection @ h if subtract else source) @ projection


def expected(
    h: Tensor, mask: Tensor, folder: Path, layer: int, weight: float, subtract: bool = True
) -> Tensor:
    """Row by row and token by token."""
    config = json.loads((folder / "adapter_config.json").read_text())["config"]
    act = {None: lambda x: x, "tanh": torch.tanh}[config["non_linearity"]]
    start = f"model.layers.{layer}.reft_layer.refts.task.units."
    stored = load_file(folder / "adapter.safetensors")
    p = {k.removeprefix(start): t.double() for k, t in stored.items() if k.startswith(start)}
    found = h.double().clone()
    last_unit = "0" if config["tied_weights"] else "1"
    for row in range(len(h)):
        real = [at for at in range(h.shape[1]) if mask[row, at]]
        first, n = real[: config["prefix_positions"]], config["suffix_positions"]
        last = real[-n:] if n else []
        for at in first:
            found[row, at] += weight * moved(h[row, at].double(), p, "0", subtract, act)
        for at in last:
            x = h[row, at].double()
            found[row, at] = x + weight * moved(x, p, last_unit, subtract, act)
    return found


def outputs(model: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """What each layer gives."""
    found: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda m, a, out: found.append(out))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    return found


@QUICK
@given(
    seed=st.integers(0, 99),
    first=st.integers(0, 4),
    last=st.integers(0, 4),
    tied=st.booleans(),
    act=st.sampled_from([None, "tanh"]),
    subtract=st.booleans(),
    weight=st.sampled_from([1.0, -0.5, 2.0]),
    lengths=st.lists(st.integers(1, 6), min_size=2, max_size=2),
    left=st.booleans(),
)
def test_the_first_and_last_real_tokens_are_moved_and_no_other(
    llama: Any, tmp_path: Path, seed: int, first: int, last: int, tied: bool, act: Any,
    subtract: bool, weight: float, lengths: list[int], left: bool,
) -> None:  # fmt: skip
    """With padding on either side, rows shorter than what is asked for, ends that overlap."""
    mask = torch.zeros(2, 6, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, slice(6 - n, 6) if left else slice(0, n)] = 1
    name = f"{seed}-{first}-{last}-{tied}-{act}"
    folder = write(
        tmp_path / name, seed, prefix_positions=first, suffix_positions=last, tied_weights=tied,
        non_linearity=act,
    )  # fmt: skip
    ids = torch.randint(1, 64, (2, 6), generator=torch.Generator().manual_seed(seed))
    plain = outputs(llama, ids, mask)[0]
    with attach(llama, {"a": with_hints(folder, subtract_projection=subtract)}) as adapters:
        adapters.activate({"a": weight})
        found = outputs(llama, ids, mask)[0].double()
    want = expected(plain, mask, folder, 0, weight, subtract)
    size = want[mask.bool()].abs().max().clamp(min=1)
    real = mask.bool()
    torch.testing.assert_close(found[real] / size, want[real] / size, atol=2e-6, rtol=0)


def test_several_act_one_after_the_other(llama: Any, tmp_path: Path) -> None:
    folders = {name: write(tmp_path / name, seed) for seed, name in enumerate("ab")}
    ids, mask = torch.arange(1, 7)[None], torch.ones(1, 6, dtype=torch.long)
    plain = outputs(llama, ids, mask)[0]
    with attach(llama, folders) as adapters:
        adapters.activate(Stack("b", "a"))
        found = outputs(llama, ids, mask)[0].double()
        with pytest.raises(InvalidError, match="a is a ReFT, which composes"):
            adapters.activate(BatchSplit("a", "b", batch_sizes=1))
    want = expected(plain, mask, folders["b"], 0, 1.0)
    want = expected(want, mask, folders["a"], 0, 1.0)
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("left", [True, False])
def test_generation_moves_tokens_of_the_prompt_only(llama: Any, tmp_path: Path, left: bool) -> None:
    """With a cache, each step gives what a forward over the prompt left there."""
    folder = write(tmp_path / "a", prefix_positions=2, suffix_positions=0)
    ids, mask = torch.arange(1, 13).reshape(2, 6), torch.ones(2, 6, dtype=torch.long)
    if left:
        mask[1, :2] = 0
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with torch.no_grad(), attach(llama, folder):
        cached = llama.generate(ids, attention_mask=mask, **settings)
        whole = llama.generate(ids, attention_mask=mask, use_cache=False, **settings)
        beams = llama.generate(ids, attention_mask=mask, num_beams=3, **settings)
    with torch.no_grad():
        plain = llama.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(cached, whole) and beams.shape == cached.shape
    assert not torch.equal(cached, plain)


def test_detaching_leaves_no_bit_and_no_hook(llama: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", orthogonality=True)
    ids = torch.arange(1, 7)[None]
    with torch.no_grad():
        before = llama(ids).logits
        with attach(llama, folder) as adapters:
            assert not torch.allclose(llama(ids).logits, before, atol=1e-3)
            rows = adapters.report[str(folder)]
            assert {row.primitive for row in rows} == {"Intervention"} and len(rows) == 16
        assert torch.equal(llama(ids).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())


def test_a_direft_cannot_be_told_from_a_noreft(tmp_path: Path) -> None:
    """Unless somebody says so; the saved config has no such field (adapters 1.3)."""
    folder = write(tmp_path / "a")
    codes = {f.code for f in read_adapter(locate(folder)).findings}
    assert "direft-or-noreft" in codes
    said = read_adapter(with_hints(folder, subtract_projection=False))
    assert said.hints == {"subtract_projection": False} and not said.fields.subtracts
    assert "direft-or-noreft" not in {f.code for f in said.findings}
    with pytest.raises(InvalidError, match="subtract_projection is 3"):
        read_adapter(with_hints(folder, subtract_projection=3))
    orthogonal_ = read_adapter(locate(write(tmp_path / "b", orthogonality=True)))
    assert not orthogonal_.findings


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": None}, "r is None"),
        ({"prefix_positions": -1}, "prefix_positions"),
        ({"suffix_positions": "1"}, "suffix_positions"),
        ({"layers": "some"}, "layers"),
        ({"non_linearity": "exec"}, "non_linearity"),
        ({"tied_weights": "no"}, "tied_weights"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(DamagedError, match=message):
        read_adapter(locate(write(tmp_path / "a", **config)))


@pytest.mark.parametrize(
    ("present", "config", "code"),
    [
        ((0,), {}, "missing-tensor"),
        ((0, 1), {"layers": [1]}, "no-such-module"),
        ((0, 1), {"tied_weights": True, "r": 2}, "shape-mismatch"),
        ((0, 1, 2), {}, "no-such-module"),
    ],
)
def test_tensors_and_config_have_to_say_the_same(
    llama: Any, tmp_path: Path, present: tuple[int, ...], config: dict[str, Any], code: str
) -> None:
    llama.save_pretrained(tmp_path / "llama")
    report = check(write(tmp_path / "a", present=present, **config), base=tmp_path / "llama")
    assert code in {f.code for f in report.errors}
    assert not check(
        write(tmp_path / "b", layers=(1,)[:0] + (0, 1)), base=tmp_path / "llama"
    ).errors


def test_two_stacks_are_refused_by_name(fixtures: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"llama"', '"t5"'))
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(fixtures / "bases" / "t5")
    with pytest.raises(MismatchError, match="two stacks"):
        attach(model, folder)

"""BOFT against dense float64 maths, and against the permutations of PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from adapterkit.hub import attach
from adapterkit.hub.kinds.boft import turns
from adapterkit.registry.errors import AdapterError, InvalidError

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
TARGETS = ("q_proj", "down_proj")
TOKENS = torch.arange(20).reshape(2, 10)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


Tensors = dict[str, Tensor]


def drawn(model: Any, size: int, stages: int, seed: int) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for name, layer in model.named_modules():
        if name.endswith(TARGETS):
            n_out, n_in = layer.weight.shape
            shape = (stages, n_in // size, size, size)
            tensors[f"base_model.model.{name}.boft_R"] = torch.randn(shape, generator=draw) / 2
            tensors[f"base_model.model.{name}.boft_s"] = torch.rand(n_out, 1, generator=draw) + 0.5
    return tensors


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(tensors: Tensors, **config: Any) -> Path:
        folder = tmp_path / f"adapter{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        known = {"peft_type": "BOFT", "target_modules": list(TARGETS)} | config
        (folder / "adapter_config.json").write_text(json.dumps(known))
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return make


def permutation(n: int, stage: int, size: int) -> Tensor:
    """P of a stage: in each run of 2^stage blocks, the even halves of blocks before the others."""
    if stage == 0:
        return torch.eye(n).double()
    half, run = size // 2, size << stage
    order = []
    for start in range(0, n, run):
        halves = [list(range(i, i + half)) for i in range(start, start + run, half)]
        order += [i for part in (halves[::2], halves[1::2]) for one in part for i in one]
    return torch.eye(n).double()[order]


def butterfly(entries: Tensor) -> Tensor:
    """M_m ... M_1, dense float64: M = P blockdiag(cayley(skew)) P^T."""
    stages, count, size, _ = entries.shape
    n = count * size
    total = torch.eye(n).double()
    for stage in range(stages):
        blocks = []
        for block in entries[stage].double():
            q = (block - block.mT) / 2
            one = torch.eye(size).double()
            blocks.append((one - q) @ torch.linalg.inv(one + q))
        p = permutation(n, stage, size)
        total = p @ torch.block_diag(*blocks) @ p.mT @ total
    return total


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    size=st.sampled_from([2, 4, 8]), stages=st.integers(1, 3), seed=st.integers(0, 999),
    by_count=st.booleans(),
)  # fmt: skip
def test_inputs_are_turned_and_rows_scaled_but_not_the_bias(
    model: Any, write: Callable[..., Path], size: int, stages: int, seed: int, by_count: bool
) -> None:
    """y = diag(s) W (x B) + b."""
    if 48 % (size << (stages - 1)) or 32 % (size << (stages - 1)):
        stages = 1
    tensors = drawn(model, size, stages, seed)
    config = {"boft_block_size": size, "boft_block_num": 0, "boft_n_butterfly_factor": stages}
    if by_count:  # the same number of blocks for any width: so one width only
        tensors = {key: value for key, value in tensors.items() if "q_proj" in key}
        config |= {"boft_block_size": 0, "boft_block_num": 32 // size, "target_modules": ["q_proj"]}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        key = f"base_model.model.{name}"
        if f"{key}.boft_R" not in tensors:
            continue
        layer = model.get_submodule(name)
        x = torch.randn(3, layer.in_features)
        with torch.no_grad(), attach(model, [write(tensors, **config)]):
            found = layer(x)
        turned = x.double() @ butterfly(tensors[f"{key}.boft_R"])
        scaled = tensors[f"{key}.boft_s"].double() * layer.weight.double()
        expected = (turned @ scaled.mT + layer.bias).detach()
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_the_order_of_the_blocks_is_pefts(stages: int) -> None:
    """Without its CUDA extension PEFT trains one stage only; its permutations are there."""
    layers = pytest.importorskip("peft.tuners.boft.layer")
    layer = layers.BOFTLayer(torch.nn.Linear(64, 8))
    for stage in range(stages):
        order = layer.block_butterfly_perm(64, 16 >> stage, 2, stages - 1)
        assert torch.equal(layer.perm2mat(order).double(), permutation(64, stage, 4))


@given(size=st.sampled_from([2, 4, 6]), stages=st.integers(1, 4), seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_the_product_is_orthogonal_in_runs(size: int, stages: int, seed: int) -> None:
    entries = torch.randn(stages, 16, size, size, generator=torch.Generator().manual_seed(seed))
    blocks = turns(entries)
    run = size << (stages - 1)
    assert blocks.shape == (16 * size // run, run, run)
    one = torch.eye(run).expand_as(blocks)
    torch.testing.assert_close(blocks @ blocks.mT, one, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        torch.block_diag(*blocks).double(), butterfly(entries), atol=1e-5, rtol=0
    )


def test_the_logits_are_pefts(model: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.BOFTConfig(boft_block_size=8, target_modules=list(TARGETS), bias="boft_only")
    with pytest.warns(UserWarning):  # of the extension that is missing
        wrapped = peft.get_peft_model(model, config).eval()
    state = {name: value.clone() for name, value in model.state_dict().items() if "bias" in name}
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "boft_" in name or name.endswith("q_proj.base_layer.bias"):
                parameter.add_(torch.randn(parameter.shape) / 4)
        expected = wrapped(input_ids=TOKENS).logits
        wrapped.save_pretrained(str(tmp_path))
    plain = wrapped.unload()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.replace("q_proj.", "q_proj.base_layer.") in state:
                parameter.copy_(state[name.replace("q_proj.", "q_proj.base_layer.")])
        with attach(plain, tmp_path):
            torch.testing.assert_close(plain(TOKENS).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("weight", [0.5, -1, 2])
def test_a_part_of_a_rotation_is_refused(
    model: Any, write: Callable[..., Path], weight: float
) -> None:
    folder = write(drawn(model, 4, 1, 1), boft_block_size=4)
    with attach(model, {"a": folder}) as adapters:
        with pytest.raises(InvalidError, match="rotations take no weight but 0 and 1"):
            adapters.activate({"a": weight})
        adapters.activate({"a": 1})


def test_detach_leaves_the_base_bit_for_bit(model: Any, write: Callable[..., Path]) -> None:
    with torch.no_grad():
        before = model(TOKENS).logits
        folder = write(drawn(model, 4, 2, 1), boft_block_size=4, boft_n_butterfly_factor=2)
        with attach(model, [folder]):
            assert not torch.equal(model(TOKENS).logits, before)
        assert torch.equal(model(TOKENS).logits, before)


def test_one_stage_is_what_peft_trains_without_its_extension(
    model: Any, write: Callable[..., Path]
) -> None:
    tensors = drawn(model, 4, 1, 1)
    with torch.no_grad(), attach(model, [write(tensors, boft_block_size=4)]):
        expected = model(TOKENS).logits
    folder = write(tensors, boft_block_size=4, boft_n_butterfly_factor=2)
    with torch.no_grad(), attach(model, [folder]):
        assert torch.equal(model(TOKENS).logits, expected)


KEY = "base_model.model.model.layers.1.self_attn.q_proj.boft_R"


@pytest.mark.parametrize("change", ["renamed", "missing", "blocks", "size", "scale"])
def test_a_tensor_that_is_missing_renamed_or_reshaped_is_named(
    model: Any, write: Callable[..., Path], change: str
) -> None:
    tensors = drawn(model, 4, 1, 1)
    value = tensors.pop(KEY)
    changed = {
        "renamed": {KEY.replace("q_proj", "qq_proj"): value},
        "missing": {},
        "blocks": {KEY: value[:, :-1]},
        "size": {KEY: value[..., :2, :2]},
        "scale": {KEY: value, KEY.replace("_R", "_s"): torch.ones(31, 1)},
    }
    made = {**tensors, **{k: v.contiguous() for k, v in changed[change].items()}}
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.q_proj"):
        attach(model, [write(made, boft_block_size=4)])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"boft_block_num": 8}, "expected 0 or not, as boft_block_num is not 0"),
        ({"boft_block_size": 0}, "expected 0 or not, as boft_block_num is 0"),
        ({"boft_block_size": "4"}, "boft_block_size is '4'"),
        ({"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor is 0"),
        ({"boft_block_size": 5}, "a multiple of 5: runs of 1 blocks of 5, found 32 inputs"),
        ({"boft_block_num": 5, "boft_block_size": 0}, "32 inputs"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens: expected one of linear"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    model: Any, write: Callable[..., Path], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        attach(model, [write(drawn(model, 4, 1, 1), **({"boft_block_size": 4} | config))])

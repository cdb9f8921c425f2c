"""LoRA on fused experts and routers: against PEFT, and against dense float64 maths."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapterkit.hub import BatchSplit, attach, check
from adapterkit.hub.bases.folder import read_base
from adapterkit.hub.ingest import touched
from adapterkit.hub.read import read_adapter
from adapterkit.hub.sources import open_folder
from adapterkit.registry.errors import AdapterError, MismatchError

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
SIZES = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": 2,
}  # fmt: skip
TOKENS = torch.arange(36).reshape(3, 12) % 61
GATE_UP, DOWN, ROUTER = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"


def mixtral() -> Any:
    config = transformers.MixtralConfig(intermediate_size=24, num_local_experts=4, **SIZES)
    return transformers.MixtralForCausalLM(config)


def qwen2_moe() -> Any:
    config = transformers.Qwen2MoeConfig(
        intermediate_size=32, moe_intermediate_size=24, shared_expert_intermediate_size=20,
        num_experts=4, **SIZES,
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config)


def qwen3_moe() -> Any:
    config = transformers.Qwen3MoeConfig(
        intermediate_size=32, moe_intermediate_size=24, num_experts=5, head_dim=8, **SIZES
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss() -> Any:
    """Experts (experts, in, out), gate and up in turns, biases, and an activation of its own."""
    config = transformers.GptOssConfig(
        intermediate_size=24, num_local_experts=4, head_dim=8, **SIZES
    )
    return transformers.GptOssForCausalLM(config)


FAMILIES = {"mixtral": mixtral, "qwen2_moe": qwen2_moe, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}


def made(family: str) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # routers that decide, experts that differ
            parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return made("mixtral")


def run(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS).logits
    return found


def exact(model: Any) -> Any:
    """A copy in float64, one expert after the other: the grouped product takes no float64."""
    dense = copy.deepcopy(model).double()
    dense.set_experts_implementation("eager")
    return dense


Tensors = dict[str, Tensor]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a PEFT folder; a field of ... is left out."""

    def make(tensors: Mapping[str, Tensor], **config: Any) -> Path:
        folder = tmp_path / f"adapter{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        known = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "peft_version": "0.21.2"} | config
        kept = {name: value for name, value in known.items() if value is not ...}
        (folder / "adapter_config.json").write_text(json.dumps(kept))
        held = {key: value.contiguous() for key, value in tensors.items()}
        save_file(held, folder / "adapter_model.safetensors")
        return folder

    return make


def fused(model: Any, seed: int, rank: int = 2) -> Tensors:
    """Factors for both fused parameters and the router of every layer."""
    draw = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for layer, block in enumerate(model.model.layers):
        start = f"base_model.model.model.layers.{layer}.mlp"
        experts = block.mlp.experts
        for key, weight in {
            f"{start}.experts.base_layer": experts.gate_up_proj,
            f"{start}.experts": experts.down_proj,
            f"{start}.gate": block.mlp.gate.weight[None],
        }.items():
            count, n_out, n_in = weight.shape
            tensors[f"{key}.lora_A.weight"] = torch.randn(count * rank, n_in, generator=draw) / 3
            tensors[f"{key}.lora_B.weight"] = torch.randn(n_out, rank * count, generator=draw) / 3
    return tensors


def single(model: Any, seed: int, rank: int = 2, old: str = "block_sparse_moe") -> Tensors:
    """Factors for every matrix of every expert, in the names of transformers 4."""
    draw = torch.Generator().manual_seed(seed)
    hidden, inner = model.config.hidden_size, model.config.intermediate_size
    tensors: Tensors = {}
    for layer in range(model.config.num_hidden_layers):
        for expert in range(model.config.num_local_experts):
            for name in ("w1", "w2", "w3"):
                ends = (inner, hidden) if name == "w2" else (hidden, inner)
                key = f"base_model.model.model.layers.{layer}.{old}.experts.{expert}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(rank, ends[0], generator=draw) / 3
                tensors[f"{key}.lora_B.weight"] = torch.randn(ends[1], rank, generator=draw) / 3
    return tensors


PARAMETERS = [GATE_UP, DOWN, ROUTER]
FUSED = {"target_modules": [], "target_parameters": PARAMETERS}
SINGLE = {"target_modules": ["w1", "w2", "w3"]}


def apply_fused(dense: Any, tensors: Tensors, scale: float) -> None:
    """W_e + s B_e A_e, float64: row e r + i of A, and column i experts + e of B, are the i-th of
    expert e."""
    for layer, block in enumerate(dense.model.layers):
        start = f"base_model.model.model.layers.{layer}.mlp"
        experts = block.mlp.experts
        for key, weight in {
            f"{start}.experts.base_layer": experts.gate_up_proj,
            f"{start}.experts": experts.down_proj,
            f"{start}.gate": block.mlp.gate.weight[None],
        }.items():
            a = tensors[f"{key}.lora_A.weight"].double()
            b = tensors[f"{key}.lora_B.weight"].double()
            count = len(weight)
            rank = len(a) // count
            for expert in range(count):
                mine = a[expert * rank : (expert + 1) * rank]
                weight[expert] += scale * b[:, expert::count] @ mine


def apply_single(dense: Any, tensors: Tensors, scale: float) -> None:
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        parts = key.split(".")
        layer, expert, name = int(parts[4]), int(parts[7]), parts[8]
        delta = tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
        experts = dense.model.layers[layer].mlp.experts
        half = dense.config.intermediate_size
        both = experts.gate_up_proj[expert]
        rows = {"w1": both[:half], "w3": both[half:]}
        weight = experts.down_proj[expert] if name == "w2" else rows[name]
        weight += scale * delta


def close(found: Tensor, dense: Any) -> None:
    expected = run(dense)
    scale = expected.abs().max().clamp(min=1)
    torch.testing.assert_close(found.double() / scale, expected / scale, atol=3e-6, rtol=0)


drawn = st.lists(
    st.tuples(
        st.sampled_from(["fused", "single"]),
        st.integers(1, 3),
        st.integers(0, 99),
        st.floats(-1.5, 1.5).map(lambda w: round(w, 2)).filter(bool),
    ),
    min_size=1,
    max_size=3,
)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=drawn)
def test_every_token_meets_the_updates_of_its_own_expert(
    model: Any, write: Callable[..., Path], rows: list[Any]
) -> None:
    """Fused factors, a router's, and those of single experts at once, whatever their ranks: the
    live forward is that of a dense model in float64 whose weights are the sums."""
    dense = exact(model)
    folders, weights = {}, {}
    for place, (form, rank, seed, weight) in enumerate(rows):
        make, config = (fused, FUSED) if form == "fused" else (single, SINGLE)
        tensors = make(model, seed, rank)
        folders[f"a{place}"] = write(tensors, r=rank, **config)
        weights[f"a{place}"] = weight
        with torch.no_grad():
            apply = apply_fused if form == "fused" else apply_single
            apply(dense, tensors, weight * 6 / rank)
    with attach(model, folders) as adapters:
        adapters.activate(weights)
        close(run(model), dense)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "parameters", [[GATE_UP, DOWN], [DOWN], [GATE_UP], ["gate_up_proj", "down_proj"]]
)
def test_the_logits_are_pefts(family: str, parameters: list[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = made(family)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=parameters,
        rank_pattern={r".*\.down_proj": 2}, alpha_pattern={"mlp.experts.gate_up_proj": 7},
        use_rslora=True,
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
        expected = wrapped(input_ids=TOKENS).logits
        wrapped.save_pretrained(str(tmp_path))
    plain = wrapped.unload()
    assert not torch.allclose(run(plain), expected, atol=1e-2)
    with attach(plain, tmp_path) as adapters:
        torch.testing.assert_close(run(plain), expected, atol=2e-5, rtol=0)
        held = load_file(tmp_path / "adapter_model.safetensors")
        assert {row.tensor for row in adapters.report[str(tmp_path)]} == held.keys()


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_factors_of_single_experts_are_those_of_their_rows(
    family: str, write: Callable[..., Path]
) -> None:
    """Where the names of transformers 4 differ by the expert's number only."""
    model = made(family)
    draw = torch.Generator().manual_seed(1)
    key = "base_model.model.model.layers.{}.mlp.experts.{}.up_proj"
    tensors: Tensors = {}
    dense = exact(model)
    for layer, block in enumerate(dense.model.layers):
        weight = block.mlp.experts.gate_up_proj
        for expert in range(len(weight)):
            a, b = torch.randn(2, 16, generator=draw), torch.randn(24, 2, generator=draw)
            tensors[f"{key.format(layer, expert)}.lora_A.weight"] = a
            tensors[f"{key.format(layer, expert)}.lora_B.weight"] = b
            with torch.no_grad():
                weight[expert, 24:] += 3 * b.double() @ a.double()
    target = r".*experts\.\d+\.up_proj"
    with attach(model, write(tensors, target_modules=target)) as adapters:
        close(run(model), dense)
        adapters.activate({})
        assert torch.equal(run(model), run(made(family)))


def test_detach_leaves_the_base_bit_for_bit(model: Any, write: Callable[..., Path]) -> None:
    before, names = run(model), [name for name, _ in model.named_modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with attach(model, [write(fused(model, 1), **FUSED)]):
        assert not torch.equal(run(model), before)
        assert [name for name, _ in model.named_modules()] == names
        held = model.state_dict()
        assert held.keys() == state.keys()
        assert all(torch.equal(held[name], state[name]) for name in state)
    assert torch.equal(run(model), before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_no_tensor_is_as_large_as_the_experts(model: Any, write: Callable[..., Path]) -> None:
    folder = write(fused(model, 1), **FUSED)
    largest = model.model.layers[0].mlp.experts.down_proj.numel()

    def large() -> int:
        gc.collect()
        held = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
        return len({each.data_ptr() for each in held if each.numel() >= largest})

    before = large()
    with attach(model, {"a": folder, "b": write(fused(model, 2), **FUSED)}):
        run(model)
        assert large() == before


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_experts_stay_dense_on_a_quantized_base(
    model: Any, write: Callable[..., Path], tmp_path: Path, quantization: str
) -> None:
    """bitsandbytes takes linear layers only: what the experts add is what it was."""
    model.save_pretrained(tmp_path / "base")
    config: Any = transformers.BitsAndBytesConfig
    made_of = config(load_in_8bit=True) if quantization == "int8" else config(load_in_4bit=True)
    small = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=made_of, dtype=torch.float32
    ).eval()
    experts = small.model.layers[0].mlp.experts
    x = torch.randn(7, 16)
    chosen, share = torch.tensor([[0, 3]] * 7), torch.tensor([[0.7, 0.3]] * 7)
    tensors = fused(model, 1)
    dense = exact(model)
    with torch.no_grad():
        apply_fused(dense, tensors, 3)
        expected = dense.model.layers[0].mlp.experts(x.double(), chosen, share.double())
        with attach(small, [write(tensors, **FUSED)]):
            found = experts(x, chosen, share)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def rotten(tensors: Tensors, key: str, change: str) -> Tensors:
    value = tensors[key]
    if change == "renamed":
        return rotten(tensors, key, "missing") | {key.replace("layers", "lairs"): value}
    if change == "missing":
        return {k: v for k, v in tensors.items() if k != key}
    return tensors | {key: value[:-1] if change == "shorter" else value[:, :-1]}


KEYS = {
    "fused": "base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight",
    "down": "base_model.model.model.layers.0.mlp.experts.lora_B.weight",
    "router": "base_model.model.model.layers.0.mlp.gate.lora_A.weight",
    "single": "base_model.model.model.layers.1.block_sparse_moe.experts.3.w2.lora_B.weight",
}


@pytest.mark.parametrize("change", ["renamed", "missing", "shorter", "narrower"])
@pytest.mark.parametrize("which", KEYS)
def test_a_tensor_that_is_renamed_missing_or_reshaped_is_named(
    model: Any, write: Callable[..., Path], which: str, change: str
) -> None:
    make, config = (single, SINGLE) if which == "single" else (fused, FUSED)
    folder = write(rotten(make(model, 1), KEYS[which], change), **config)
    before = run(model)
    module = KEYS[which].removeprefix("base_model.model.").partition(".lora_")[0]
    with pytest.raises(AdapterError) as caught:
        attach(model, [folder])
    assert module.removesuffix(".base_layer") in str(caught.value)
    assert torch.equal(run(model), before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_parameters": ...}, "target_parameters does not name"),
        ({"target_parameters": [GATE_UP, ROUTER]}, "experts"),
        ({"target_parameters": [*PARAMETERS, "mlp.up.weight"]}, "no match for mlp.up.weight"),
        ({"target_parameters": 3}, "target_parameters is 3"),
        ({"r": 3}, "r = 3 for each expert"),
        ({"use_dora": True}, "magnitude"),
    ],
)
def test_a_config_that_does_not_fit_its_tensors_is_refused(
    model: Any, write: Callable[..., Path], config: dict[str, Any], message: str
) -> None:
    folder = write(fused(model, 1), **(FUSED | config))
    with pytest.raises(AdapterError, match=message):
        attach(model, [folder], strict=True)


def test_a_missing_expert_is_named(model: Any, write: Callable[..., Path]) -> None:
    tensors = {k: v for k, v in single(model, 1).items() if ".experts.2.w3." not in k}
    with pytest.raises(MismatchError, match=r"layers\.1\.block_sparse_moe\.experts\.2\.w3"):
        attach(model, [write(tensors, **SINGLE)])


def transposed(tensors: Tensors, experts: int) -> Tensors:
    """The same updates as PEFT 0.18 wrote them: (experts, out, in) read as (experts, in, out)."""
    found = dict(tensors)
    for key in [key for key in tensors if "experts" in key and "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        a, b = tensors[key], tensors[other]
        rank = len(a) // experts
        found[key] = b.reshape(len(b), rank, experts).permute(2, 1, 0).reshape(-1, len(b))
        found[other] = a.reshape(experts, rank, -1).permute(2, 1, 0).reshape(a.shape[1], -1)
    return found


@pytest.mark.parametrize("version", ["0.18.1", "0.17.0", ...])
def test_older_factors_of_the_transpose_are_the_same_update(
    model: Any, write: Callable[..., Path], version: Any
) -> None:
    tensors = fused(model, 1)
    old = write(transposed(tensors, 4), **FUSED, peft_version=version)
    with attach(model, [write(tensors, **FUSED)]):
        expected = run(model)
    with attach(model, [old]):
        torch.testing.assert_close(run(model), expected, atol=2e-5, rtol=0)
    new = write(transposed(tensors, 4), **FUSED)
    with pytest.raises(MismatchError, match="shape-mismatch"):
        attach(model, [new])


def test_older_factors_of_a_square_weight_are_refused(write: Callable[..., Path]) -> None:
    """They may be those of the transpose, and nothing in the file says which."""
    config = transformers.MixtralConfig(intermediate_size=16, num_local_experts=4, **SIZES)
    model = transformers.MixtralForCausalLM(config).eval()
    tensors = fused(model, 1)
    with attach(model, [write(tensors, **FUSED)]):
        pass
    with pytest.raises(MismatchError, match="0.19.1 or newer, as the weight is square"):
        attach(model, [write(tensors, **FUSED, peft_version="0.18.0")])


@pytest.mark.parametrize("form", ["fused", "single"])
def test_check_and_the_identity_of_the_base_see_the_experts_in_its_files(
    model: Any, write: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    """A checkpoint keeps every expert's matrices apart, whatever the adapter calls them."""
    model.save_pretrained(tmp_path / "base")
    make, config = (fused, FUSED) if form == "fused" else (single, SINGLE)
    folder = write(make(model, 1), **config)
    base = read_base(tmp_path / "base")
    assert check(folder, base=base).verdict == "fits"
    names = touched(read_adapter(open_folder(folder)), base)
    experts = [name for name in base.tensors if ".experts." in name]
    routers = [name for name in base.tensors if "block_sparse_moe.gate" in name]
    assert len(experts) == 24
    assert names == sorted(experts + (routers if form == "fused" else []))


def test_a_router_of_transformers_4_is_the_same_matrix(
    model: Any, write: Callable[..., Path]
) -> None:
    new = {k: v for k, v in fused(model, 1).items() if ".gate." in k}
    old = {k.replace("mlp", "block_sparse_moe"): v for k, v in new.items()}
    with attach(model, [write(new, target_parameters=[ROUTER])]):
        expected = run(model)
    with attach(model, [write(old, target_modules=["block_sparse_moe.gate"])]):
        assert torch.equal(run(model), expected)


def leaves(model: Any) -> Iterator[str]:
    return (name for name, _ in model.named_modules() if name.endswith("q_proj"))


def test_experts_and_other_kinds_act_together(model: Any, write: Callable[..., Path]) -> None:
    """A gain on the attention, a LoRA on the experts, and a router: the sum of weights, and the
    gain around it, as in a dense model."""
    gains = {f"base_model.model.{name}.ia3_l": torch.full((16, 1), 1.5) for name in leaves(model)}
    config = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    ia3 = write(gains, **config, r=..., lora_alpha=...)
    tensors = fused(model, 3)
    dense = exact(model)
    with torch.no_grad():
        apply_fused(dense, tensors, 0.5 * 3)
        for layer in dense.model.layers:
            layer.self_attn.q_proj.weight *= 1.5
    with attach(model, {"gain": ia3, "experts": write(tensors, **FUSED)}) as adapters:
        adapters.activate({"gain": 1, "experts": 0.5})
        close(run(model), dense)


def test_rows_have_routers_of_their_own(model: Any, write: Callable[..., Path]) -> None:
    """Which gives more than one tensor."""
    parts = [{k: v for k, v in fused(model, seed).items() if ".gate." in k} for seed in (1, 2)]
    folders = {n: write(t, target_parameters=[ROUTER]) for n, t in zip("ab", parts, strict=True)}
    with attach(model, folders) as adapters:
        alone = [adapters.activate([name]) or run(model) for name in "ab"]
        adapters.activate(BatchSplit("a", "b", batch_sizes=[1, 2]))
        found = run(model)
    torch.testing.assert_close(found, torch.cat([alone[0][:1], alone[1][1:]]))
    assert (alone[0] - alone[1]).abs().max() > 1e-3

"""What `attach`, `activate` and `detach` promise on a live model."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapterkit.hub import attach, attached
from adapterkit.hub.compose.lowering import lower
from adapterkit.hub.compose.model import describe_model
from adapterkit.hub.locate import locate
from adapterkit.hub.quant import bnb4
from adapterkit.hub.read import read_adapter
from adapterkit.registry.errors import (
    AdapterWarning,
    ConflictError,
    DamagedError,
    InvalidError,
    MismatchError,
    NotFoundError,
)

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35], [8, 97, 93, 23, 84, 62]])
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}
INT8 = {"load_in_8bit": True}


@pytest.fixture(scope="module")
def load_llama(fixtures: Path) -> Callable[..., Any]:
    def load(name: str = "llama", **quantization: Any) -> Any:
        extra: dict[str, Any] = {}
        if quantization:
            extra = {
                "quantization_config": transformers.BitsAndBytesConfig(**quantization),
                "device_map": {"": "cpu"},
            }
        found = transformers.AutoModelForCausalLM.from_pretrained(
            fixtures / "bases" / name, dtype=torch.float32, **extra
        )
        return found.eval()

    return load


@pytest.fixture
def llama(load_llama: Callable[..., Any]) -> Any:
    return load_llama()


@pytest.fixture
def case(fixtures: Path) -> Callable[[str], Path]:
    return lambda name: fixtures / "cases" / f"llama.{name}" / "adapter"


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, the parts of quantized ones read directly: `state_dict()` would
    convert them."""
    found: dict[str, Tensor] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[name] = tensor.data.clone()
        if (state := getattr(tensor, "quant_state", None)) is not None:
            parts = {"absmax": state.absmax, "code": state.code, "offset": state.offset}
            if state.nested:
                parts |= {"absmax2": state.state2.absmax, "code2": state.state2.code}
            found |= {f"{name}:{part}": v.clone() for part, v in parts.items() if v is not None}
    for name, module in model.named_modules():
        for part in ("CB", "SCB"):
            for owner in (getattr(module, "state", None), getattr(module, "weight", None)):
                if isinstance(value := getattr(owner, part, None), Tensor):
                    found[f"{name}:{part}"] = value.clone()
    return found


def structure_of(model: nn.Module) -> dict[str, Any]:
    """Names, classes, forwards and hooks of all modules."""
    return {
        name: (
            type(module),
            vars(module).get("forward"),
            sorted(key for key in vars(module)),
            len(module._forward_hooks) + len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    }


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("quantization", [{}, NF4, INT8], ids=["fp32", "nf4", "int8"])
def test_detach_restores_the_base_bit_for_bit(
    load_llama: Callable[..., Any], case: Callable[[str], Path], quantization: dict[str, Any]
) -> None:
    """Compared with the same base run without us: bitsandbytes itself changes what it stores."""
    untouched, model = load_llama(**quantization), load_llama(**quantization)
    expected = run(untouched)
    structure = structure_of(model)
    names = ["dora", "lora_qv", "lora_modules_to_save", "lora_tokens", "lora_embedding"]
    sources = {name: case(name) for name in (*names, "rslora_patterns")}
    adapters = attach(model, sources)
    assert (run(model) - expected).abs().max() > 0.1
    adapters.activate({"dora": -1.5, "lora_modules_to_save": 0.5})
    run(model)
    adapters.detach()
    assert structure_of(model) == structure
    assert torch.equal(run(model), expected)
    assert equal(state_of(model), state_of(untouched))
    assert attached(model) is None


def test_names_classes_and_state_dict_stay_as_they_were_while_attached(
    llama: Any, case: Callable[[str], Path]
) -> None:
    names, classes = list(llama.state_dict()), {n: type(m) for n, m in llama.named_modules()}
    with attach(llama, [case("dora"), case("lora_modules_to_save")]):
        run(llama)
        assert list(llama.state_dict()) == names
        assert {n: type(m) for n, m in llama.named_modules()} == classes


@pytest.mark.parametrize("quantization", [{}, NF4], ids=["fp32", "nf4"])
@pytest.mark.parametrize(
    "name", ["lora_qv", "rslora_patterns", "dora", "lora_tokens", "lora_embedding"]
)
def test_the_same_adapter_plus_and_minus_cancels(
    load_llama: Callable[..., Any],
    case: Callable[[str], Path],
    quantization: dict[str, Any],
    name: str,
) -> None:
    model = load_llama(**quantization)
    with attach(model, {"a": case("dora_rslora"), "b": case(name), "c": case(name)}) as adapters:
        adapters.activate({"a": 1})
        alone = run(model)
        adapters.activate({"a": 1, "b": 1, "c": -1})
        torch.testing.assert_close(run(model), alone, atol=1e-5, rtol=0)


def test_lora_bias_cancels_too(fixtures: Path) -> None:
    base = fixtures / "bases" / "qwen2"
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    biased = fixtures / "cases" / "qwen2.lora_bias_param" / "adapter"
    with attach(model, dict.fromkeys("abc", biased)) as adapters:
        adapters.activate(["a"])
        alone = run(model)
        adapters.activate({"a": 1, "b": 1, "c": -1})
        torch.testing.assert_close(run(model), alone, atol=1e-5, rtol=0)
        adapters.activate({"a": 1, "b": 1})
        assert (run(model) - alone).abs().max() > 0.1


def test_a_replaced_head_at_weight_one_is_the_files_tensor(
    llama: Any, case: Callable[[str], Path]
) -> None:
    """Bit for bit: the logits are those of the tensor itself, not of T0 + (T - T0)."""
    source = case("lora_modules_to_save")
    head = load_file(source / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    seen: list[Tensor] = []
    llama.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with attach(llama, [source]):
        found = run(llama)
    assert torch.equal(found, seen[0] @ head.T) or torch.equal(
        found, nn.functional.linear(seen[0], head)
    )


def test_weights_are_linear_in_a_replaced_head(llama: Any, case: Callable[[str], Path]) -> None:
    with attach(llama, {"head": case("lora_modules_to_save")}) as adapters:
        adapters.remove("head")
        adapters.add("head", case("lora_modules_to_save"))
        seen: dict[float, Tensor] = {}
        hidden = torch.randn(2, 3, llama.config.hidden_size)
        for weight in (0.0, 0.5, 1.0):
            adapters.activate({"head": weight})
            seen[weight] = llama.lm_head(hidden)
    torch.testing.assert_close(seen[0.5], (seen[0.0] + seen[1.0]) / 2, atol=1e-5, rtol=0)


def test_names_left_out_are_inactive(llama: Any, case: Callable[[str], Path]) -> None:
    base = run(llama)
    with attach(llama, {"a": case("lora_qv"), "b": case("dora")}) as adapters:
        assert dict(adapters.active) == {"a": 1.0, "b": 1.0}
        adapters.activate({"a": 1.0})
        only_a = run(llama)
        adapters.activate({})
        assert torch.equal(run(llama), base)
        adapters.activate(["a"])
        assert torch.equal(run(llama), only_a)


def test_remove_keeps_the_others_active(llama: Any, case: Callable[[str], Path]) -> None:
    with attach(llama, {"a": case("lora_qv"), "b": case("dora")}) as adapters:
        adapters.activate({"a": 0.5})
        expected = run(llama)
        adapters.activate({"a": 0.5, "b": 1})
        adapters.remove("b")
        assert torch.equal(run(llama), expected)
        assert adapters.names == ("a",)


def test_every_tensor_of_the_file_is_in_the_report(
    llama: Any, case: Callable[[str], Path], fixtures: Path
) -> None:
    sources = {name: case(name) for name in ("dora", "lora_embedding", "lora_modules_to_save")}
    with attach(llama, sources) as adapters:
        for name, source in sources.items():
            keys = load_file(source / "adapter_model.safetensors").keys()
            assert sorted(row.tensor for row in adapters.report[name]) == sorted(keys)
        kinds = {row.role: row.primitive for row in adapters.report["dora"]}
        assert kinds == {
            "A": "LowRank+RowScale",
            "B": "LowRank+RowScale",
            "magnitude": "LowRank+RowScale",
        }
        (table,) = (row for row in adapters.report["lora_embedding"] if row.role == "table")
        assert table.primitive == "copy"


def test_a_tensor_that_nothing_applies_stops_the_load(
    llama: Any, case: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last net: a kind that forgets one of its tensors is caught, not obeyed."""
    from adapterkit.hub.kinds.lora import Lora

    forgetful = Lora.lower

    def lower_without_b(self: Lora, fields: Any, site: Any, p: Mapping[str, Tensor]) -> Any:
        held = dict(p)
        return forgetful(self, fields, site, held)

    monkeypatch.setattr(Lora, "lower", lower_without_b)
    with pytest.raises(MismatchError, match=r"nothing applies .*lora_A"):
        attach(llama, [case("lora_qv")])


def test_a_wrong_base_raises_with_all_findings_before_anything_is_copied(
    load_llama: Callable[..., Any],
    case: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_llama("llama_wide")
    monkeypatch.setattr(
        "adapterkit.hub.tensors.read_tensor", lambda _: pytest.fail("read")
    )
    with pytest.raises(MismatchError) as caught:
        attach(model, [case("lora_qv")])
    # q_proj's A and B and v_proj's A in each layer; v_proj has as many outputs on both
    assert str(caught.value).count("shape-mismatch") == 6


def test_other_weights_of_the_same_shape_are_refused_when_an_identity_was_recorded(
    load_llama: Callable[..., Any], case: Callable[[str], Path], fixtures: Path
) -> None:
    from adapterkit.hub import ingest
    from adapterkit.registry import Registry

    with Registry() as registry:
        ingest.add(registry, case("lora_qv"), "sql", base=fixtures / "bases" / "llama")
        for quantization in ({}, NF4, INT8):
            with warnings.catch_warnings():
                warnings.simplefilter("error", AdapterWarning)
                attach(load_llama(**quantization), {"sql": "sql"}, registry=registry).detach()
            with pytest.raises(MismatchError, match="other-weights"):
                attach(
                    load_llama("llama_reseed", **quantization), {"sql": "sql"}, registry=registry
                )


def test_strict_turns_a_doubt_into_an_error(llama: Any, case: Callable[[str], Path]) -> None:
    with pytest.warns(AdapterWarning, match="base-not-recorded"):
        attach(llama, [case("lora_qv")]).detach()
    with pytest.raises(MismatchError, match="base-not-recorded"):
        attach(llama, [case("lora_qv")], strict=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(
    llama: Any, case: Callable[[str], Path], tmp_path: Path, value: float
) -> None:
    tensors = load_file(case("lora_qv") / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    tensors[key][1, 2] = value
    (tmp_path / "adapter_config.json").write_bytes(
        (case("lora_qv") / "adapter_config.json").read_bytes()
    )
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    before = run(llama)
    with pytest.raises(DamagedError, match="lora_A"):
        attach(llama, [tmp_path])
    assert torch.equal(run(llama), before)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None, True])
def test_weights_must_be_finite_numbers(
    llama: Any, case: Callable[[str], Path], weight: Any
) -> None:
    with attach(llama, {"a": case("lora_qv")}) as adapters:
        before = run(llama)
        with pytest.raises(InvalidError, match="finite"):
            adapters.activate({"a": weight})
        assert torch.equal(run(llama), before)


def test_unknown_and_repeated_names_are_refused(llama: Any, case: Callable[[str], Path]) -> None:
    with attach(llama, {"a": case("lora_qv")}) as adapters:
        with pytest.raises(NotFoundError, match="attached as b"):
            adapters.activate({"b": 1})
        with pytest.raises(ConflictError, match="already"):
            adapters.add("a", case("dora"))
        with pytest.raises(ConflictError, match="already"):
            attach(llama, {"b": case("dora")})


def test_a_failed_add_changes_nothing(
    llama: Any, case: Callable[[str], Path], fixtures: Path
) -> None:
    with attach(llama, {"a": case("lora_qv")}) as adapters:
        before = run(llama)
        with pytest.raises(MismatchError):
            adapters.add("b", fixtures / "cases" / "gpt2.lora_c_attn" / "adapter")
        assert adapters.names == ("a",)
        assert torch.equal(run(llama), before)


def test_dropping_the_model_drops_its_adapters(
    load_llama: Callable[..., Any], case: Callable[[str], Path]
) -> None:
    model = load_llama()
    attach(model, [case("lora_qv")])
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


def test_a_peft_model_is_refused_with_the_line_that_unwraps_it(
    llama: Any, case: Callable[[str], Path]
) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.PeftModel.from_pretrained(llama, case("lora_qv"))
    for model in (wrapped, wrapped.get_base_model()):
        with pytest.raises(InvalidError, match="wrapped by PEFT") as caught:
            attach(model, [case("dora")])
        assert caught.value.hint == "model = model.unload()"
    attach(wrapped.unload(), [case("dora")]).detach()


def test_generate_uses_the_adapters(llama: Any, case: Callable[[str], Path]) -> None:
    """With the cache and beams: the same tokens as a model whose weights hold the delta."""
    merged = copy.deepcopy(llama)
    tensors = load_file(case("lora_qv") / "adapter_model.safetensors")
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            merged.get_submodule(name).weight.data += 2.0 * b @ a
    settings = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    with attach(llama, [case("lora_qv")]):
        found = llama.generate(TOKENS, **settings)
    assert torch.equal(found, merged.generate(TOKENS, **settings))


def test_attaching_after_compiling_is_not_ignored(llama: Any, case: Callable[[str], Path]) -> None:
    """Code compiled before would not see forwards that are swapped later."""
    compiled = torch.compile(llama.model.layers[0].mlp, backend="eager")
    x = torch.randn(1, 4, llama.config.hidden_size)
    with torch.no_grad():
        before = compiled(x)
        with attach(llama, [case("rslora_patterns")]):
            inside = compiled(x)
            expected = llama.model.layers[0].mlp(x)
        after = compiled(x)
    torch.testing.assert_close(inside, expected)
    assert (inside - before).abs().max() > 1e-3
    torch.testing.assert_close(after, before)


def test_a_compiled_model_is_refused(llama: Any, case: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidError, match="compiled"):
        attach(torch.compile(llama), [case("lora_qv")])


def repack(model: nn.Module) -> Iterator[str]:
    """What bitsandbytes does on CPUs with AVX512-BF16, as far as anyone else can see."""
    for name, module in model.named_modules():
        if bnb4.claims(module):
            module.weight.quant_state.packing_format_for_cpu = True
            module.weight.data = module.weight.data.flip(0)
            yield name


def test_constants_of_repacked_weights_come_from_the_bases_files(
    load_llama: Callable[..., Any], case: Callable[[str], Path]
) -> None:
    """A second attach of a DoRA after a forward on such a CPU: PEFT reads garbage there."""
    adapter = read_adapter(locate(case("dora")))

    def scales(model: nn.Module) -> list[Tensor]:
        lowered = lower(adapter, describe_model(model), dict(model.named_modules()), None)
        return [p.g for made in lowered.updates.values() for p in made if hasattr(p, "g")]

    model = load_llama(**NF4)
    expected = scales(model)
    assert list(repack(model))
    found = scales(model)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    model.config._name_or_path = "moved away"
    with pytest.raises(MismatchError, match=r"layers\.0.*repacked"):
        scales(model)


@pytest.mark.parametrize(
    ("adapters", "said"),
    [
        (None, "expected names"),
        ({"a": 3}, "found 3"),
        ([b"x"], "found b'x'"),
        (3, "expected names"),
    ],
)
def test_what_is_no_source_is_refused(llama: Any, adapters: Any, said: str) -> None:
    with pytest.raises(InvalidError, match=said):
        attach(llama, adapters)


@pytest.mark.parametrize("weights", [None, 3, "a", {"a": 10**400}, {"a": "1"}])
def test_what_is_no_weight_is_refused(
    llama: Any, case: Callable[[str], Path], weights: Any
) -> None:
    with attach(llama, {"a": case("lora_qv")}) as adapters:
        with pytest.raises(InvalidError, match="finite numbers|expected names"):
            adapters.activate(weights)
        adapters.activate({"a": np.float32(0.5)})
        assert dict(adapters.active) == {"a": 0.5}


def test_options_that_do_not_exist_are_refused(llama: Any, case: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidError, match="no option bogus"):
        attach(llama, [case("lora_qv")], bogus=1)
    with pytest.raises(InvalidError, match="pfet"):
        attach(llama, [case("lora_qv")], dialect="pfet")


def test_a_detached_handle_touches_nothing_any_more(
    llama: Any, case: Callable[[str], Path]
) -> None:
    base = run(llama)
    first = attach(llama, {"a": case("lora_qv")})
    first.detach()
    for act in (lambda: first.add("b", case("dora")), lambda: first.activate({})):
        with pytest.raises(ConflictError, match="detached"):
            act()
    second = attach(llama, {"a": case("lora_qv")})
    first.detach()
    assert attached(llama) is second
    second.detach()
    assert torch.equal(run(llama), base)


def test_a_forward_wrapped_after_attach_survives_detach(
    llama: Any, case: Callable[[str], Path]
) -> None:
    base = run(llama)
    adapters = attach(llama, [case("lora_qv")])
    layer = llama.model.layers[0].self_attn.q_proj
    inner, calls = layer.forward, []

    def outer(x: Tensor) -> Tensor:
        calls.append(1)
        return inner(x)

    layer.forward = outer
    adapters.detach()
    assert torch.equal(run(llama), base)
    assert calls and vars(layer)["forward"] is outer


def test_a_copy_that_differs_from_the_saved_module_is_damage(
    llama: Any, case: Callable[[str], Path], tmp_path: Path
) -> None:
    source = case("lora_modules_to_save")
    tensors = load_file(source / "adapter_model.safetensors")
    head = tensors["base_model.model.lm_head.weight"]
    (tmp_path / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    wrapper = "base_model.model.lm_head.modules_to_save.weight"
    save_file(tensors | {wrapper: head.clone()}, tmp_path / "adapter_model.safetensors")
    attach(llama, [tmp_path]).detach()
    save_file(tensors | {wrapper: head + 1}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(DamagedError, match="modules_to_save"):
        attach(llama, [tmp_path])


def test_factors_too_large_for_half_precision_are_kept_in_float32(
    llama: Any, case: Callable[[str], Path], tmp_path: Path
) -> None:
    """A is a million times larger and B as much smaller: the same adapter."""
    source = case("lora_qv")
    tensors = load_file(source / "adapter_model.safetensors")
    scaled = {k: v * (1e6 if ".lora_A." in k else 1e-6) for k, v in tensors.items()}
    (tmp_path / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    save_file(scaled, tmp_path / "adapter_model.safetensors")
    half = llama.half()
    with attach(half, [source]):
        expected = run(half)
    with attach(half, [tmp_path]):
        torch.testing.assert_close(run(half), expected, atol=2e-2, rtol=2e-2)

"""Several methods in one adapter: each acts as it would alone, and all in one forward."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from adapterkit.hub import attach, check
from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.folder import read_base
from adapterkit.hub.findings import ERROR, Finding, listing
from adapterkit.hub.fit import fit
from adapterkit.hub.locate import locate
from adapterkit.hub.read import read_adapter
from adapterkit.hub.torchfile import read_torch
from adapterkit.registry.errors import AdapterError, DamagedError, InvalidError

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
Tensors = dict[str, torch.Tensor]
WIDTH, LAYERS = 64, 2


def bottleneck(place: str, **fields: Any) -> dict[str, Any]:
    return {
        "mh_adapter": place == "attention", "output_adapter": place == "output",
        "reduction_factor": 16, "non_linearity": "relu", "is_parallel": False, "scaling": 1.0,
        "original_ln_before": False, "original_ln_after": True, "ln_before": False,
        "ln_after": False, "residual_before_ln": True, "use_gating": False, **fields,
    }  # fmt: skip


LORA = {"architecture": "lora", "r": 2, "alpha": 3, "attn_matrices": ["q"]}
PREFIX = {"architecture": "prefix_tuning", "flat": True, "prefix_length": 3, "use_gating": False}
PARTS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "prefix": PREFIX,
    "attention": bottleneck("attention"),
    "output": bottleneck("output", is_parallel=True, scaling=2.0),
}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) / 4


def tensors_of(part: str) -> Tensors:
    torch.manual_seed(len(part))
    found: Tensors = {}
    if part == "prefix":
        where = "bert.prefix_tuning.prefix_tunings.task.self_prefix.control_trans"
        return {where: random(3 * LAYERS * 2 * WIDTH)}
    for layer in range(LAYERS):
        start = f"bert.encoder.layer.{layer}"
        if part == "lora":
            name = f"{start}.attention.self.query.loras.task"
            found |= {f"{name}.lora_A": random(2, WIDTH), f"{name}.lora_B": random(WIDTH, 2)}
        else:
            inside = "attention.output" if part == "attention" else "output"
            name = f"{start}.{inside}.adapters.task"
            found |= {
                f"{name}.adapter_down.0.weight": random(4, WIDTH),
                f"{name}.adapter_down.0.bias": random(4),
                f"{name}.adapter_up.weight": random(WIDTH, 4),
                f"{name}.adapter_up.bias": random(WIDTH),
            }
    return found


def write(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Path:
    folder.mkdir()
    around = {
        "config": config, "hidden_size": WIDTH, "model_class": "BertForSequenceClassification",
        "model_name": "bert", "model_type": "bert", "name": "task", "version": "adapters.1.3.0",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(around))
    torch.save(tensors, folder / "pytorch_adapter.bin")
    return folder


def union(folder: Path, *parts: str, **fields: Any) -> Path:
    tensors = {key: t for part in parts for key, t in tensors_of(part).items()}
    config = {"architecture": "union", "configs": [PARTS[part] for part in parts], **fields}
    return write(folder, config, tensors)


@pytest.fixture(scope="module")
def bert(fixtures: Path) -> Any:
    found = transformers.AutoModelForSequenceClassification.from_pretrained(
        fixtures / "bases" / "bert", attn_implementation="eager"
    )
    return found.eval()


@pytest.fixture(scope="module")
def base(fixtures: Path) -> Base:
    return read_base(fixtures / "bases" / "bert")


@pytest.mark.parametrize(
    "parts",
    [("lora",), ("prefix", "output"), ("prefix", "output", "lora"), ("output", "attention"),
     ("attention", "lora", "output", "prefix")],
    ids="+".join,
)  # fmt: skip
def test_all_parts_act_in_one_forward(bert: Any, tmp_path: Path, parts: tuple[str, ...]) -> None:
    """As adapters of their own do that are active together."""
    single = {part: write(tmp_path / part, PARTS[part], tensors_of(part)) for part in parts}
    ids, mask = torch.arange(4, 16).reshape(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    with torch.no_grad():
        plain = bert(ids, attention_mask=mask).logits
        with attach(bert, single):
            want = bert(ids, attention_mask=mask).logits
        with attach(bert, {"one": union(tmp_path / "one", *parts)}) as adapters:
            found = bert(ids, attention_mask=mask).logits
            bound = {n for row in adapters.report["one"] for n in row.primitive.split("+")}
        assert torch.equal(bert(ids, attention_mask=mask).logits, plain)
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(found, plain, atol=1e-3)
    names = {"lora": "LowRank", "prefix": "PrefixKV"}
    assert bound == {names.get(part, "Bottleneck") for part in parts}


def test_a_part_that_takes_no_weight_gives_the_union_none(bert: Any, tmp_path: Path) -> None:
    standing = union(tmp_path / "one", "prefix", "lora")
    with (
        attach(bert, {"one": standing}) as adapters,
        pytest.raises(InvalidError, match=r"one=0\.5"),
    ):
        adapters.activate({"one": 0.5})
    with attach(bert, {"one": union(tmp_path / "two", "output", "lora")}) as adapters:
        adapters.activate({"one": 0.5})


def test_every_tensor_belongs_to_one_part(base: Base, tmp_path: Path) -> None:
    """One that is removed, renamed or reshaped, in any part, is named."""
    folder = union(tmp_path / "a", "prefix", "attention", "output", "lora")
    path = folder / "pytorch_adapter.bin"
    whole = torch.load(path)
    assert not listing(check(folder, base=base).errors)
    for key, tensor in whole.items():
        rest = {other: t for other, t in whole.items() if other != key}
        for change in (rest, rest | {f"{key}_": tensor}, rest | {key: torch.cat([tensor, tensor])}):
            torch.save(change, path)
            assert errors(folder, base), key


def errors(folder: Path, base: Base) -> list[Finding]:
    return [f for f in fit(read_adapter(locate(folder)), base) if f.severity == ERROR]


def test_tensors_of_a_part_the_config_does_not_have_are_strays(base: Base, tmp_path: Path) -> None:
    tensors = tensors_of("lora") | tensors_of("output")
    folder = write(tmp_path / "a", {"architecture": "union", "configs": [LORA]}, tensors)
    found = {f.tensor for f in errors(folder, base) if f.code == "unexpected-tensor"}
    assert found == set(tensors_of("output"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"configs": None}, "configs is None"),
        ({"configs": []}, r"configs is \[\]"),
        ({"configs": [LORA] * 17}, "1 to 16"),
        ({"configs": [{**LORA, "r": "2"}]}, r"configs\[0\]: r is '2'"),
    ],
)
def test_a_config_that_is_no_list_of_configs_is_damaged(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path / "a", {"architecture": "union", **config}, tensors_of("lora"))
    with pytest.raises(DamagedError, match=message):
        read_adapter(locate(folder))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (3, "3 among them"),
        ({"architecture": "union", "configs": [LORA]}, "union"),
        ({"architecture": "mtl_lora"}, "mtl_lora"),
        ({**LORA, "layer_dropout": 1}, "layer_dropout"),
        ({**PREFIX, "leave_out": [1]}, "leave_out"),
        ({**LORA, "vera_b": 0.0, "vera_d": 0.1}, "square_vera"),
    ],
)
def test_a_part_that_cannot_be_applied_is_refused_by_name(
    tmp_path: Path, part: object, message: str
) -> None:
    shared = {f"bert.shared_parameters.task.lora_{x}": random(2, 2) for x in "AB"}
    config = {"architecture": "union", "configs": [PARTS["output"], part]}
    folder = write(tmp_path / "a", config, tensors_of("output") | shared)
    with pytest.raises(AdapterError, match=message):
        read_adapter(locate(folder)).require_sound()


def test_a_listing_says_what_is_in_it(tmp_path: Path) -> None:
    from adapterkit.hub import describe

    info = describe(union(tmp_path / "a", "prefix", "output", "lora"))
    assert info.kind == "union"
    assert info.variant == "prefix tuning + parallel bottleneck + LoRA"
    assert sorted(info.ranks) == [2, 4] and info.alphas == (3.0,)


def test_the_copies_under_every_layer_are_read_once(fixtures: Path) -> None:
    """The library writes a prefix again in each layer; all have to say the same."""
    folder = fixtures / "cases" / "bert.ah_mam" / "adapter"
    adapter = read_adapter(locate(folder))
    stored = read_torch(locate(folder).files["pytorch_adapter.bin"]).tensors
    repeated = [f.tensor for f in adapter.findings if f.code == "repeated-tensor"]
    assert repeated and len(repeated) + len(adapter.tensors) == len(stored)

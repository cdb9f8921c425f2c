"""What is written in another tool's words: read back it is the same adapter, and PEFT, where it is
the reader, gives the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_parity as parity
import torch
from safetensors.torch import load_file, save_file

from adapterkit.hub import attach, ingest
from adapterkit.hub.describe import tensors_root
from adapterkit.hub.exporting import exported
from adapterkit.hub.formats.safetensors_write import Part, dump
from adapterkit.hub.offline import NeedsBaseError
from adapterkit.hub.read import read_adapter
from adapterkit.hub.sources import open_folder
from adapterkit.registry import Registry
from adapterkit.registry.errors import AdapterError, InvalidError

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

DATA: Path = parity.DATA
CASES = [
    case
    for case in parity.CASES
    if case["operation"]["op"] == "forward"
    and len(case["adapters"]) == 1
    and "repair_or_refuse" not in case["tags"]
    and not case["operation"].get("resize_token_embeddings")
]
HUB = [case for case in CASES if case["adapters"][0]["format"] == "adapters"]
# Tools whose folders PEFT does not read, and what of theirs it has.
IN_PEFT = {
    "adapters": ("lora", "ia3"),
    "mlx-lm": ("lora",),
    "prefixtuning-li-liang": ("prefix_tuning",),
    "thudm-p-tuning-v2": ("p_tuning_v2",),
    "peft": ("lora", "rslora", "dora", "qlora", "adalora", "vera", "loha", "lokr", "ia3", "oft",
             "ln_tuning", "beft", "lora_embedding", "lora_trainable_tokens", "trainable_tokens",
             "prefix_tuning"),
}  # fmt: skip
# PEFT has no gates, no bias inside DoRA, and no such DoRA.
NOT_IN_PEFT = ("gating",)
READ = [
    case
    for case in CASES
    if case["kind"] in IN_PEFT.get(case["adapters"][0]["format"], ())
    and not any(word in case["id"] for word in NOT_IN_PEFT)
]


def source_of(case: dict[str, Any]) -> Path:
    return DATA / case["adapters"][0]["path"]


def base_of(case: dict[str, Any]) -> Path:
    return DATA / case["base_path"]


@pytest.mark.parametrize("case", READ, ids=lambda case: case["id"])
def test_peft_reads_what_other_tools_wrote(case: dict[str, Any], tmp_path: Path) -> None:
    folder = exported(source_of(case), "peft", base_of(case)).save(tmp_path / "peft")
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".md")[:2] == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    model = parity.model_for(case)
    with attach(model, [folder]):
        found = parity.logits(model, case)
    settings = json.dumps(case["base_load"], sort_keys=True)
    theirs = peft.PeftModel.from_pretrained(
        parity.model_of.__wrapped__(case["base_path"], settings), folder
    ).eval()
    other = parity.logits(theirs, case)
    other = other[:, -found.shape[1] :] if other.ndim == 3 else other
    torch.testing.assert_close(other, found, atol=parity_atol(case), rtol=0)
    with attach(model, [source_of(case)]):
        torch.testing.assert_close(found, parity.logits(model, case), atol=1e-5, rtol=0)


def parity_atol(case: dict[str, Any]) -> float:
    """Of the case: how far its reference is from float64, at least 1e-4."""
    atol: float = case["compare"]["atol"]
    return atol


@pytest.mark.parametrize("case", HUB, ids=lambda case: case["id"])
def test_what_the_library_wrote_comes_out_in_safetensors_key_by_key(
    case: dict[str, Any], tmp_path: Path
) -> None:
    """Every tensor of every file, heads and the copies that the library repeats among them."""
    from adapterkit.hub.formats.files import read_weights

    before = open_folder(source_of(case))
    folder = exported(source_of(case), "adapters", base_of(case)).save(tmp_path / "out")
    after = open_folder(folder)
    names = {"pytorch_adapter.bin": "adapter", "pytorch_model_head.bin": "model_head"}
    for path in before.files:
        if path.endswith((".bin", ".safetensors")):
            stem = names.get(path, path.removesuffix(".safetensors"))
            here, there = read_weights(before, path), load_file(folder / f"{stem}.safetensors")
            assert here.tensors.keys() == there.keys()
            assert all(t.read() == tobytes(there[key]) for key, t in here.tensors.items())
        elif path.endswith(".json"):
            assert json.loads((folder / path).read_text()) == json.loads(
                before.files[path].read(0, before.files[path].size)
            )
    one, two = read_adapter(before), read_adapter(after)
    assert (one.kind, one.fields, one.targets) == (two.kind, two.fields, two.targets)
    assert tensors_root(one.tensors) == tensors_root(two.tensors)


def tobytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("id", ["llama.lora_qv", "llama.lora_bin", "t5.lora", "t5.lora_ff"])
def test_a_lora_of_peft_is_one_of_the_library(id: str, tmp_path: Path) -> None:
    """Checked by reading it back: its config means exactly these modules."""
    found = [case for case in CASES if case["id"] == id]
    if not found:
        pytest.skip(f"{id} is not among the test data")
    (case,) = found
    folder = exported(source_of(case), "adapters", base_of(case)).save(tmp_path / "out")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["version"].startswith("adapters.") and config["config"]["architecture"] == "lora"
    model = parity.model_for(case)
    with attach(model, [folder]):
        parity.check_logits(parity.logits(model, case), case)


@pytest.mark.parametrize(
    ("id", "to", "words"),
    [
        ("llama.moslora_v10", "peft", "a fork of PEFT wrote"),
        ("bert.ah_seq_bn", "peft", "no type of PEFT has Bottleneck"),
        ("bert.ah_prefix", "peft", "leave positions as they are"),
        ("bert.bitfit_all", "peft", "replaced parts alone"),
        ("llama.dora", "adapters", "has no dora"),
        ("llama.lora_modules_to_save", "adapters", "has no replace.weight"),
        ("gpt2.lora_c_attn", "adapters", "cannot be written"),
        ("llama.loha", "adapters", "only a LoRA"),
    ],
)
def test_what_the_other_tool_does_not_have_is_refused_by_name(
    id: str, to: str, words: str, tmp_path: Path
) -> None:
    found = [case for case in CASES if case["id"] == id]
    if not found:
        pytest.skip(f"{id} is not among the test data")
    with pytest.raises(AdapterError, match=words):
        exported(source_of(found[0]), to, base_of(found[0]))
    with pytest.raises(InvalidError, match="cannot be written, only peft, adapters"):
        exported(source_of(found[0]), "gguf")


def test_a_base_is_asked_for_where_its_names_or_places_count() -> None:
    tools = ("prefixtuning-li-liang", "thudm-p-tuning-v2")
    for prefix in (case for case in CASES if case["adapters"][0]["format"] in tools):
        with pytest.raises(NeedsBaseError, match="places in its base"):
            exported(source_of(prefix), "peft")
    lora = next(c for c in CASES if c["id"] == "llama.lora_qv")
    with pytest.raises(InvalidError, match="the family and the layers of the base"):
        exported(source_of(lora), "adapters")


def test_a_tokenizer_and_a_card_go_along(tmp_path: Path) -> None:
    case = next(case for case in CASES if case["id"] == "llama.lora_qv")
    source = tmp_path / "source"
    source.mkdir()
    for path in source_of(case).iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "README.md").write_text("# mine\n")
    (source / "tokenizer.json").write_text("{}")
    with Registry(tmp_path / "home") as registry:
        ingest.add(registry, source, "mine")
        folder = exported("mine", "peft", registry=registry).save(tmp_path / "out")
    assert (folder / "README.md").read_text() == "# mine\n"
    assert (folder / "tokenizer.json").exists()
    weights = "adapter_model.safetensors"
    assert (folder / weights).stat().st_size > 0
    before, after = load_file(source / weights), load_file(folder / weights)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_same_tensors_are_the_same_bytes_and_any_reader_reads_them(tmp_path: Path) -> None:
    """Against the safetensors library, for every dtype and for empty and scalar shapes."""
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "half": torch.randn(3, 5, generator=draw).half(),
        "brain": torch.randn(7, generator=draw).bfloat16(),
        "double": torch.randn(2, 2, generator=draw).double(),
        "scalar": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "ü" * 9: torch.ones(1, dtype=torch.int64),
    }
    names = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
             torch.float32: "F32", torch.uint8: "U8", torch.int64: "I64"}  # fmt: skip
    parts = {k: Part(names[t.dtype], tuple(t.shape), tobytes(t)) for k, t in tensors.items()}
    data = dump(parts)
    assert data == dump(dict(reversed(list(parts.items()))))
    (tmp_path / "a.safetensors").write_bytes(data)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    save_file(tensors, tmp_path / "b.safetensors", {"format": "pt"})
    assert (tmp_path / "b.safetensors").stat().st_size == len(data)

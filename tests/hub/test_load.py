"""`load`: the model class, the labels, the vocabulary and the weights follow the adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapterkit.hub import attach, attached, ingest, load
from adapterkit.registry import Registry
from adapterkit.registry.errors import (
    AdapterWarning,
    InvalidError,
    MismatchError,
    NotFoundError,
)

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35]])


def copied(source: Path, folder: Path) -> None:
    """Without the modes of the files, which may be read-only."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("quantization", [None, "none", "nf4", "fp4", "int8"])
def test_load_is_the_base_and_attach(fixtures: Path, quantization: str | None) -> None:
    base, source = fixtures / "bases" / "llama", fixtures / "cases" / "llama.dora" / "adapter"
    model = load(base, {source: 0.5}, quantization=quantization)
    with attach(load(base, quantization=quantization), {"d": source}) as adapters:
        adapters.activate({"d": 0.5})
        expected = logits(adapters._model)
    assert torch.equal(logits(model), expected)
    handle = attached(model)
    assert handle is not None and dict(handle.active) == {str(source): 0.5}
    kinds = {type(module).__name__ for module in model.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"} == {
        None: set(), "none": set(), "nf4": {"Linear4bit"}, "fp4": {"Linear4bit"},
        "int8": {"Linear8bitLt"},
    }[quantization]  # fmt: skip


def test_four_bit_codes_are_kept_unpacked_on_a_cpu(fixtures: Path) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes would repack them at the first forward, with a loss."""
    model = load(fixtures / "bases" / "llama", quantization="nf4")
    layers = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_a_config_of_transformers_is_taken_as_it_is(fixtures: Path) -> None:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = load(fixtures / "bases" / "llama", quantization=config)
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    assert not state.nested


def test_an_unknown_quantization_is_refused(fixtures: Path) -> None:
    with pytest.raises(InvalidError, match="gptq"):
        load(fixtures / "bases" / "llama", quantization="gptq")


def test_a_reference_is_loaded_from_the_registry_and_its_identity_checked(fixtures: Path) -> None:
    source = fixtures / "cases" / "llama.lora_qv" / "adapter"
    with Registry() as registry:
        ingest.add(registry, source, "team/sql", base=fixtures / "bases" / "llama")
        model = load(fixtures / "bases" / "llama", {"team/sql": 1.0}, registry=registry)
        plain = load(fixtures / "bases" / "llama", [source])
        assert torch.equal(logits(model), logits(plain))
        with pytest.raises(MismatchError, match="other-weights"):
            load(fixtures / "bases" / "llama_reseed", {"team/sql": 1.0}, registry=registry)
        with pytest.raises(NotFoundError, match="team/nothing"):
            load(fixtures / "bases" / "llama", ["team/nothing"], registry=registry)


def test_all_misfits_are_named_before_the_base_is_loaded(
    fixtures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the base was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", never)
    sources = [fixtures / "cases" / f"llama.{name}" / "adapter" for name in ("lora_qv", "dora")]
    with pytest.raises(MismatchError) as caught:
        load(fixtures / "bases" / "llama_wide", sources)
    assert all(str(source) in str(caught.value) for source in sources)


def test_the_vocabulary_grows_only_when_asked(fixtures: Path, tmp_path: Path) -> None:
    source = grown(fixtures / "cases" / "llama.lora_qv" / "adapter", tmp_path / "grown", rows=264)
    with pytest.raises(MismatchError, match="vocabulary-resized"):
        load(fixtures / "bases" / "llama", [source])
    model = load(fixtures / "bases" / "llama", [source], resize=True)
    assert logits(model).shape[-1] == 264
    table = load_file(source / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    with torch.no_grad():
        assert torch.equal(model.lm_head(torch.eye(64)), table.T)


def grown(source: Path, folder: Path, rows: int) -> Path:
    """The adapter with the tables PEFT saves beside it when the vocabulary was resized."""
    copied(source, folder)
    tensors = load_file(source / "adapter_model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"base_model.model.{name}.weight"] = torch.randn(rows, 64)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def classifier(source: Path, folder: Path, labels: int) -> Path:
    """The adapter as one for sequence classification with its own head, as PEFT saves it."""
    copied(source, folder)
    config = json.loads((source / "adapter_config.json").read_text())
    config |= {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    tensors = load_file(source / "adapter_model.safetensors")
    tensors["base_model.model.score.weight"] = torch.randn(labels, 64)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_the_class_follows_the_task_and_the_labels_follow_the_head(
    fixtures: Path, tmp_path: Path
) -> None:
    """Loaded and compared with PEFT on the same base."""
    source = classifier(
        fixtures / "cases" / "llama.lora_qv" / "adapter", tmp_path / "cls", labels=5
    )
    model = load(fixtures / "bases" / "llama", [source])
    assert type(model).__name__ == "LlamaForSequenceClassification"
    model.config.pad_token_id = 0
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        fixtures / "bases" / "llama", num_labels=5, dtype=torch.float32
    )
    base.config.pad_token_id = 0
    reference = peft.PeftModel.from_pretrained(base, source).eval()
    torch.testing.assert_close(logits(model), logits(reference), atol=1e-5, rtol=0)


def test_a_head_that_nobody_trained_is_doubted(fixtures: Path, tmp_path: Path) -> None:
    source = tmp_path / "headless"
    copied(fixtures / "cases" / "llama.lora_qv" / "adapter", source)
    config = json.loads((source / "adapter_config.json").read_text()) | {"task_type": "SEQ_CLS"}
    (source / "adapter_config.json").write_text(json.dumps(config))
    from adapterkit.hub import check

    report = check(source, base=fixtures / "bases" / "llama")
    assert {finding.code for finding in report.warnings} >= {"untrained-head", "other-task"}


def test_an_own_tokenizer_is_mentioned(fixtures: Path, tmp_path: Path) -> None:
    source = tmp_path / "own"
    copied(fixtures / "cases" / "llama.lora_qv" / "adapter", source)
    (source / "tokenizer.json").write_text('{"model": {}}')
    with pytest.warns(AdapterWarning, match="tokenizer"):
        load(fixtures / "bases" / "llama", [source])

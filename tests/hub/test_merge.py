"""Merging: the laws of the sum, the files that come out, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapterkit.hub import attach, merge
from adapterkit.hub.bases.folder import read_base
from adapterkit.registry import Registry
from adapterkit.registry.errors import (
    AdapterWarning,
    ConflictError,
    InvalidError,
    MismatchError,
)

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
TINY = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
IDS = torch.arange(24).reshape(2, 12)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits.float()


def opened(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    loader = transformers.AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=dtype, **settings).eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`bases(tied=True, dtype=...)`: a tiny Llama on disk."""
    made: dict[str, Path] = {}

    def make(tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
        name = f"{tied}{dtype}"
        if name not in made:
            torch.manual_seed(0)
            config = transformers.LlamaConfig(**TINY, tie_word_embeddings=tied)
            made[name] = tmp_path_factory.mktemp("base")
            transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture(scope="module")
def adapters(
    tmp_path_factory: pytest.TempPathFactory, bases: Callable[..., Path]
) -> Callable[..., Path]:
    """`adapters("a", use_dora=True)`: a PEFT adapter of the tiny Llama, its factors drawn."""
    import peft

    made: dict[str, Path] = {}

    def make(seed: str, *, config: str = "LoraConfig", size: float = 0.3, **fields: Any) -> Path:
        name = f"{seed}{config}{size}{fields}"
        if name in made:
            return made[name]
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        wanted = {"target_modules": ["q_proj", "down_proj"], **fields}
        model = peft.get_peft_model(opened(bases()), getattr(peft, config)(**wanted))
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                drawn = torch.randn(parameter.shape, generator=generator) * size
                parameter.data = drawn + (1 if "ia3" in key else 0)
        made[name] = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(made[name])
        return made[name]

    return make


KINDS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"r": 4},
    "dora": {"r": 4, "use_dora": True},
    "ia3": {"config": "IA3Config", "feedforward_modules": ["down_proj"]},
    "loha": {"config": "LoHaConfig", "r": 2},
    "oft": {"config": "OFTConfig", "r": 0, "oft_block_size": 4},
    "tokens": {"r": 4, "trainable_token_indices": [3, 7]},
    "saved": {"r": 4, "modules_to_save": ["lm_head"]},
    "table": {"r": 4, "target_modules": ["embed_tokens", "v_proj"]},
}


# What a saved head does on a tied base is a test of its own.
EACH = [(kind, tied) for kind in KINDS for tied in (False, True) if (kind, tied) != ("saved", True)]


@pytest.mark.parametrize(("kind", "tied"), EACH)
def test_merge_then_run_is_attach_and_run(
    kind: str, tied: bool, bases: Any, adapters: Any, tmp_path: Path
):
    base, adapter = bases(tied=tied), adapters("a", **KINDS[kind])
    merge({str(adapter): 1.0}, base=base, out=tmp_path / "merged")
    model = opened(base)
    with attach(model, [adapter]):
        wanted = logits(model)
    assert (wanted - logits(model)).abs().max() > 1e-3
    torch.testing.assert_close(logits(opened(tmp_path / "merged")), wanted, atol=1e-5, rtol=0)


@settings(max_examples=12, deadline=None)
@given(
    chosen=st.lists(
        st.tuples(st.sampled_from(["lora", "dora", "ia3", "loha", "tokens"]),
                  st.sampled_from([1.0, -0.5, 0.7])),
        min_size=2, max_size=4, unique_by=lambda each: each[0],
    )
)  # fmt: skip
def test_any_mix_and_any_order_is_what_attaching_them_is(
    chosen: list[tuple[str, float]], bases: Any, adapters: Any, tmp_path_factory: Any
):
    base = bases()
    sources = {str(adapters("m", **KINDS[kind])): weight for kind, weight in chosen}
    out = tmp_path_factory.mktemp("mix")
    merge(sources, base=base, out=out)
    model = opened(base)
    with attach(model, {str(i): path for i, path in enumerate(sources)}) as handle:
        handle.activate({str(i): weight for i, weight in enumerate(sources.values())})
        wanted = logits(model)
    torch.testing.assert_close(logits(opened(out)), wanted, atol=2e-5, rtol=1e-5)


def test_an_adapter_taken_off_again_leaves_the_base(bases: Any, adapters: Any, tmp_path: Path):
    """a - a, for two folders with the same adapter: only the rounding of the sum is left."""
    adapter = adapters("a", r=4)
    again = shutil.copytree(adapter, tmp_path / "again")
    merge({str(adapter): 1.0, str(again): -1.0}, base=bases(), out=tmp_path / "merged")
    before = weights(bases())
    for name, tensor in weights(tmp_path / "merged").items():
        torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=0)


def test_weights_that_no_adapter_changes_keep_their_bytes(
    bases: Any, adapters: Any, tmp_path: Path
):
    base = bases(dtype=torch.bfloat16)
    merge([adapters("a", r=4)], base=base, out=tmp_path / "merged")
    before, after = weights(base), weights(tmp_path / "merged")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"model.layers.0.{end}.weight" for end in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert before.keys() == after.keys()


def test_the_result_is_rounded_once(bases: Any, adapters: Any, tmp_path: Path):
    """bf16(W + s1 B1 A1 + s2 B2 A2), not the bf16 of a bf16."""
    base = bases(dtype=torch.bfloat16)
    sources = {str(adapters("a", r=4)): 1.0, str(adapters("b", r=2)): -0.5}
    merge(sources, base=base, out=tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj"
    total = weights(base)[f"{name}.weight"].double()
    for (path, weight), rank in zip(sources.items(), (4, 2), strict=True):
        held = load_file(Path(path) / "adapter_model.safetensors")
        a, b = (held[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        total += weight * 8 / rank * b @ a
    found = weights(tmp_path / "merged")[f"{name}.weight"]
    assert (found == total.to(torch.bfloat16)).float().mean() > 0.99


def test_a_tied_head_gets_a_table_of_its_own_only_where_one_end_changes(
    bases: Any, adapters: Any, tmp_path: Path
):
    base = bases(tied=True)
    one = merge([adapters("a", **KINDS["table"])], base=base, out=tmp_path / "one")
    both = merge([adapters("a", **KINDS["tokens"])], base=base, out=tmp_path / "both")
    assert one.untied
    assert one.added == ("lm_head.weight",)
    assert not json.loads((tmp_path / "one/config.json").read_text())["tie_word_embeddings"]
    assert torch.equal(
        weights(tmp_path / "one")["lm_head.weight"], weights(base)["model.embed_tokens.weight"]
    )
    assert not both.untied
    assert "lm_head.weight" not in weights(tmp_path / "both")


def test_a_head_that_only_the_adapter_has_is_added(fixtures: Path, tmp_path: Path):
    """With the class and the number of labels that it is for."""
    import peft

    base = fixtures / "bases/llama"
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.config.pad_token_id = 0
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    ).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    report = merge([tmp_path / "adapter"], base=base, out=tmp_path / "merged")
    assert report.added == ("score.weight",)
    loader = transformers.AutoModelForSequenceClassification
    found = loader.from_pretrained(tmp_path / "merged", dtype=torch.float32, pad_token_id=0).eval()
    with torch.inference_mode():
        torch.testing.assert_close(found(IDS).logits, tuned(IDS).logits, atol=1e-5, rtol=0)


def test_shards_index_and_files_beside_the_weights_are_the_bases(fixtures: Path, tmp_path: Path):
    base = shutil.copytree(fixtures / "bases/llama_sharded", tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool.jinja").write_text("{{ tools }}")
    (base / "LICENSE").write_text("free")
    (base / "pytorch_model.bin").write_bytes(b"other weights")
    (base / "README.md").write_text("about the base")
    merge([fixtures / "cases/llama.lora_qv/adapter"], base=base, out=tmp_path / "merged")
    left = {"README.md", "pytorch_model.bin"}
    before, after = (
        {str(p.relative_to(top)) for p in top.rglob("*") if p.is_file()}
        for top in (base, tmp_path / "merged")
    )
    assert after == before - left | {"adapterkit.json"}
    index = [
        json.loads((top / "model.safetensors.index.json").read_text())
        for top in (base, tmp_path / "merged")
    ]
    assert index[0]["weight_map"] == index[1]["weight_map"]
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"):
        assert (base / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    assert read_base(tmp_path / "merged").config == read_base(base).config


def test_the_merged_model_says_what_it_is_made_of(bases: Any, adapters: Any, tmp_path: Path):
    report = merge({str(adapters("a", r=4)): 0.5}, base=bases(), out=tmp_path / "merged")
    record = json.loads((tmp_path / "merged/adapterkit.json").read_text())
    (only,) = record["recipe"]["inputs"]
    assert only["weight"] == 0.5
    assert set(only["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert record["recipe"]["tool"]["name"] == "adapterkit"
    assert record["recipe"] == json.loads(json.dumps(report.recipe))


def test_the_dtype_asked_for_is_that_of_every_weight(bases: Any, adapters: Any, tmp_path: Path):
    merge([adapters("a", r=4)], base=bases(), out=tmp_path / "merged", dtype="bfloat16")
    assert {tensor.dtype for tensor in weights(tmp_path / "merged").values()} == {torch.bfloat16}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert model.dtype == torch.bfloat16


def test_a_dry_run_writes_nothing_and_says_the_same(bases: Any, adapters: Any, tmp_path: Path):
    base, out = bases(dtype=torch.bfloat16), tmp_path / "merged"
    sources = {str(adapters("a", r=4)): 1.0}
    dry = merge(sources, base=base, out=out, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    real = merge(sources, base=base, out=out)
    assert dry.folder is None
    assert dry.parameters == real.parameters
    assert dry.recipe == real.recipe


def test_the_report_is_what_a_dense_computation_finds(bases: Any, adapters: Any, tmp_path: Path):
    base, out = bases(dtype=torch.bfloat16), tmp_path / "merged"
    adapter = adapters("a", r=4, size=0.01)
    report = merge([adapter], base=base, out=out)
    held = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    a, b = (held[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    delta = (2 * b @ a).flatten()
    before, after = (weights(top)[f"{name}.weight"].double() for top in (base, out))
    applied = (after - before).flatten()
    (row,) = [each for each in report.parameters if each.name == f"{name}.weight"]
    assert row.format == "bfloat16"
    assert row.gain == pytest.approx(float(applied @ delta / (delta @ delta)), abs=1e-4)
    assert row.cosine == pytest.approx(
        float(torch.nn.functional.cosine_similarity(applied, delta, dim=0)), abs=1e-4
    )
    assert row.error == pytest.approx(float((applied - delta).norm() / delta.norm()), abs=1e-3)
    assert row.size == pytest.approx(float(delta.norm() / before.norm()), rel=1e-3)


def test_an_adapter_lost_in_half_precision_is_warned_of(bases: Any, adapters: Any, tmp_path: Path):
    adapter = adapters("a", r=1, size=1e-4)
    with pytest.warns(AdapterWarning, match="would survive in bfloat16"):
        merge([adapter], base=bases(dtype=torch.bfloat16), out=tmp_path / "merged", min_gain=1)


def test_nothing_is_written_over(bases: Any, adapters: Any, tmp_path: Path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConflictError, match="not empty"):
        merge([adapters("a", r=4)], base=bases(), out=tmp_path / "taken")
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["file"]
    merge([adapters("a", r=4)], base=bases(), out=tmp_path / "empty")
    assert (tmp_path / "empty/model.safetensors").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"taken", "empty"}


def test_an_adapter_of_another_base_is_refused_with_all_findings(fixtures: Path, tmp_path: Path):
    with pytest.raises(MismatchError, match="does not belong"):
        merge(
            [fixtures / "cases/gpt2.lora_c_attn/adapter"],
            base=fixtures / "bases/llama",
            out=tmp_path / "m",
        )
    assert list(tmp_path.iterdir()) == []


def test_a_bias_for_layers_that_have_none_is_refused_naming_them(
    bases: Any, adapters: Any, tmp_path: Path
):
    adapter = adapters("a", r=2, lora_bias=True)
    with pytest.raises(
        MismatchError, match=r"have none in LlamaForCausalLM: .*down_proj, .*q_proj"
    ):
        merge([adapter], base=bases(), out=tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "case", ["bert.prefix_cls", "bert.prompt_cls", "llama.bottleneck_llm_adapters_parallel"]
)
def test_what_no_weight_equals_is_refused(case: str, fixtures: Path, tmp_path: Path):
    adapter, base = fixtures / f"cases/{case}/adapter", fixtures / "bases" / case.split(".")[0]
    with pytest.raises(InvalidError, match="no (change of a )?weight equals") as caught:
        merge([adapter], base=base, out=tmp_path / "m")
    assert "Bottleneck" not in str(caught.value)  # in words of users, not of classes
    assert list(tmp_path.iterdir()) == []


def test_values_too_large_for_the_format_are_named(bases: Any, adapters: Any, tmp_path: Path):
    adapter = adapters("big", r=4, size=300.0)
    with pytest.raises(MismatchError, match=r"proj.weight would hold NaN or Inf.*float16"):
        merge([adapter], base=bases(), out=tmp_path / "m", dtype="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"quantize": "int3"}, "quantize is 'int3'"),
        ({"onto": "base"}, "onto is 'base'"),
        ({"dtype": "half"}, "dtype is 'half'"),
        ({"min_gain": 2}, "min_gain is 2"),
        ({"trained_on": True}, "trained_on is True"),
        ({"onto": "dequantized"}, "expected one kind of quantized base"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    settings: dict[str, Any], match: str, bases: Any, adapters: Any, tmp_path: Path
):
    with pytest.raises(InvalidError, match=match):
        merge([adapters("a", r=4)], base=bases(), out=tmp_path / "m", **settings)


def test_no_adapter_is_no_merge(bases: Any, adapters: Any, tmp_path: Path):
    with pytest.raises(InvalidError, match="no adapter is given"):
        merge({str(adapters("a", r=4)): 0.0}, base=bases(), out=tmp_path / "m")


def test_rotations_take_no_weight_but_one(bases: Any, adapters: Any, tmp_path: Path):
    adapter = adapters("a", **KINDS["oft"])
    with pytest.raises(InvalidError, match="rotations take no weight"):
        merge({str(adapter): 0.5}, base=bases(), out=tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_version_of_the_registry_is_merged_by_its_reference(
    bases: Any, adapters: Any, tmp_path: Path
):
    with Registry(tmp_path / "home") as registry:
        from adapterkit.hub.ingest import add

        add(registry, adapters("a", r=4), "team/sql")
        report = merge({"team/sql": 1.0}, base=bases(), out=tmp_path / "m", registry=registry)
    assert report.recipe["inputs"][0]["version"].startswith("sha256:")


def test_blocks_of_rows_give_the_same_as_the_whole(
    bases: Any, adapters: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from adapterkit.hub.merge import streaming

    sources = [adapters("a", **KINDS[kind]) for kind in ("lora", "ia3", "table", "tokens")]
    merge(sources, base=bases(), out=tmp_path / "whole")
    monkeypatch.setattr(streaming, "CHUNK", 100)
    monkeypatch.setattr(streaming, "BLOCK", 40)
    merge(sources, base=bases(), out=tmp_path / "blocks")
    for name, tensor in weights(tmp_path / "whole").items():
        found = weights(tmp_path / "blocks")[name]
        torch.testing.assert_close(found, tensor, atol=1e-6, rtol=0)


def experts_adapter(base: Path, out: Path) -> Path:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    peft.get_peft_model(opened(base), config).save_pretrained(out)
    return out


def test_experts_fused_in_the_file_are_merged_one_by_one(fixtures: Path, tmp_path: Path):
    """transformers 5 may write one tensor for all; the result is that of one file per expert."""
    base, fused = fixtures / "bases/mixtral", tmp_path / "fused"
    shutil.copytree(base, fused)
    (fused / "model.safetensors").unlink()
    held = load_file(base / "model.safetensors")
    kept = {k: v for k, v in held.items() if ".experts." not in k}
    for layer in (0, 1):
        stem = f"model.layers.{layer}.block_sparse_moe.experts"
        n = 4
        kept[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(
            [
                torch.cat((held[f"{stem}.{e}.w1.weight"], held[f"{stem}.{e}.w3.weight"]))
                for e in range(n)
            ]
        )
        kept[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(
            [held[f"{stem}.{e}.w2.weight"] for e in range(n)]
        )
    save_file(kept, fused / "model.safetensors", {"format": "pt"})
    adapter = experts_adapter(base, tmp_path / "adapter")
    merge([adapter], base=base, out=tmp_path / "a")
    merge([adapter], base=fused, out=tmp_path / "b")
    torch.testing.assert_close(logits(opened(tmp_path / "a")), logits(opened(tmp_path / "b")))


def test_a_head_of_ones_own_takes_weight_1_from_one_adapter(fixtures: Path, tmp_path: Path):
    import peft

    base = fixtures / "bases/llama"
    for name in ("one", "two"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
        peft.get_peft_model(model, config).save_pretrained(tmp_path / name)
    for sources in (
        {str(tmp_path / "one"): 0.5},
        {str(tmp_path / "one"): 1.0, str(tmp_path / "two"): 1.0},
    ):
        with pytest.raises(InvalidError, match="score is not in the base's checkpoint"):
            merge(sources, base=base, out=tmp_path / "m")
        assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_the_index_says_how_many_bytes_the_tensors_have(fixtures: Path, tmp_path: Path):
    base, out = fixtures / "bases/llama_sharded", tmp_path / "m"
    merge([fixtures / "cases/llama.lora_qv/adapter"], base=base, out=out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = weights(out)
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in held.values())

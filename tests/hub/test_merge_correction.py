"""A LoRA beside a quantized merge that holds what quantization lost, against dense float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapterkit.hub import attach, describe, merge
from adapterkit.hub.merge import correction as correcting
from adapterkit.hub.merge import merge as merging
from adapterkit.hub.quant.packing import Scheme, pack
from adapterkit.registry.errors import AdapterError, InvalidError

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
CPU = {"device_map": {"": "cpu"}}
IDS = torch.arange(24).reshape(2, 12) % 16
KEY = "model.layers.0.self_attn.q_proj"
# Above what is decomposed as a whole, so that the randomized way is taken.
SIZE = 528


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def opened(folder: Path, **settings: Any) -> Any:
    loader = transformers.AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=torch.float32, **CPU, **settings).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits.float()


def weight(folder: Path, name: str = KEY) -> torch.Tensor:
    """Of a model on disk, as transformers and bitsandbytes have it."""
    module = opened(folder).get_submodule(name)
    held = module.weight
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state).double()
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        return (held.data.float() * (held.SCB[:, None] / 127)).double()
    return held.detach().double()


def product(folder: Path, name: str = KEY) -> torch.Tensor:
    """What a plain LoRA with alpha = r adds."""
    held = load_file(folder / "adapter_model.safetensors")
    stem = f"base_model.model.{name}.lora_"
    return held[f"{stem}B.weight"].double() @ held[f"{stem}A.weight"].double()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A small Llama, dense and stored in NF4."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=SIZE, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    top = tmp_path_factory.mktemp("bases")
    transformers.LlamaForCausalLM(config).save_pretrained(top / "dense")
    four = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    opened(top / "dense", quantization_config=four).save_pretrained(top / "nf4")
    return {"dense": top / "dense", "nf4": top / "nf4"}


@pytest.fixture(scope="module")
def adapters(
    bases: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[Path]]:
    """`adapters(4, 0.014)`: so many of rank 16, the sum of their changes that share of |W|."""

    def make(count: int, share: float, rank: int = 16) -> list[Path]:
        w = load_file(bases["dense"] / "model.safetensors")[f"{KEY}.weight"]
        generator = torch.Generator().manual_seed(count)
        drawn = [
            (torch.randn(len(w), rank, generator=generator),
             torch.randn(rank, w.shape[1], generator=generator))
            for _ in range(count)
        ]  # fmt: skip
        size = share * w.norm() / sum(b @ a for b, a in drawn).norm()
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
            "target_modules": ["q_proj"], "base_model_name_or_path": "base",
        }  # fmt: skip
        found = []
        for b, a in drawn:
            folder = tmp_path_factory.mktemp("adapter")
            stem = f"base_model.model.{KEY}.lora_"
            held = {f"{stem}A.weight": a, f"{stem}B.weight": b * size}
            save_file(held, folder / "adapter_model.safetensors", {"format": "pt"})
            (folder / "adapter_config.json").write_text(json.dumps(config))
            found.append(folder)
        return found

    return make


def dense_target(base: Path, sources: list[Path]) -> torch.Tensor:
    found = weight(base)
    for source in sources:
        found = found + product(source)
    return found


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize(("count", "share"), [(4, 0.014), (1, 0.14)])
def test_what_is_left_is_the_least_that_a_rank_can_leave(
    method: str, count: int, share: float, bases: Any, adapters: Any, tmp_path: Path
):
    """Within 1 % of Eckart and Young's optimum for these codes, and no more than with others."""
    base, sources, out = bases["dense"], adapters(count, share), tmp_path / "out"
    merge(sources, base=base, out=out, quantize=method, correction_rank=16, min_gain=0)
    lost = dense_target(base, sources) - weight(out)
    left = float((lost - product(out / "correction")).norm())
    assert left <= 1.01 * float(torch.linalg.svdvals(lost)[16:].norm())
    # codes of the target itself, corrected as well as can be
    target = dense_target(base, sources).float()
    plain = target - pack("w", target, Scheme(method), torch.float32).values
    assert left <= 1.001 * float(torch.linalg.svdvals(plain.double())[16:].norm())


@pytest.mark.parametrize("stored", ["dense", "nf4"])
@pytest.mark.parametrize(("count", "share"), [(4, 0.014), (4, 0.14), (1, 0.014)])
def test_the_report_predicts_the_correction_and_its_rival(
    stored: str, count: int, share: float, bases: Any, adapters: Any, tmp_path: Path
):
    base, sources, out = bases[stored], adapters(count, share), tmp_path / "out"
    settings: dict[str, Any] = {"quantize": "nf4", "correction_rank": 16, "min_gain": 0}
    dry = merge(sources, base=base, dry_run=True, **settings)
    report = merge(sources, base=base, out=out, **settings)
    assert dry.parameters == report.parameters
    found = report.correction
    assert found is not None
    assert found == dry.correction
    w, target = weight(base), dense_target(base, sources)
    delta, four = target - w, bases["nf4"]
    u, values, v = torch.linalg.svd(delta)
    rival = weight(four) + u[:, :16] * values[:16] @ v[:16]
    merged = weight(out) + product(out / "correction")
    for said, wanted in ((found.corrected, merged), (found.rival, rival)):
        applied = wanted - weight(four)
        gain = float((applied * delta).sum() / delta.square().sum())
        assert said.gain == pytest.approx(gain, abs=0.02)
        assert said.cosine == pytest.approx(
            float((applied * delta).sum() / delta.norm() / applied.norm()), abs=0.02
        )
    assert found.left == pytest.approx(float((merged - target).norm() / delta.norm()), rel=0.01)
    assert found.rival_left == pytest.approx(
        float((rival - target).norm() / delta.norm()), rel=0.01, abs=1e-4
    )
    nearer = (merged - target).norm() < (rival - target).norm()
    if abs(found.left - found.rival_left) > 0.001 * found.left:
        assert (found.better == "correction") == nearer
    assert report.gain == found.corrected.gain


def test_the_correction_is_attached_to_the_merged_model(bases: Any, adapters: Any, tmp_path: Path):
    """By PEFT and here; what the model computes is nearer to the true merge."""
    import peft

    base, sources, out = bases["nf4"], adapters(1, 0.3), tmp_path / "out"
    merge(sources, base=base, out=tmp_path / "true", quantize="none")
    merge(sources, base=base, out=out, correction_rank=16)
    true, model = logits(opened(tmp_path / "true")), opened(out)
    plain = logits(model)
    with attach(model, [out / "correction"]):
        corrected = logits(model)
    assert (corrected - true).norm() < 0.8 * (plain - true).norm()
    theirs = peft.PeftModel.from_pretrained(model, out / "correction")
    torch.testing.assert_close(logits(theirs), corrected, atol=1e-5, rtol=1e-4)
    info = describe(out / "correction")
    assert (info.kind, dict(info.ranks)) == ("lora", {16: 1})


def test_what_is_written_is_recorded(bases: Any, adapters: Any, tmp_path: Path):
    import hashlib

    out = tmp_path / "out"
    report = merge(
        adapters(1, 0.14), base=bases["nf4"], out=out, correction_rank=8, min_gain=0
    )
    record = json.loads((out / "adapterkit.json").read_text())
    assert record["recipe"]["parameters"]["correction_rank"] == 8
    said = report.record()["correction"]
    files = record["correction"].pop("files")
    assert record["correction"] == said
    assert said["rank"] == 8
    assert files == {
        f"correction/{path.name}": "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (out / "correction").iterdir()
    }
    config = json.loads((out / "correction/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(out)
    assert (config["target_modules"], config["task_type"]) == ([KEY], "CAUSAL_LM")


def test_the_guard_counts_what_the_correction_saves(bases: Any, adapters: Any, tmp_path: Path):
    base, sources = bases["nf4"], adapters(1, 0.014)
    with pytest.raises(AdapterError, match="would survive in nf4") as caught:
        merge(sources, base=base, out=tmp_path / "out")
    assert "--correction-rank R" in (caught.value.hint or "")
    report = merge(sources, base=base, out=tmp_path / "out", correction_rank=16)
    assert report.gain > 0.9
    assert report.correction is not None
    assert report.correction.plain.gain < 0.5


def test_codes_are_chosen_again_for_the_corrected_target():
    torch.manual_seed(1)
    target = torch.randn(96, 64) * 0.02 + torch.randn(96, 2) @ torch.randn(2, 64) * 0.02

    def again(values: torch.Tensor) -> Any:
        return pack("w", values, Scheme("nf4"), torch.float32)

    first = again(target)
    best = correcting.corrected(target, first, 8, again)
    once = torch.linalg.svdvals((target - first.values).double())[8:].square().sum()
    assert best.left < 0.9 * float(once)
    assert best.left == pytest.approx(float((target - best.values).double().square().sum()))


def test_every_module_of_any_family_that_is_quantized_is_corrected(fixtures: Path, tmp_path: Path):
    """A Conv1D is a linear layer once it is quantized; modules in a file each."""
    for base, adapter in (("gpt2", "gpt2.lora_c_attn"), ("llama_sharded", "llama.lora_qv")):
        source, out = fixtures / f"cases/{adapter}/adapter", tmp_path / base
        place = fixtures / "bases" / base
        report = merge([source], base=place, out=out, quantize="nf4", correction_rank=2)
        merge([source], base=place, out=tmp_path / f"{base}-true")
        corrected = [row for row in report.parameters if row.correction is not None]
        assert len(corrected) == len(report.parameters) >= 2
        true, model = logits(opened(tmp_path / f"{base}-true")), opened(out)
        plain = logits(model)
        with attach(model, [out / "correction"]):
            assert (logits(model) - true).norm() < (plain - true).norm()


@pytest.fixture
def arguments(fixtures: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "adapters": [fixtures / "cases/llama.lora_qv/adapter"],
        "base": fixtures / "bases/llama_sharded",
        "out": tmp_path / "merged",
        "quantize": "nf4",
        "correction_rank": 2,
    }


@pytest.mark.parametrize("damaged", [False, True])
def test_an_interrupted_merge_goes_on_with_its_corrections(
    damaged: bool, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = arguments | {"out": tmp_path / "elsewhere/merged"}
    whole["out"].parent.mkdir()
    report = merge(**whole)
    run, names = merging.Task.run, []

    def stop(self: merging.Task, *rest: Any) -> Any:
        names.append(self.file)
        if len(names) == 3:
            raise KeyboardInterrupt
        return run(self, *rest)

    monkeypatch.setattr(merging.Task, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        merge(**arguments)
    parts = sorted((tmp_path / ".merged.merge/correction").iterdir())
    assert parts
    if damaged:
        parts[0].write_bytes(parts[0].read_bytes()[:-1] + b"\x01")
    names += ["so that nothing stops"]
    resumed = merge(**arguments, resume=True)
    assert len(names[4:]) == (2 if damaged else 1)
    assert resumed.parameters == report.parameters
    found, wanted = contents(arguments["out"]), contents(whole["out"])
    for path in ("correction/adapter_config.json", "adapterkit.json"):  # they name the folder
        del found[path], wanted[path]
    assert found == wanted


def test_an_executor_makes_the_same(arguments: dict[str, Any], tmp_path: Path):
    merge(**arguments)
    here = contents(arguments["out"])
    arguments["out"].rename(tmp_path / "before")
    with ThreadPoolExecutor(2) as executor:
        merge(**arguments, executor=executor)
    assert contents(arguments["out"]) == here


@pytest.mark.parametrize("rank", [0, -1, True, 1.5, "8", 10**9])
def test_a_rank_is_a_count(rank: Any, arguments: dict[str, Any]):
    with pytest.raises(InvalidError, match="correction_rank is"):
        merge(**arguments | {"correction_rank": rank})


def test_what_loses_little_has_no_correction(arguments: dict[str, Any], tmp_path: Path):
    with pytest.raises(InvalidError, match="is not quantized"):
        merge(**arguments | {"quantize": "none"})
    assert list(tmp_path.iterdir()) == []

"""Adapters of other kinds as plain LoRA: exact where they are one, else the best of a rank; PEFT,
which reads the result, gives the logits of the adapter."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import test_parity as parity
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit.hub import attach, check
from adapterkit.hub.convert import Conversion, convert
from adapterkit.hub.offline import NeedsBaseError
from adapterkit.registry import Registry
from adapterkit.registry.errors import AdapterError, InvalidError, MismatchError

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

DATA: Path = parity.DATA
# What no LoRA carries, and what of the message says why.
REFUSED = {
    "oft": "turns the input",
    "ln_tuning": "adds nothing to a weight",
    "trainable_tokens": "adds nothing to a weight",
    "prefix_tuning": "not on its weights",
    "prompt_tuning": "not on its weights",
    "p_tuning": "not on its weights",
}
# Not qdora: its case is on a base loaded with single quantization, which `load` does not do.
WEIGHTS = {
    "lora", "rslora", "dora", "qlora", "lora_embedding", "lora_trainable_tokens", "moslora",
    "adalora", "vera", "lora_pissa", "lora_olora", "loha", "lokr", "ia3", "beft", "lora_moe",
}  # fmt: skip
FORWARD = [
    case
    for case in parity.CASES
    if case["operation"]["op"] == "forward"
    and case["adapters"]
    and "repair_or_refuse" not in case["tags"]
]
CASES = [
    case
    for case in FORWARD
    if case["kind"] in WEIGHTS
    and case["adapters"][0]["format"] in ("peft", "moslora-v0.10", "moslora-v0.3", "adapters")
]
OTHERS = [case for case in FORWARD if case["kind"] in REFUSED]


def source_of(case: dict[str, Any]) -> Path:
    return DATA / case["adapters"][0]["path"]


@lru_cache(maxsize=1)
def converted(path: Path, base: Path, quantization: str | None) -> Conversion | str:
    """Exact, without a base where none is needed; the reason where no LoRA is equal."""
    try:
        return convert(path)
    except NeedsBaseError:
        pass
    except InvalidError as error:
        if "--rank" not in (error.hint or ""):
            return str(error)
    try:  # a change of full rank is exact at that rank
        return convert(path, rank=4096, base=base, quantization=quantization)
    except InvalidError as error:
        return str(error)


def method(case: dict[str, Any]) -> str | None:
    """How the base is quantized at load."""
    given = case["base_load"].get("quantization") or {}
    return given.get("bnb_4bit_quant_type", "nf4") if given.get("load_in_4bit") else None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_peft_gives_the_logits_of_the_adapter_on_what_it_was_converted_to(
    case: dict[str, Any], tmp_path: Path
) -> None:
    made = converted(source_of(case), DATA / case["base_path"], method(case))
    if isinstance(made, str):
        assert "gate" in made
        return
    assert made.error == 0 and made.rounding < 1e-7
    folder = made.save(tmp_path / "lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert config["r"] == config["lora_alpha"] == made.rank and not config["use_rslora"]
    model = parity.model_for(case)
    with attach(model, [folder]):
        parity.check_logits(parity.logits(model, case), case)
    model = parity.model_of.__wrapped__(
        case["base_path"], json.dumps(case["base_load"], sort_keys=True)
    )
    if rows := case["operation"].get("resize_token_embeddings"):
        model.resize_token_embeddings(rows, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(model, folder).eval()
    parity.check_logits(parity.logits(theirs, case), case)


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case["id"])
def test_what_no_lora_equals_is_refused_with_the_reason(case: dict[str, Any]) -> None:
    with pytest.raises(AdapterError) as caught:
        convert(source_of(case), rank=64, base=DATA / case["base_path"])
    if case["adapters"][0]["format"] == "peft":
        assert REFUSED[case["kind"]] in str(caught.value)


def case_of(id: str) -> dict[str, Any]:
    return next(case for case in parity.CASES if case["id"] == id)


@pytest.fixture(scope="module")
def dora() -> Path:
    return source_of(case_of("llama.dora"))


@pytest.fixture(scope="module")
def base() -> Path:
    return DATA / "bases/llama"


def test_a_dora_needs_its_base_and_then_a_rank(dora: Path, base: Path) -> None:
    with pytest.raises(NeedsBaseError, match="weights of model.layers") as caught:
        convert(dora)
    assert "--base" in (caught.value.hint or "")
    with pytest.raises(InvalidError, match="exact only at rank 64") as error:
        convert(dora, base=base)
    assert "--rank" in (error.value.hint or "")


def deltas(folder: Path) -> dict[str, Tensor]:
    """B A of every module of a plain LoRA, float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        key.removesuffix(".lora_A.weight"): tensors[key.replace("lora_A", "lora_B")].double()
        @ tensors[key].double()
        for key in tensors
        if key.endswith(".lora_A.weight")
    }


def test_a_truncation_is_the_optimum_and_says_its_error(
    dora: Path, base: Path, tmp_path: Path
) -> None:
    """Against the singular values of the dense change (Eckart and Young 1936)."""
    whole = deltas(convert(dora, rank=64, base=base).save(tmp_path / "whole"))
    made = convert(dora, rank=3, base=base)
    found = deltas(made.save(tmp_path / "part"))
    assert made.rank == 3 and {m.needed for m in made.modules} == {32, 64}
    lost = total = 0.0
    for module in made.modules:
        want = whole[f"base_model.model.{module.module}"]
        values = torch.linalg.svdvals(want)
        best = float(values[3:].norm() / values.norm())
        got = float((found[f"base_model.model.{module.module}"] - want).norm() / want.norm())
        assert module.error == pytest.approx(best, rel=1e-5) == pytest.approx(got, rel=1e-5)
        lost, total = lost + float(values[3:].norm()) ** 2, total + float(values.norm()) ** 2
    assert made.error == pytest.approx((lost / total) ** 0.5, rel=1e-5)


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    named = {f"base_model.model.{key}": t.contiguous() for key, t in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


Q, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qv")
SMALL = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    ranks=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    alphas=st.tuples(st.floats(-8, 8), st.floats(0.25, 64)),
    rslora=st.booleans(),
    wanted=st.none() | st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_any_lora_becomes_one_of_scale_1_that_is_the_best_of_its_rank(
    tmp_path: Path, ranks: tuple[int, int], alphas: tuple[float, float], rslora: bool,
    wanted: int | None, seed: int,
) -> None:  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    tensors, expected = {}, {}
    for name, rank, alpha in zip((Q, V), ranks, alphas, strict=True):
        a, b = (torch.randn(shape, generator=draw) for shape in ((rank, 14), (12, rank)))
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        scale = alpha / (rank**0.5 if rslora else rank)
        expected[name] = scale * b.double() @ a.double()
    patterns = {"rank_pattern": {"v_proj": ranks[1]}, "alpha_pattern": {"v_proj": alphas[1]}}
    number = len(list(tmp_path.iterdir()))
    source = write(
        tmp_path / f"source{number}", tensors, **SMALL, **patterns, r=ranks[0],
        lora_alpha=alphas[0], use_rslora=rslora,
    )  # fmt: skip
    made = convert(source, rank=wanted)
    assert made.rank <= (wanted or max(ranks))
    found = deltas(made.save(tmp_path / f"made{number}"))
    for module in made.modules:
        want = expected[module.module]
        values = torch.linalg.svdvals(want)
        gap = (found[f"base_model.model.{module.module}"] - want).norm()
        best = values[made.rank :].norm()
        torch.testing.assert_close(gap, best, atol=1e-6 * (1 + float(values.norm())), rtol=1e-5)
        error = float(best / values.norm().clamp(min=1e-300))
        assert module.error == pytest.approx(error, abs=1e-6)


def test_the_same_input_gives_the_same_bytes_whatever_the_threads(dora: Path, base: Path) -> None:
    threads = torch.get_num_threads()
    found = set()
    for count in (1, 2, threads):
        torch.set_num_threads(count)
        made = convert(dora, rank=5, base=base)
        assert torch.get_num_threads() == count
        found.add(hashlib.sha256(b"".join(made.files.values())).hexdigest())
    torch.set_num_threads(threads)
    assert len(found) == 1


def test_half_precision_stays_while_it_is_exact(tmp_path: Path) -> None:
    a, b = torch.randn(4, 8).bfloat16(), torch.randn(6, 4).bfloat16()
    tensors = {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}
    exact = write(tmp_path / "exact", tensors, **SMALL, r=4, lora_alpha=8)
    other = write(tmp_path / "other", tensors, **SMALL, r=4, lora_alpha=7)
    assert (convert(exact).dtype, convert(exact).rounding) == ("BF16", 0)
    assert convert(other).dtype == "F32"
    rounded = convert(other, dtype="bfloat16")
    assert rounded.dtype == "BF16" and 1e-4 < rounded.rounding < 1e-2
    with pytest.raises(InvalidError, match="too large for torch.float16"):
        large = {key: tensor.float() * 1e9 for key, tensor in tensors.items()}
        convert(write(tmp_path / "large", large, **SMALL, r=4), dtype="float16")


def test_a_gain_on_few_outputs_is_a_lora_of_as_many_ranks(tmp_path: Path, base: Path) -> None:
    """diag(l - 1) W has one rank for each l that is not 1: IA3 is low rank when it is."""
    gain = torch.ones(64, 1)
    gain[[3, 7]] = torch.tensor([[0.5], [2.0]])
    inputs = torch.ones(1, 64)
    inputs[0, 5] = -1
    tensors = {f"{Q}.ia3_l": gain, "model.layers.0.mlp.up_proj.ia3_l": inputs}
    source = write(
        tmp_path / "a", tensors, peft_type="IA3", feedforward_modules=["up_proj"],
        target_modules=["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"],
    )  # fmt: skip
    made = convert(source, base=base)
    assert made.error == 0
    assert {m.module.rpartition(".")[2]: m.needed for m in made.modules} == {
        "q_proj": 2, "up_proj": 1,
    }  # fmt: skip
    model = parity.model_for(case_of("llama.lora_qv"))
    tokens, logits = torch.arange(12)[None], []
    with torch.no_grad():
        for folder in (source, made.save(tmp_path / "b")):
            with attach(model, [folder]):
                logits.append(model(tokens).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_a_dora_is_of_the_weight_as_it_will_be_loaded(
    tmp_path: Path, base: Path, dora: Path
) -> None:
    """diag(f - 1) W is of the dequantized W, and so are the norms in f."""
    from adapterkit.hub import load

    folder = convert(dora, rank=64, base=base, quantization="nf4").save(tmp_path / "b")
    plain = convert(dora, rank=64, base=base).save(tmp_path / "c")
    model = load(base, quantization="nf4")
    tokens, found = torch.arange(12)[None], {}
    with torch.no_grad():
        for name, each in {"dora": dora, "lora": folder, "other": plain}.items():
            with attach(model, [each]):
                found[name] = model(tokens).logits
    torch.testing.assert_close(found["lora"], found["dora"], atol=1e-4, rtol=1e-4)
    assert float((found["other"] - found["dora"]).abs().max()) > 0.01


@pytest.mark.parametrize("method", ["none", "nf4", "fp4", "int8", "stored nf4", "stored int8"])
def test_a_weight_on_disk_is_read_as_the_model_has_it(method: str) -> None:
    """Bit for bit, embeddings and norms excepted, which no quantization touches."""
    from adapterkit.hub import load
    from adapterkit.hub.bases.folder import read_base
    from adapterkit.hub.quant import format_of
    from adapterkit.hub.quant.stored import Weights

    names = {"stored nf4": "llama_nf4_double", "stored int8": "llama_int8"}
    place = DATA / "bases" / names.get(method, "llama")
    quantization = None if method in names else method
    base, model = read_base(place), load(place, quantization=quantization)
    weights, modules = Weights(base, quantization), dict(model.named_modules())
    linear = [name for name, row in base.modules.items() if row.type == "linear"]
    assert len(linear) > 10
    for name in linear:
        live = format_of(modules[name]).read_weight(modules[name])
        assert torch.equal(weights.weight(name), live)


def test_a_wrong_base_is_refused(dora: Path) -> None:
    with pytest.raises(MismatchError, match="incompatible"):
        convert(dora, rank=4, base=DATA / "bases/llama_wide")


def test_what_is_stored_keeps_its_parents_and_how_it_was_made(
    tmp_path: Path, base: Path, dora: Path
) -> None:
    from adapterkit.hub import ingest

    with Registry(tmp_path / "home") as registry:
        added = ingest.add(registry, dora, "tone", base=base)
        made = convert("tone", rank=4, base=base, registry=registry)
        done = made.add(registry, "small", tags=["prod"])
        manifest = registry.manifest("small")
        edge = {"version": f"sha256:{added.added.id}", "relation": "converted-from"}
        assert manifest.parents == (edge,)
        assert manifest.recipe is not None and manifest.recipe["operation"] == "convert"
        assert manifest.recipe["inputs"] == [{"version": f"sha256:{added.added.id}"}]
        assert manifest.recipe["parameters"]["rank"] == 4
        assert manifest.adapter == made.info.record()
        assert check("small", base=base, registry=registry).verdict == "same-weights-cast"
        assert made.add(registry, "small").id == done.id
        folder = registry.export("small", tmp_path / "out")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == dict(made.files)
        written = made.save(tmp_path / "folder")
        again = ingest.add(registry, written, "again")
        assert registry.manifest("again").recipe == manifest.recipe
        assert registry.manifest("again").parents == manifest.parents
        assert not again.skipped and not again.warnings
        config = written / "adapter_config.json"
        config.write_text(config.read_text().replace("\n", "\n\n", 1))
        changed = ingest.add(registry, written, "changed")
        assert [finding.code for finding in changed.warnings] == ["changed-since"]
        assert registry.manifest("changed").parents == ()
        from adapterkit.hub.arrival import recheck

        recheck(manifest, registry.files("small"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"to": "dora"}, "to lora"), ({"rank": 0}, "rank is 0"), ({"dtype": "int8"}, "dtype"),
        ({"out": "x"}, "no option out; there are .*quantization"),
    ],
)
def test_what_is_asked_for_in_vain_is_said(dora: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidError, match=words):
        convert(dora, **change)


def test_a_folder_is_written_all_or_nothing(dora: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    made = convert(dora, rank=4, base=base)
    with pytest.raises(AdapterError, match="not empty"):
        made.save(tmp_path / "full")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine"]


@pytest.mark.parametrize(
    "change",
    [{"schema": "adapterkit.made/2"}, {"files": {}}, {"files": 3}, {"recipe": None}, {"more": 1},
     {"parents": {}}, {"parents": [{"version": "sha256:ab", "relation": "converted-from"}]},
     {"parents": [{"version": "sha256:" + "0" * 64, "relation": "part"}]}, {"parents": [5]}],
)  # fmt: skip
def test_hostile_papers_are_refused(
    tmp_path: Path, base: Path, dora: Path, change: dict[str, Any]
) -> None:
    from adapterkit.hub import ingest
    from adapterkit.registry.errors import DamagedError

    folder = convert(dora, rank=2, base=base).save(tmp_path / "lora")
    papers = folder / "adapterkit.json"
    papers.write_text(json.dumps(json.loads(papers.read_text()) | change))
    with Registry(tmp_path / "home") as registry:
        with pytest.raises(DamagedError, match="adapterkit.json"):
            ingest.add(registry, folder, "bad")
        assert registry.list() == []


def test_neither_transformers_nor_a_model_is_loaded(base: Path, dora: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom adapterkit.hub.convert import convert\n"
        "made = convert(*sys.argv[1:2], rank=4, base=sys.argv[2])\nmade.save(sys.argv[3])\n"
        "print(sorted({'transformers', 'bitsandbytes', 'peft'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(dora), str(base), str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout == "[]\n"


FUSED = [case for case in CASES if "target_parameters" in case["summary"] or case["id"] in (
    "mixtral.lora_experts", "mixtral.lora_experts_down"
)]  # fmt: skip


@pytest.mark.parametrize("case", FUSED, ids=lambda case: case["id"])
def test_each_expert_gets_the_best_of_its_own_change(case: dict[str, Any], tmp_path: Path) -> None:
    """The pair of all experts taken apart by PEFT's rule: A (experts r, in), B (out, r experts)."""
    base = DATA / case["base_path"]
    whole = convert(source_of(case), base=base)
    part = convert(source_of(case), rank=2, base=base)
    assert part.rank == 2 < whole.rank
    experts = [m for m in part.modules if m.module.endswith("]")]
    assert experts and all(0 < m.error < 1 for m in experts)
    tensors = [load_file(made.save(tmp_path / str(i)) / "adapter_model.safetensors")
               for i, made in enumerate((whole, part))]  # fmt: skip
    count = 1 + max(int(m.module.rpartition("[")[2][:-1]) for m in experts)
    for key in (key for key in tensors[0] if "experts" in key and "lora_A" in key):
        deltas = []
        for held in tensors:
            a, b = held[key].double(), held[key.replace("lora_A", "lora_B")].double()
            a = a.reshape(count, -1, a.shape[1])
            b = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)
            deltas.append(b @ a)
        for want, got in zip(*deltas, strict=True):
            values = torch.linalg.svdvals(want)
            best = float(values[2:].norm() / values.norm())
            assert float((got - want).norm() / want.norm()) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (1, 1), (2, 2, 2)])
@pytest.mark.parametrize("wanted", [None, 2])
def test_a_convolution_stays_one(
    tmp_path: Path, kernel: tuple[int, ...], wanted: int | None
) -> None:
    """As matrices: A (r, in k), B (out, r)."""
    draw, ones = torch.Generator().manual_seed(1), (1,) * len(kernel)
    a = torch.randn(4, 5, *kernel, generator=draw)
    b = torch.randn(6, 4, *ones, generator=draw)
    tensors = {"net.conv.lora_A.weight": a, "net.conv.lora_B.weight": b}
    config = {"peft_type": "LORA", "target_modules": ["conv"], "r": 4, "lora_alpha": 3}
    source = write(tmp_path / "a", tensors, **config, use_rslora=True)
    made = convert(source, rank=wanted)
    found = load_file(made.save(tmp_path / "b") / "adapter_model.safetensors")
    new_a, new_b = (found[f"base_model.model.net.conv.lora_{x}.weight"] for x in "AB")
    assert new_a.shape == (made.rank, 5, *kernel) and new_b.shape == (6, made.rank, *ones)
    want = 3 / 2 * b.flatten(1).double() @ a.flatten(1).double()
    gap = new_b.flatten(1).double() @ new_a.flatten(1).double() - want
    best = torch.linalg.svdvals(want)[made.rank :].norm()
    torch.testing.assert_close(gap.norm(), best, atol=1e-5, rtol=1e-5)


def test_a_grouped_convolution_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {
        "net.conv.lora_A.weight": torch.ones(4, 6, 3), "net.conv.lora_B.weight": torch.ones(6, 2, 1)
    }  # fmt: skip
    source = write(tmp_path / "a", tensors, peft_type="LORA", target_modules=["conv"], r=4)
    with pytest.raises(InvalidError, match="grouped conv"):
        convert(source)

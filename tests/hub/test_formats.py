"""Which format a folder is of, what the user has to say of it, and that this is remembered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from adapterkit.cli.main import main
from adapterkit.hub import attach, check, describe, folder, ingest
from adapterkit.hub.arrival import recheck
from adapterkit.hub.formats import FORMATS
from adapterkit.hub.locate import locate
from adapterkit.hub.read import read_adapter
from adapterkit.hub.sources import open_folder
from adapterkit.registry import Registry
from adapterkit.registry.errors import DamagedError, InvalidError, NotFoundError

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
Make = Callable[..., Path]
MODULE = "transformer.h.0.attn.c_attn"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "home") as opened:
        yield opened


def loralib(path: Path, rank: int = 2, parts: int = 2, **values: Any) -> Path:
    """A checkpoint for the GPT-2 of the fixtures, `parts` of its three matrices adapted."""
    path.mkdir()
    random = torch.Generator().manual_seed(3)
    state = {
        f"{MODULE}.lora_A": torch.randn(rank * parts, 48, generator=random),
        f"{MODULE}.lora_B": torch.randn(48 * parts, rank, generator=random),
    }
    torch.save({"model_state_dict": state, **values}, path / "model.pt")
    return path


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    return loralib(tmp_path / "dump")


HINTS = {"alpha": 6, "enable_lora": [True, False, True]}


def read(path: Path, **hints: Any) -> Any:
    adapter = read_adapter(folder(path, **hints))
    adapter.require_sound()
    return adapter


def test_what_a_file_does_not_say_is_asked_for_by_name(dump: Path) -> None:
    with pytest.raises(InvalidError, match="does not say enable_lora.*c_attn has factors for 2"):
        read(dump, alpha=6)
    with pytest.raises(InvalidError, match="does not say alpha") as caught:
        read(dump, enable_lora=[True, False, True])
    assert caught.value.hint == "give --hint alpha=NUMBER"
    adapter = read(dump, **HINTS)
    assert (adapter.format, adapter.hints) == ("loralib", HINTS)


def test_a_hint_that_nobody_uses_is_an_error_that_lists_what_is_known(
    dump: Path, make: Make
) -> None:
    with pytest.raises(InvalidError, match="not used: beta; the format loralib knows alpha: "):
        read(dump, **HINTS, beta=1)
    with pytest.raises(InvalidError, match="not used: alpha; the format peft knows none"):
        read(make(), alpha=16)
    with pytest.raises(InvalidError, match="the hint alpha is .* no JSON"):
        folder(dump, alpha=float("nan"))


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        ({"alpha": "six"}, "alpha is 'six', expected a number"),
        ({"alpha": True}, "alpha is True"),
        ({"r": 4}, "r is 4, the tensors have rank 2"),
        ({"enable_lora": [True, False, False]}, "has 1 true, the file has factors for 2"),
        ({"enable_lora": "qv"}, "expected a list of true and false"),
        ({"enable_lora": []}, "has 0 true"),
    ],
)
def test_a_wrong_hint_is_named(dump: Path, hints: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidError, match=message):
        read(dump, **{**HINTS, **hints})


def test_hints_are_remembered_with_the_version(
    registry: Registry, dump: Path, fixtures: Path
) -> None:
    done = ingest.add(registry, folder(dump, **HINTS), "q", base=fixtures / "bases" / "gpt2")
    manifest = registry.manifest("q")
    assert manifest.adapter["hints"] == HINTS
    assert {file.path: file.role for file in manifest.files} == {"model.pt": "weights"}
    assert locate("q", registry).hints == HINTS
    assert describe("q", registry).record() == done.info.record() == manifest.adapter
    found = check("q", base=fixtures / "bases" / "gpt2", registry=registry)
    assert found.verdict == "same-weights-cast"
    again = ingest.add(registry, folder(dump, **HINTS), "q")
    assert again.added.id != done.added.id or not again.added.created
    other = ingest.add(registry, folder(dump, **{**HINTS, "alpha": 7}), "q")
    assert other.added.id != done.added.id


def test_on_arrival_hints_are_held_against_the_files(registry: Registry, dump: Path) -> None:
    ingest.add(registry, folder(dump, **HINTS), "q")
    manifest, files = registry.manifest("q"), registry.files("q")
    recheck(manifest, files)
    changed = {**manifest.adapter, "hints": {**HINTS, "alpha": 7}}
    with pytest.raises(DamagedError, match="alphas is"):
        recheck(replace(manifest, adapter=changed), files)
    for odd in ({**HINTS, "beta": 1}, [1], {"alpha": 6}, {**HINTS, "format": "odd"}):
        with pytest.raises(DamagedError, match="manifest"):
            recheck(replace(manifest, adapter={**manifest.adapter, "hints": odd}), files)


def test_a_folder_that_needs_no_hint_has_none_in_its_manifest(
    registry: Registry, make: Make
) -> None:
    ingest.add(registry, make(), "sql")
    assert "hints" not in registry.manifest("sql").adapter


def typed(*arguments: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    return done.exit_code, done.output


def test_hints_are_given_on_the_command_line(dump: Path, fixtures: Path) -> None:
    base = fixtures / "bases" / "gpt2"
    given = ["--hint", "alpha=6", "--hint", "enable_lora=[true, false, true]"]
    code, text = typed("check", dump, "--base", base)
    assert code == 2 and "does not say" in text and "give --hint" in text
    assert typed("check", dump, "--base", base, *given)[0] == 0
    code, text = typed("add", dump, "q", "--base", base, *given)
    assert code == 0 and "LoRA of rank 4 on c_attn" in text
    assert typed("check", "q", "--base", base)[0] == 0
    code, text = typed("check", "q", "--base", base, *given)
    assert code == 2 and "what is stored has its hints" in text
    for wrong in ("alpha", "=6"):
        assert typed("add", dump, "q", "--hint", wrong)[0] == 2
    assert typed("add", dump, "q", "--hint", "alpha=6", "--hint", "alpha=7")[0] == 2
    assert typed("add", "/nothing", "q", *given)[0] == 3


def test_hints_travel_with_the_version(dump: Path, fixtures: Path, tmp_path: Path) -> None:
    base, remote, there = fixtures / "bases" / "gpt2", f"file://{tmp_path}/remote", tmp_path / "b"
    given = ["--hint", "alpha=6", "--hint", "enable_lora=[true,false,true]"]
    assert typed("add", dump, "q", *given)[0] == 0
    assert typed("push", "q", remote)[0] == 0
    code, text = typed("--home", there, "pull", f"{remote}#q")
    assert code == 0, text
    assert typed("--home", there, "check", "q", "--base", base)[0] == 0


def test_two_formats_with_equal_claims_are_an_error_that_a_hint_decides(
    tmp_path: Path, dump: Path
) -> None:
    state = torch.load(dump / "model.pt")["model_state_dict"]
    both = {**state, "lora_te_lm_head.lora_down.weight": torch.ones(2, 48)}
    save_file(both, tmp_path / "dump" / "model.safetensors")
    with pytest.raises(InvalidError, match=r"several formats: kohya \(.*loralib \(") as caught:
        read(dump)
    assert caught.value.hint == "give --hint format=kohya"
    with pytest.raises(DamagedError, match="lora_te_lm_head.lora_down.weight"):
        read(dump, **HINTS, format="loralib")
    with pytest.raises(InvalidError, match="format is 'x', expected one of"):
        read(dump, format="x")


def test_a_hint_may_name_the_format_where_there_is_no_doubt(registry: Registry, dump: Path) -> None:
    ingest.add(registry, folder(dump, **HINTS, format="loralib"), "q")
    assert registry.manifest("q").adapter["hints"]["format"] == "loralib"
    assert read_adapter(locate("q", registry)).format == "loralib"


def test_every_format_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    assert [name for name in FORMATS if f"| `{name}`" not in page] == []


def test_every_format_says_what_it_can_be_told() -> None:
    from importlib import import_module

    for path in FORMATS.values():
        module = import_module(path)
        assert callable(module.claims) and callable(module.read)
        assert all(isinstance(text, str) for text in getattr(module, "HINTS", {}).values())


def test_the_only_subfolder_with_an_adapter_is_read(registry: Registry, make: Make) -> None:
    named = make()
    outer = named.parent / "outer"
    shutil.move(named, outer / "sql")
    done = ingest.add(registry, outer, "sql")
    assert {file.path for file in registry.manifest("sql").files} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert [f.code for f in done.info.findings if f.severity == "info"] == ["subfolder"]
    assert done.added.id == ingest.add(registry, outer / "sql", "sql").added.id


def test_several_adapters_in_subfolders_are_listed(make: Make) -> None:
    one, two = make(), make()
    outer = one.parent / "outer"
    shutil.move(one, outer / "sql")
    shutil.move(two, outer / "tone")
    with pytest.raises(NotFoundError, match="holds 2 adapters in subfolders") as caught:
        read(outer)
    assert "sql/adapter_config.json, tone/adapter_config.json" in str(caught.value.hint)


def test_a_file_that_cannot_be_read_is_said_when_nobody_claims_the_folder(tmp_path: Path) -> None:
    (tmp_path / "dump").mkdir()
    (tmp_path / "dump" / "model.pt").write_bytes(b"\x80\x02cos\nsystem\n.")
    with pytest.raises(DamagedError, match="holds os.system"):
        read(tmp_path / "dump")


@pytest.fixture
def pickled(make: Make) -> Path:
    """A PEFT folder as it was before safetensors."""
    path = make()
    torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()
    return path


def test_a_pickle_of_tensors_is_read_stored_and_checked_like_the_safetensors_file(
    registry: Registry, make: Make, pickled: Path, fixtures: Path
) -> None:
    assert describe(pickled).root == describe(make()).root
    done = ingest.add(registry, pickled, "sql", base=fixtures / "bases" / "llama")
    roles = {file.path: file.role for file in registry.manifest("sql").files}
    assert roles == {"adapter_config.json": "config", "adapter_model.bin": "weights"}
    assert done.info.root == describe("sql", registry).root
    recheck(registry.manifest("sql"), registry.files("sql"))


def test_of_both_files_the_safetensors_file_is_read_and_the_pickle_never_opened(
    registry: Registry, make: Make
) -> None:
    path = make()
    (path / "adapter_model.bin").write_bytes(b"cos\nsystem\n.")
    done = ingest.add(registry, path, "sql")
    assert [w.code for w in done.warnings] == ["two-weight-files"]
    assert dict(done.skipped) == {"adapter_model.bin": 12}


def test_targets_of_the_oldest_peft_may_start_inside_a_name(make: Make, llama: Any) -> None:
    new, old = make(target_modules=["_proj"]), make(target_modules=["_proj"], merge_weights=False)
    assert read_adapter(open_folder(new)).targets.select(llama.modules) == []
    targets = read_adapter(open_folder(old)).targets
    assert {name.rpartition(".")[2] for name in targets.select(llama.modules)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert targets.unmatched(llama.modules) == []


def model_of(path: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(4, 20).reshape(2, 8)
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def acts_as(model: Any, source: Any, changes: dict[str, torch.Tensor]) -> None:
    """The adapter on the model gives what the model gives with its weights changed by hand."""
    with attach(model, [source]):
        found = logits(model)
    before = {name: model.get_submodule(name).weight.data.clone() for name in changes}
    for name, change in changes.items():
        model.get_submodule(name).weight.data += change
    expected = logits(model)
    for name, weight in before.items():
        model.get_submodule(name).weight.data.copy_(weight)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert (expected - logits(model)).abs().max() > 1e-2


@pytest.mark.parametrize("enabled", ["101", "011", "111", "100"])
def test_fused_factors_change_the_matrices_that_are_enabled(
    tmp_path: Path, fixtures: Path, enabled: str
) -> None:
    """loralib: a grouped convolution, one group for each matrix that has factors."""
    parts = [flag == "1" for flag in enabled]
    path = loralib(tmp_path / "dump", rank=3, parts=sum(parts))
    model = model_of(fixtures / "bases" / "gpt2")
    state = torch.load(path / "model.pt")["model_state_dict"]
    a, b = (state[f"{MODULE}.lora_{role}"].chunk(sum(parts)) for role in "AB")
    change = torch.zeros(48 * 3, 48)
    for j, place in enumerate(i for i, on in enumerate(parts) if on):
        change[place * 48 : (place + 1) * 48] = 6 / 3 * b[j] @ a[j]
    acts_as(model, folder(path, alpha=6, enable_lora=parts), {MODULE: change.T})


def merged_linear(path: Path, enabled: list[bool], a: torch.Tensor, b: torch.Tensor) -> Path:
    """What PEFT 0.2 writes of a fused layer: B is the weight of a convolution."""
    path.mkdir()
    key = f"base_model.model.{MODULE}"
    state = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b[:, :, None]}
    torch.save(state, path / "adapter_model.bin")
    config = {
        "peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["h.0.attn.c_attn"],
        "enable_lora": enabled, "merge_weights": False, "fan_in_fan_out": True, "bias": "none",
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def test_fused_layers_of_the_oldest_peft_are_applied(tmp_path: Path, fixtures: Path) -> None:
    a, b = torch.randn(6, 48), torch.randn(96, 3)
    path = merged_linear(tmp_path / "old", [True, False, True], a, b)
    change = torch.zeros(144, 48)
    change[:48], change[96:] = 2 * b[:48] @ a[:3], 2 * b[48:] @ a[3:]
    acts_as(model_of(fixtures / "bases" / "gpt2"), path, {MODULE: change.T})


@pytest.mark.parametrize("enabled", [[True, True, True], [True, False, False], "qv", [1, 0, 1]])
def test_fused_layers_that_peft_mixes_up_are_refused_by_name(
    tmp_path: Path, enabled: Any
) -> None:
    path = merged_linear(tmp_path / "old", enabled, torch.randn(6, 48), torch.randn(96, 3))
    with pytest.raises((DamagedError, NotFoundError), match="enable_lora"):
        read(path)


def test_values_beside_the_tensors_are_warned_about(tmp_path: Path) -> None:
    path = loralib(tmp_path / "dump", epoch=3, best=None)
    found = [f for f in read(path, **HINTS).findings if f.code == "unknown-value"]
    assert [(f.tensor, f.found) for f in found] == [("epoch", "3"), ("best", "None")]


def test_a_plain_checkpoint_of_loralib_needs_only_alpha(tmp_path: Path, fixtures: Path) -> None:
    path = tmp_path / "dump"
    path.mkdir()
    name = "model.layers.0.self_attn.q_proj"
    a, b = torch.randn(2, 64), torch.randn(64, 2)
    torch.save({f"{name}.lora_A": a, f"{name}.lora_B": b}, path / "model.pt")
    acts_as(model_of(fixtures / "bases" / "llama"), folder(path, alpha=6), {name: 3 * b @ a})


@pytest.fixture
def mlx(tmp_path: Path) -> Callable[..., Path]:
    def write(tensors: dict[str, torch.Tensor], **config: Any) -> Path:
        path = tmp_path / "mlx"
        path.mkdir(exist_ok=True)
        save_file({k: t.contiguous() for k, t in tensors.items()}, path / "adapters.safetensors")
        known = {
            "fine_tune_type": "lora", "model": "x", "num_layers": 1, "train": True, "iters": 600,
            "lora_parameters": {"rank": 2, "scale": 1.5, "dropout": 0.0},
        }  # fmt: skip
        kept = {name: value for name, value in (known | config).items() if value is not ...}
        (path / "adapter_config.json").write_text(json.dumps(kept))
        return path

    return write


Q1 = "model.layers.1.self_attn.q_proj"


def test_mlx_uses_its_scale_as_it_is(mlx: Callable[..., Path], fixtures: Path) -> None:
    a, b = torch.randn(64, 2), torch.randn(2, 64)
    path = mlx({f"{Q1}.lora_a": a, f"{Q1}.lora_b": b})
    acts_as(model_of(fixtures / "bases" / "llama"), path, {Q1: 1.5 * (a @ b).T})


def test_mlx_has_dora(mlx: Callable[..., Path], fixtures: Path) -> None:
    a, b, m = torch.randn(64, 2), torch.randn(2, 64), torch.rand(64) + 0.5
    tensors = {f"{Q1}.lora_a": a, f"{Q1}.lora_b": b, f"{Q1}.m": m}
    model = model_of(fixtures / "bases" / "llama")
    weight = model.get_submodule(Q1).weight.data
    whole = weight + 1.5 * (a @ b).T
    changed = (m / whole.norm(dim=1))[:, None] * whole
    acts_as(model, mlx(tensors, fine_tune_type="dora"), {Q1: changed - weight})


def test_mlx_on_an_embedding_changes_a_tied_head_too(
    mlx: Callable[..., Path], fixtures: Path
) -> None:
    model = model_of(fixtures / "bases" / "gpt2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    rows, width = model.get_input_embeddings().weight.shape
    a, b = torch.randn(rows, 2), torch.randn(2, width)
    name = "transformer.wte"
    path = mlx({f"{name}.lora_a": a, f"{name}.lora_b": b})
    acts_as(model, path, {name: 1.5 * a @ b})


def test_the_layers_that_mlx_adapts_are_the_last_ones(
    mlx: Callable[..., Path], fixtures: Path
) -> None:
    factors = {f"{Q1}.lora_a": torch.randn(64, 2), f"{Q1}.lora_b": torch.randn(2, 64)}
    inner = {"rank": 2, "scale": 1.5, "keys": ["self_attn.q_proj"]}
    base = fixtures / "bases" / "llama"
    assert check(mlx(factors, lora_parameters=inner), base=base).errors == ()
    found = check(mlx(factors, lora_parameters=inner, num_layers=2), base=base).errors
    assert {f.tensor for f in found} == {"model.layers.0.self_attn.q_proj"}
    assert check(mlx(factors, num_layers=-1), base=base).errors == ()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fine_tune_type": "full"}, "holds whole weights"),
        ({"fine_tune_type": "odd"}, "fine_tune_type is 'odd'"),
        ({"lora_parameters": ...}, "lora_parameters is None, expected an object"),
        ({"lora_parameters": {"rank": 2, "alpha": 4}}, "lora_parameters has no scale"),
        ({"lora_parameters": {"rank": 2, "scale": 1, "x": 1}}, "x is 1, expected no such field"),
        ({"lora_parameters": {"rank": 3, "scale": 1}}, "rank 2 in shape"),
        ({"new_option": 1}, "new_option"),
        ({"num_layers": "all"}, "num_layers is 'all'"),
    ],
)
def test_an_odd_config_of_mlx_is_refused_by_name(
    mlx: Callable[..., Path], config: dict[str, Any], message: str
) -> None:
    factors = {f"{Q1}.lora_a": torch.randn(64, 2), f"{Q1}.lora_b": torch.randn(2, 64)}
    with pytest.raises((DamagedError, NotFoundError), match=message):
        read(mlx(factors, **config))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{Q1}.lora_c": torch.ones(1)}, "lora_c.*unexpected-tensor"),
        ({f"{Q1}.lora_a": torch.ones(4, 2, 64)}, r"experts \(LoRASwitchLinear\)"),
        ({"model.embed_tokens.m": torch.ones(4)}, "DoRA of an embedding"),
    ],
)
def test_tensors_of_mlx_that_are_not_applied_are_refused_by_name(
    mlx: Callable[..., Path], tensors: dict[str, torch.Tensor], message: str
) -> None:
    factors = {"model.norm.lora_a": torch.randn(64, 2), "model.norm.lora_b": torch.randn(2, 64)}
    with pytest.raises((DamagedError, NotFoundError), match=message):
        read(mlx(factors | tensors))


@pytest.fixture
def kohya(tmp_path: Path) -> Callable[[dict[str, torch.Tensor]], Path]:
    def write(tensors: dict[str, torch.Tensor]) -> Path:
        path = tmp_path / "kohya"
        path.mkdir(exist_ok=True)
        save_file(tensors, path / "last.safetensors")
        return path

    return write


FLAT = "lora_te_model_layers_1_self_attn_q_proj"


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [
        (torch.tensor(6.0), 3.0),
        (torch.tensor([6.0], dtype=torch.bfloat16), 3.0),
        (torch.tensor(6.0, dtype=torch.float16), 3.0),
        (torch.tensor(0.0), 1.0),
        (None, 1.0),
    ],
)
def test_kohya_divides_the_alpha_of_each_module_by_its_rank(
    kohya: Callable[..., Path], fixtures: Path, alpha: torch.Tensor | None, scale: float
) -> None:
    a, b = torch.randn(2, 64), torch.randn(64, 2)
    tensors = {f"{FLAT}.lora_down.weight": a, f"{FLAT}.lora_up.weight": b}
    path = kohya(tensors | ({} if alpha is None else {f"{FLAT}.alpha": alpha}))
    acts_as(model_of(fixtures / "bases" / "llama"), path, {Q1: scale * b @ a})


def test_kohya_of_a_body_fits_the_model_with_a_head(
    kohya: Callable[..., Path], fixtures: Path
) -> None:
    a, b = torch.randn(2, 64), torch.randn(64, 2)
    flat = FLAT.replace("model_", "")
    path = kohya({f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b})
    acts_as(model_of(fixtures / "bases" / "llama"), path, {Q1: b @ a})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_mid_block.lora_down.weight": torch.ones(2, 4)}, "for an image model"),
        ({"lora_te1_a.lora_down.weight": torch.ones(2, 4)}, "several models: lora_te, lora_te1"),
        ({f"{FLAT}.dora_scale": torch.ones(64, 1)}, "dora_scale.*unexpected-tensor"),
        ({f"{FLAT}.lora_mid.weight": torch.ones(2, 2)}, "lora_mid"),
        ({f"{FLAT}.alpha": torch.ones(2)}, r"alpha is F32 \[2\], expected a single number"),
        ({f"{FLAT}.alpha": torch.tensor(float("nan"))}, "alpha is nan"),
        ({f"{FLAT}.alpha": torch.tensor(3)}, "alpha is I64"),
        ({f"{FLAT}.lora_up.weight": torch.ones(64, 3)}, "rank-mismatch"),
        ({"x.lora_down.weight": torch.ones(2, 4)}, "x.lora_down.weight.*unexpected"),
    ],
)
def test_what_kohya_holds_beside_lora_of_a_text_model_is_refused_by_name(
    kohya: Callable[..., Path], tensors: dict[str, torch.Tensor], message: str
) -> None:
    whole = {
        f"{FLAT}.lora_down.weight": torch.ones(2, 64), f"{FLAT}.lora_up.weight": torch.ones(64, 2)
    }  # fmt: skip
    with pytest.raises((DamagedError, NotFoundError), match=message):
        read(kohya(whole | tensors))

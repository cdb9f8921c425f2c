"""A LoRA out of a tuned model: what it and its base differ by, as far as the rank goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from adapterkit.hub import attach
from adapterkit.hub.mixing.extract import extract
from adapterkit.registry import Registry
from adapterkit.registry.errors import InvalidError, MismatchError

TOKENS = torch.tensor([[1, 20, 33, 7, 90, 4]])
pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")


def load(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def run(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def tuned(base: Path, target: Path, change: Callable[[str, torch.Tensor], bool]) -> Any:
    """A model of which the parameters that `change` names have moved."""
    torch.manual_seed(0)
    model = load(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if change(name, parameter):
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(target)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_at_full_rank_the_lora_is_the_tuned_model(
    fixtures: Path, tmp_path: Path, family: str
) -> None:
    """Here and in PEFT; norms and biases that changed included."""
    base = fixtures / "bases" / family
    model = tuned(base, tmp_path / "tuned", lambda name, p: "wte" not in name and "emb" not in name)
    made = extract(base, tmp_path / "tuned", 64 if family != "gpt2" else 48)
    assert made.error < 1e-3
    made.save(tmp_path / "lora")
    plain = load(base)
    with attach(plain, [tmp_path / "lora"]):
        torch.testing.assert_close(run(plain), run(model), atol=2e-3, rtol=0)
    theirs = peft.PeftModel.from_pretrained(load(base), tmp_path / "lora").eval()
    torch.testing.assert_close(run(theirs), run(model), atol=2e-3, rtol=0)


def test_a_lower_rank_is_the_optimum_and_says_its_error(fixtures: Path, tmp_path: Path) -> None:
    base = fixtures / "bases/llama"
    model = tuned(base, tmp_path / "tuned", lambda name, p: "q_proj" in name)
    made = extract(base, tmp_path / "tuned", 5)
    assert {row.module for row in made.modules} == {
        f"model.layers.{i}.self_attn.q_proj" for i in range(len(model.model.layers))
    }
    for row in made.modules:
        old = load(base).get_submodule(row.module).weight.double()
        new = model.get_submodule(row.module).weight.double()
        values = torch.linalg.svdvals(new - old)
        best = math.sqrt(float(values[5:].square().sum() / values.square().sum()))
        assert row.error == pytest.approx(best, abs=1e-5)
        assert row.size == pytest.approx(float((new - old).norm()), rel=1e-6)


def test_it_is_stored_with_its_base_and_how_it_was_made(fixtures: Path, tmp_path: Path) -> None:
    base = fixtures / "bases/llama"
    tuned(base, tmp_path / "tuned", lambda name, p: "v_proj" in name)
    made = extract(base, tmp_path / "tuned", 4)
    assert made.files == extract(base, tmp_path / "tuned", 4).files
    with Registry(tmp_path / "home") as registry:
        manifest = registry.manifest(made.add(registry, "mine").ref)
    assert manifest.recipe is not None and manifest.recipe["operation"] == "extract"
    assert (manifest.base or {})["sketch"]["size"] > 0


def test_what_cannot_be_extracted_is_named(fixtures: Path, tmp_path: Path) -> None:
    base = fixtures / "bases/llama"
    with pytest.raises(InvalidError, match="nothing to extract"):
        extract(base, base, 4)
    with pytest.raises(MismatchError, match="is not tuned from"):
        extract(base, fixtures / "bases/llama_wide", 4)
    with pytest.raises(MismatchError, match="model_type is llama and gpt2"):
        extract(base, fixtures / "bases/gpt2", 4)
    with pytest.raises(InvalidError, match="rank is 0"):
        extract(base, base, 0)
    moe = fixtures / "bases/mixtral"
    tuned(moe, tmp_path / "moe", lambda name, p: "experts" in name)
    with pytest.raises(InvalidError, match="experts.*no LoRA of PEFT carries"):
        extract(moe, tmp_path / "moe", 4)
    gpt2 = fixtures / "bases/gpt2"
    tuned(gpt2, tmp_path / "gpt2", lambda name, p: "wte" in name)
    with pytest.raises(InvalidError, match="is tied"):
        extract(gpt2, tmp_path / "gpt2", 4)


def test_the_command_prints_what_the_rank_left_out(fixtures: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from adapterkit.cli.main import main

    base = fixtures / "bases/llama"
    tuned(base, tmp_path / "tuned", lambda name, p: "v_proj" in name)
    arguments = ["extract", "--base", base, "--tuned", tmp_path / "tuned", "--rank", 4, "-o"]
    done = CliRunner().invoke(main, [*map(str, arguments), str(tmp_path / "out")])
    assert done.exit_code == 0 and "of rank 4 on v_proj" in done.stdout
    assert "error 0." in done.stdout and "EXACT AT" in done.stdout
    again = CliRunner().invoke(main, [*map(str, arguments), str(tmp_path / "out")])
    assert again.exit_code == 4

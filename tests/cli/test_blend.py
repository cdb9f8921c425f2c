"""adapter blend"""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file


@pytest.fixture
def two(run, fixtures, llama):
    """a and b, LoRAs of the model llama, in the registry."""
    for name in ("A", "B"):
        run("add", fixtures / f"adapters/llama_{name}", name.lower(), "--base", llama)


def test_a_blend_is_stored_with_what_it_was_made_of(run, run_json, two):
    shown = run("blend", "a=0.7", "b=-0.3", "-o", "mix").stdout
    assert shown.startswith("mix@1.0: LoRA of rank 16 on q_proj, v_proj")
    assert "exact; rounding to" in shown
    found = run_json("show", "mix")
    parents = found["manifest"]["parents"]
    assert {parent["relation"] for parent in parents} == {"blended-from"} and len(parents) == 2
    assert run("blend", "--verify", "mix").stdout == "mix: same bytes\n"


def test_a_truncation_says_what_it_cost(run, run_json, two, tmp_path):
    shown = run("blend", "a", "b", "--method", "svd", "--rank", "3", "-o", tmp_path / "x").stdout
    assert "of rank 3" in shown and "error 0." in shown and "EXACT AT" in shown
    found = run_json("blend", "a", "b", "-m", "svd", "--rank", "auto", "-o", tmp_path / "y")
    assert 0 < found["error"] <= 0.1 and found["recipe"]["parameters"]["rank"] == "auto"
    assert load_file(tmp_path / "y/adapter_model.safetensors")


def test_random_choices_follow_the_seed(run, two, tmp_path):
    made = []
    for name, seed in (("p", 1), ("q", 1), ("r", 2)):
        folder = tmp_path / name
        run("blend", "b", "a", "-m", "dare_ties", "--seed", seed, "--rank", 4, "-o", folder)
        made.append((folder / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]


def test_pefts_own_methods_are_a_dialect(run, two, tmp_path):
    run("blend", "a=1", "b=0.5", "-m", "linear", "-o", tmp_path / "x", code=2)
    run("blend", "a=1", "b=0.5", "-m", "linear", "--dialect", "peft", "-o", tmp_path / "x")


def test_a_blend_that_is_not_what_its_recipe_makes_is_damage(run, two, tmp_path, monkeypatch):
    run("blend", "a", "b", "-o", "mix")
    from adapterkit.hub.mixing import rebuild

    real = rebuild.blend
    monkeypatch.setattr(
        rebuild, "blend", lambda sources, **rest: real([(s, 2 * w) for s, w in sources], **rest)
    )
    done = run("blend", "--verify", "mix", code=5)
    assert "not what its recipe makes" in done.stderr and "differs by 1" in done.stderr


def test_inputs_that_are_gone_are_named(run, run_json, two):
    run("blend", "a", "b", "-o", "mix")
    gone = run_json("show", "a")["id"]
    run("rm", "a@1.0")
    assert gone[:20] in run("blend", "--verify", "mix", code=3).stderr
    assert "no blend" in run("blend", "--verify", "b", code=2).stderr


def test_what_is_wrong_is_a_usage_error_that_says_so(run, two, tmp_path):
    run("blend", "a", code=2)
    run("blend", "-o", "mix", code=2)
    run("blend", "a", "-o", "mix:tag", code=2)
    run("blend", "a", "--rank", "0", "-o", "mix", code=2)
    run("blend", "a", "--at", "q_proj", "-o", "mix", code=2)
    run("blend", "a", "--verify", "mix", code=2)
    run("blend", "a", "-m", "nothing", "-o", "mix", code=2)
    run("blend", "never", "-o", "mix", code=3)


def test_a_recipe_keeps_what_no_adapter_carries(run, run_json, two, fixtures, llama, tmp_path):
    run("add", fixtures / "adapters/llama_prefix1", "style", "--base", llama)
    run("blend", "a=0.5", "style", "-o", "mix", code=2)
    shown = run("blend", "a=0.5", "style", "--as", "recipe", "-o", "mix").stdout
    id = run_json("show", "mix")["id"]
    assert shown == f"mix@1.0: a recipe of 2 parts\n  {id}\n  0.5 a@1.0\n  1 style@1.0\n"
    assert run_json("show", "mix")["manifest"]["adapter"]["kind"] == "recipe"
    run("blend", "a", "b", "--as", "recipe", "-o", tmp_path / "x")
    run("add", tmp_path / "x", "again")
    run("blend", "a", "a", "--as", "recipe", "-o", "no", code=4)
    run("blend", "a", fixtures / "adapters/llama_B", "--as", "recipe", "-o", "no", code=2)
    run("blend", "a", "b", "--as", "recipe", "--rank", "4", "-o", "no", code=2)
    run("blend", "a", "b", "--as", "recipe", "-m", "svd", "-o", "no", code=2)


def test_weights_per_module(run, two, tmp_path):
    run("blend", "a=1", "b=1", "--at", r"layers\.0=1,0", "-o", tmp_path / "x")
    config = json.loads((tmp_path / "x/adapter_config.json").read_text())
    assert config["r"] == 16
    found = load_file(tmp_path / "x/adapter_model.safetensors")
    key = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
    used = [int((found[key.format(layer)].abs().sum(1) > 0).sum()) for layer in (0, 1)]
    assert used == [8, 16]


def test_likes_become_one_of_their_kind(run, fixtures, tmp_path):
    gains = [f"{fixtures}/adapters/llama_ia3_{n}" for n in (1, 2)]
    shown = run("blend", f"{gains[0]}=0.7", f"{gains[1]}=-0.3", "-o", tmp_path / "gains").stdout
    assert ": IA3 on down_proj, k_proj, v_proj, " in shown and "rank" not in shown
    prompts = [f"{fixtures}/adapters/llama_prompt{n}" for n in (2, 1)]
    shown = run("blend", *prompts, "-o", tmp_path / "prompts").stdout
    assert ": prompt tuning, " in shown
    found = load_file(tmp_path / "prompts/adapter_model.safetensors")["prompt_embeddings"]
    first = load_file(f"{prompts[0]}/adapter_model.safetensors")["prompt_embeddings"]
    assert (found[: len(first)] == first).all() and len(found) == 2 * len(first)
    failed = run("blend", f"{prompts[0]}=0.5", "-o", tmp_path / "half", code=2)
    assert "takes weight 1, or 0" in failed.stderr and not (tmp_path / "half").exists()


def test_averages_of_adapterhub_are_a_dialect(run, fixtures, tmp_path):
    given = [f"{fixtures}/adapters/bert_ah_l1=1", f"{fixtures}/adapters/bert_ah_l2=-0.5"]
    chosen = ("-m", "lora_linear_only_negate_b", "--dialect", "adapters")
    shown = run("blend", *given, *chosen, "-o", tmp_path / "x").stdout
    assert ": LoRA on query, value, " in shown
    assert (tmp_path / "x/adapter.safetensors").exists()

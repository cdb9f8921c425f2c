"""adapter inspect"""

from __future__ import annotations

import json
import shutil

import torch
from safetensors.torch import load_file, save_file


def test_it_shows_how_a_folder_is_understood(run, sql):
    shown = run("inspect", sql).stdout
    for line in ("  format   peft\n", "  kind     lora\n", "  rank     8 on 4 modules\n"):
        assert line in shown
    assert "adapter_config.json (config), adapter_model.safetensors (weights)" in shown
    assert "\nmodel.layers.0.self_attn.q_proj  A     float32  [8, 64]  2.0 KiB\n" in shown


def test_json_lists_every_tensor_with_its_key(run_json, sql):
    found = run_json("inspect", sql)
    held = load_file(sql / "adapter_model.safetensors")
    assert {row["key"]: row["shape"] for row in found["tensors"]} == {
        key: list(tensor.shape) for key, tensor in held.items()
    }
    assert (found["format"], found["kind"], found["ranks"]) == ("peft", "lora", {"8": 4})
    assert (found["unconsumed"], found["unknown_fields"], found["hints"]) == ([], {}, {})


def test_a_version_is_shown_like_its_folder(run, run_json, sql):
    run("add", sql, "sql")
    assert run_json("inspect", "sql") == run_json("inspect", sql) | {"source": "sql@1.0"}


def test_what_is_wrong_is_shown_and_is_no_failure(run, run_json, sql, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(sql, folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"brand_new": 1}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    held = load_file(folder / "adapter_model.safetensors")
    save_file({**held, "extra": torch.ones(1)}, folder / "adapter_model.safetensors")
    found = run_json("inspect", folder)
    assert (found["unconsumed"], found["unknown_fields"]) == (["extra"], {"brand_new": 1})
    shown = run("inspect", folder).stdout
    assert "error: extra: " in shown and "[unknown-field]" in shown
    assert {"error"} == {row["severity"] for row in found["findings"]}


def test_a_long_list_is_cut_unless_asked_for(run, sql, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(sql, folder)
    held = load_file(folder / "adapter_model.safetensors")
    many = {
        key.replace("layers.0", f"layers.{n}"): tensor.clone()
        for n in range(30)
        for key, tensor in held.items()
    }
    save_file(many, folder / "adapter_model.safetensors")
    shown = run("inspect", folder).stdout
    hidden = len(many) - 40
    assert f"{hidden} tensors more; -v shows all\n" in shown
    assert "layers.29." in run("-v", "inspect", folder).stdout
    assert "more;" not in run("-v", "inspect", folder).stdout


def test_hints_are_taken_and_asked_for(run, tmp_path):
    state = {"a.q.lora_A": torch.ones(2, 4), "a.q.lora_B": torch.ones(4, 2)}
    torch.save(state, tmp_path / "model.pt")
    assert "give --hint alpha=NUMBER" in run("inspect", tmp_path, code=2).stderr
    assert "  hints    alpha=6\n" in run("inspect", tmp_path, "--hint", "alpha=6").stdout


def test_what_cannot_be_read_is_an_error(run, tmp_path):
    assert "is empty" in run("inspect", tmp_path, code=3).stderr
    assert "not" in run("inspect", "nothing", code=3).stderr

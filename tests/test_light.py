"""Commands that need no model load none: shown by the modules that a real process has imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "bitsandbytes", "accelerate", "peft"}
SLOW = HEAVY | {"numpy", "pandas", "huggingface_hub", "rich", "sqlite_utils"}
ADAPTER = "cases/llama.lora_qv/adapter"
PROGRAM = """
import json, sys
from adapterkit.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def modules(*arguments: str) -> set[str]:
    """Top-level modules after `adapter ARGUMENTS`, which must succeed."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_slow(option):
    assert modules(option) & SLOW == set()


def test_no_light_command_imports_torch(fixtures, tmp_path):
    folder, base = str(fixtures / ADAPTER), str(fixtures / "bases/llama")
    remote = f"file://{tmp_path}/remote"
    found = {}
    for arguments in (
        ("add", folder, "sql", "--base", base),
        ("list",),
        ("show", "sql"),
        ("inspect", "sql"),
        ("check", "sql", "--base", base, "--deep"),
        ("base", base, "--weights"),
        ("tag", "sql@1.0", "prod"),
        ("log", "sql"),
        ("search", "sql"),
        ("du",),
        ("diff", "sql", folder),
        ("yank", "sql@1.0", "--undo"),
        ("push", "sql", remote),
        ("pull", f"{remote}#sql", "copy"),
        ("export", "sql", str(tmp_path / "out")),
        ("mv", "copy", "other"),
        ("rm", "other@1.0"),
    ):
        found[arguments[0]] = modules(*arguments) & HEAVY
    assert found == {name: set() for name in found}


def test_merging_dense_weights_imports_no_library_of_models(fixtures, tmp_path):
    folder, base = str(fixtures / ADAPTER), str(fixtures / "bases/llama")
    found = modules("merge", folder, "--base", base, "-o", str(tmp_path / "merged"))
    assert found & HEAVY == {"torch"}

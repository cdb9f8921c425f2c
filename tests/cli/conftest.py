"""Commands run in this process, as a user would type them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from adapterkit.cli.main import main

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """`run("show", "sql")` -> exit_code, stdout, stderr. A bug keeps its traceback."""

    def invoke(*arguments: str | Path, code: int = 0) -> Result:
        done = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
        assert done.exit_code == code, done.output
        return done

    return invoke


@pytest.fixture
def run_json(run: Run) -> Callable[..., Any]:
    return lambda *arguments, code=0: json.loads(run(*arguments, "--json", code=code).stdout)


@pytest.fixture
def sql(fixtures: Path) -> Path:
    """A LoRA adapter of the model `llama`."""
    return fixtures / "cases/llama.lora_qv/adapter"


@pytest.fixture
def llama(fixtures: Path) -> Path:
    return fixtures / "bases/llama"


@pytest.fixture
def stored(run: Run, sql: Path, llama: Path) -> None:
    """sql@1.0 in the registry, with everything that can be recorded."""
    run(
        "add", sql, "sql", "--base", llama, "--trained-on", "nf4", "--tag", "prod",
        "--metric", "loss=0.5", "--note", "first try",
    )  # fmt: skip

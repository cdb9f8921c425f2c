"""The benchmark for a GPU has its logic tested without one: it compares logits before it times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "gpu.py"


def run(*arguments: str) -> str:
    command = [sys.executable, str(BENCH), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_figure_of_the_gpu_bench_runs_on_small_shapes_and_agrees_with_peft() -> None:
    pytest.importorskip("peft")
    said = run("--tiny", "--device", "cpu")
    for base in ("bf16", "NF4"):
        for figure in ("prefill 32", "one token, graph", "4 rows with 4 adapters"):
            assert f"{base}, {figure}: logits differ from those of PEFT by" in said
        assert f"{base}, one token, graph, switched after it was recorded: logits differ" in said
        assert f"{base}, 4 rows with 4 adapters, graph: times the bare base" in said
    assert "bound" in said
    assert said.endswith("not judged\n")

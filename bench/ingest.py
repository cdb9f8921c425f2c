"""What it costs to add an adapter of 500 MB:  python bench/ingest.py [MEGABYTES] [RUNS]

`adapter add` against `sha256sum`, and `cp` with a sync of the copy; adding it again
against `sha256sum` alone. Both sides are processes of their own, in alternation, on the same disk.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

PROGRAM = str(Path(sys.executable).with_name("adapter"))
MOST_NEW, MOST_AGAIN = 1.5, 1.2
WIDTH, RANK = 4096, 64
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base",
    "r": RANK, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none",
}  # fmt: skip
WEIGHTS = "adapter_model.safetensors"


def make(folder: Path, megabytes: int) -> None:
    """A LoRA of random bfloat16 values below 1, of which none is NaN."""
    import numpy as np

    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    pair = 2 * WIDTH * RANK * 2
    header, end = {}, 0
    for layer in range(max(1, megabytes * 1_000_000 // pair)):
        for role, shape in (("A", [RANK, WIDTH]), ("B", [WIDTH, RANK])):
            key = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{role}.weight"
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + pair // 2]}
            end += pair // 2
    text = json.dumps(header).encode()
    random = np.random.default_rng(0)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in header:
            values = random.standard_normal(pair // 4, np.float32) * 0.02
            file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


def add_new(folder: Path, adapter: Path) -> None:
    run(PROGRAM, "--home", folder / "home", "add", adapter, "large")


def copy(folder: Path, adapter: Path) -> None:
    run("sha256sum", adapter / WEIGHTS)
    run("cp", "--reflink=never", adapter / WEIGHTS, folder / "copy")
    run("sync", folder / "copy")


def measure(
    ours: Callable[[], None], theirs: Callable[[], None], clean: Callable[[], None], runs: int
) -> tuple[float, float]:
    """Medians; one run of each before counts for nothing."""
    pairs = []
    for _ in range(runs + 1):
        clean()
        pairs.append((seconds(ours), seconds(theirs)))
    one, two = zip(*pairs[1:], strict=True)
    return statistics.median(one), statistics.median(two)


def main(megabytes: int, runs: int) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder, adapter = Path(name), Path(name, "adapter")
        make(adapter, megabytes)

        def clean() -> None:
            shutil.rmtree(folder / "home", ignore_errors=True)
            (folder / "copy").unlink(missing_ok=True)
            os.sync()

        rows = []
        both = partial(add_new, folder, adapter)
        rows.append(("add", *measure(both, partial(copy, folder, adapter), clean, runs), MOST_NEW))
        digest = partial(run, "sha256sum", adapter / WEIGHTS)
        rows.append(("add again", *measure(both, digest, os.sync, runs), MOST_AGAIN))
        size = (adapter / WEIGHTS).stat().st_size
        machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
        print(f"# Adding an adapter of {size / 1e6:.0f} MB\n")
        print(f"{runs} alternating runs, {machine}.\n")
        print("| what | median | yardstick | median | ratio | bar |\n|---|---|---|---|---|---|")
        for (what, one, two, bar), yardstick in zip(
            rows, ("sha256sum + cp + sync", "sha256sum"), strict=True
        ):
            print(f"| {what} | {one:.2f} s | {yardstick} | {two:.2f} s | {one / two:.2f}x |"
                  f" <= {bar}x |")  # fmt: skip
    good = all(one <= bar * two for _, one, two, bar in rows)
    print("\nAll within the bars." if good else "\nOUTSIDE THE BARS.")
    return 0 if good else 1


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    sys.exit(main(given[0] if given else 500, given[1] if len(given) > 1 else 5))

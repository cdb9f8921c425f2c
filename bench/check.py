"""Does an adapter fit its base?  `adapter check` on a 70B shape, and against PEFT on a 1B shape.

    python bench/check.py [RUNS]

Bases and adapters have real headers over sparse files; every measurement is a process of its own,
so that start-up and memory count. PEFT builds the base on the meta device, its cheapest way.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import shapes

PROGRAM = str(Path(sys.executable).with_name("adapter"))
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ONE_B = {
    "layers": 16, "hidden": 2048, "intermediate": 8192, "heads": 32, "kv_heads": 8,
    "vocab": 128256, "shards": 1,
}  # fmt: skip
MOST_SECONDS, MOST_MB, LEAST_RATIO = 1.0, 150, 20
PEFT = """
import sys, torch, transformers
from peft import PeftModel
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
with torch.device("meta"):
    base = transformers.AutoModelForCausalLM.from_config(config)
try:
    PeftModel.from_pretrained(base, sys.argv[2], low_cpu_mem_usage=True)
    print("loaded")
except Exception as error:
    print("refused", len(str(error)))
"""


def make_adapter(folder: Path, base: Path, rank: int = 16) -> Path:
    """An adapter for every linear layer of a base, its data sparse."""
    folder.mkdir()
    config = json.loads((base / "config.json").read_text())
    sizes = {
        key.removesuffix(".weight"): shape
        for key, shape in shapes._shapes(config)
        if key.removesuffix(".weight").endswith(LINEARS)
    }
    tensors = {
        f"base_model.model.{name}.lora_{half}.weight": shape
        for name, (n_out, n_in) in sizes.items()
        for half, shape in (("A", (rank, n_in)), ("B", (n_out, rank)))
    }
    shapes._write(folder / "adapter_model.safetensors", list(tensors), tensors, "F32")
    fields = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 32,
        "target_modules": list(LINEARS), "base_model_name_or_path": base.name,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def run(command: list[str]) -> tuple[float, float, str]:
    """(seconds, peak resident MB, stdout) of a process."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        _, _, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = 0  # waited for already
        out.seek(0)
        return seconds, usage.ru_maxrss / 1024, out.read().decode()


def alternate(commands: dict[str, list[str]], runs: int) -> dict[str, tuple[float, float, str]]:
    """Medians of time and memory; all commands in turn, the first round is not counted."""
    rounds = [{name: run(command) for name, command in commands.items()} for _ in range(runs + 1)]
    return {
        name: (
            statistics.median(each[name][0] for each in rounds[1:]),
            statistics.median(each[name][1] for each in rounds[1:]),
            rounds[-1][name][2],
        )
        for name in commands
    }


def main(runs: int) -> int:
    # an installed program has its bytecode, as PEFT has
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        os.environ |= {"ADAPTERKIT_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1"}
        large, small = shapes.make_base(root / "70b"), shapes.make_base(root / "1b", **ONE_B)
        for_large, for_small = (make_adapter(root / f"for-{b.name}", b) for b in (large, small))
        wide = shapes.make_base(root / "wide", **{**ONE_B, "hidden": 3072, "heads": 48})
        add = [PROGRAM, "add", str(for_large), "team/large", "--base", str(large)]
        subprocess.run(add, check=True, capture_output=True)
        found = alternate(
            {
                "70B, from a folder": [PROGRAM, "check", str(for_large), "--base", str(large)],
                "70B, identity recorded": [PROGRAM, "check", "team/large", "--base", str(large)],
                "1B, fits": [PROGRAM, "check", str(for_small), "--base", str(small)],
                "1B, PEFT": [sys.executable, "-c", PEFT, str(small), str(for_small)],
                "1B, another size": [PROGRAM, "check", str(for_small), "--base", str(wide)],
                "1B, another size, PEFT": [sys.executable, "-c", PEFT, str(wide), str(for_small)],
            },
            runs,
        )
    print("| what | median | peak memory | says |\n|---|---|---|---|")
    for name, (seconds, memory, said) in found.items():
        first = said.strip().splitlines()[0].replace(place, "") if said.strip() else ""
        print(f"| {name} | {seconds * 1000:.0f} ms | {memory:.0f} MB | {first[:60]} |")
    ratios = {
        name: found[f"{name}, PEFT"][0] / found[ours][0]
        for name, ours in {"1B": "1B, fits", "1B, another size": "1B, another size"}.items()
    }
    # PEFT's time on a 1B shape against ours on a 70B shape is the figure to reach
    ratios["1B in PEFT against 70B here"] = found["1B, PEFT"][0] / found["70B, from a folder"][0]
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.0f}x faster than PEFT")
    worst = [found[name] for name in found if name.startswith("70B")]
    good = all(s < MOST_SECONDS and mb < MOST_MB for s, mb, _ in worst)
    good &= min(ratios.values()) >= LEAST_RATIO
    print("within the bars" if good else "OUTSIDE THE BARS", end="")
    print(f": 70B < {MOST_SECONDS:g} s, < {MOST_MB} MB; >= {LEAST_RATIO}x PEFT")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 7))

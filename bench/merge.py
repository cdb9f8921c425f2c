"""One adapter into a bf16 base on disk: against PEFT's merge_and_unload + save_pretrained, and cp.

    python bench/merge.py [RUNS] [--layers 16 --vocab 128256 ...]     (defaults: a third of 1B)

Every measurement is a process of its own, imports and all. RssAnon is read every 5 ms: what a
process holds beside files that the kernel may drop. Time of the processor stands beside that of the
clock, as on a busy machine only the former tells anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import shapes
import torch
from safetensors.torch import load_file, save_file

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEFAULT = {
    "layers": 4, "hidden": 2048, "intermediate": 8192, "heads": 32, "kv_heads": 8,
    "vocab": 32000, "shards": 2,
}  # fmt: skip
LEAST_RATIO, MOST_OVER_COPY, BESIDE = 3.0, 2.0, 400
OURS = """
import sys, warnings
warnings.simplefilter("ignore")
from adapterkit.hub import merge
merge([sys.argv[1]], base=sys.argv[2], out=sys.argv[3])
"""
PEFT = """
import sys, torch, transformers
from peft import PeftModel
base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.bfloat16)
merged = PeftModel.from_pretrained(base, sys.argv[1]).merge_and_unload()
merged.save_pretrained(sys.argv[3])
"""
COPY = """
import os, sys
from pathlib import Path
target = Path(sys.argv[3])
target.mkdir()
for path in Path(sys.argv[2]).iterdir():
    with path.open("rb") as source, (target / path.name).open("wb") as copy:
        while data := source.read(1 << 23):
            copy.write(data)
        copy.flush()
        os.fsync(copy.fileno())
"""


def fill(base: Path) -> int:
    """Random values into the sparse files; bytes of the largest tensor."""
    largest = 0
    generator = torch.Generator().manual_seed(0)
    for path in sorted(base.glob("*.safetensors")):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            size = tensor.shape if tensor.ndim > 1 else (1,)
            values = torch.randn(size, generator=generator) * 0.02
            tensors[name] = values.bfloat16() if tensor.ndim > 1 else torch.ones_like(tensor)
            largest = max(largest, tensor.numel() * tensor.element_size())
        save_file(tensors, path, {"format": "pt"})
    return largest


def make_adapter(folder: Path, base: Path, rank: int = 16) -> Path:
    folder.mkdir()
    config = json.loads((base / "config.json").read_text())
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for key, (n_out, *rest) in shapes._shapes(config):
        name = key.removesuffix(".weight")
        if name.endswith(LINEARS):
            stem = f"base_model.model.{name}.lora"
            tensors[f"{stem}_A.weight"] = torch.randn(rank, rest[0], generator=generator) * 0.02
            tensors[f"{stem}_B.weight"] = torch.randn(n_out, rank, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 32,
        "target_modules": list(LINEARS), "base_model_name_or_path": base.name,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def run(program: str, *arguments: Path) -> tuple[float, float, float]:
    """(seconds, peak RssAnon in MB, seconds of the processor) of a process."""
    before = os.times()
    start = time.perf_counter()
    command = [sys.executable, "-c", program, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = [0.0]
    watcher = threading.Thread(target=watch, args=(process, peak))
    watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    if process.returncode:
        raise SystemExit(errors.decode())
    after = os.times()
    used = after.children_user - before.children_user
    return seconds, peak[0], used + after.children_system - before.children_system


def watch(process: subprocess.Popen[bytes], peak: list[float]) -> None:
    path = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            text = path.read_text()
        except OSError:
            return
        found = [line.split()[1] for line in text.splitlines() if line.startswith("RssAnon")]
        peak[0] = max([peak[0], *(int(each) / 1024 for each in found)])
        time.sleep(0.005)


def agree(ours: Path, theirs: Path) -> float:
    """The share of values that are the same: PEFT rounds a product to bf16 before it adds it."""
    same = count = 0
    found = {k: v for path in ours.glob("*.safetensors") for k, v in load_file(path).items()}
    for path in theirs.glob("*.safetensors"):
        for key, tensor in load_file(path).items():
            torch.testing.assert_close(found[key], tensor, atol=2e-3, rtol=2e-2)
            same += int((found[key] == tensor).sum())
            count += tensor.numel()
    return same / count


def measured(root: Path, base: Path, adapter: Path, runs: int) -> dict[str, list[float]]:
    """Medians; all in turn, the first round is not counted."""
    programs = {"copying": COPY, "adapterkit": OURS, "PEFT": PEFT}
    rounds: list[dict[str, Any]] = []
    for number in range(runs + 1):
        done = {}
        for name, program in programs.items():
            out = root / f"{name}-{number}"
            done[name] = run(program, adapter, base, out)
            if number:
                subprocess.run(["rm", "-r", str(out)], check=True)
        rounds.append(done)
    return {
        name: [statistics.median(each[name][i] for each in rounds[1:]) for i in range(3)]
        for name in programs
    }


def main(runs: int, sizes: dict[str, Any]) -> int:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        os.environ |= {"ADAPTERKIT_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1"}
        base = shapes.make_base(root / "base", **sizes)
        largest = fill(base) / 1024**2
        adapter = make_adapter(root / "adapter", base)
        found = measured(root, base, adapter, runs)
        share = agree(root / "adapterkit-0", root / "PEFT-0")
        total = sum(path.stat().st_size for path in base.glob("*.safetensors")) / 1024**2
    print(f"weights {total:.0f} MB, largest tensor {largest:.0f} MB, {share:.2%} of values equal\n")
    print("| what | median | processor | peak RssAnon |\n|---|---|---|---|")
    for name, (seconds, memory, used) in found.items():
        print(f"| {name} | {seconds:.2f} s | {used:.2f} s | {memory:.0f} MB |")
    ratio = found["PEFT"][0] / found["adapterkit"][0]
    over = found["adapterkit"][0] / found["copying"][0]
    memory = found["adapterkit"][1]
    less = found["PEFT"][2] / found["adapterkit"][2]
    print(f"\n{ratio:.1f}x faster than PEFT ({less:.1f}x by processor), bar {LEAST_RATIO:g}x")
    print(f"{over:.1f}x the time of copying the files, bar {MOST_OVER_COPY:g}x")
    print(f"{memory:.0f} MB, bar 2 x largest + {BESIDE} MB = {2 * largest + BESIDE:.0f} MB")
    good = ratio >= LEAST_RATIO and over <= MOST_OVER_COPY and memory <= 2 * largest + BESIDE
    print("within the bars" if good else "OUTSIDE THE BARS")
    return 0 if good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=int, nargs="?", default=3)
    for option in fields(shapes.Sizes):
        default: Any = DEFAULT.get(option.name, option.default)
        flag = f"--{option.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default)
    given = vars(parser.parse_args())
    sys.exit(main(given.pop("runs"), given))

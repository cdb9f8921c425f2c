"""Start-up times against the imports they cannot do without:  python bench/startup.py [RUNS]

Each command and its yardstick run in alternation, as processes of their own; medians are compared.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
ADAPTERS = ROOT / "tests/data/adapters"
PROGRAM = str(Path(sys.executable).with_name("adapter"))
CLICK = [sys.executable, "-c", "import click"]
SQLITE = [sys.executable, "-c", "import click, sqlite_utils"]
# command, yardstick, the most it may take of it
BARS = {
    "adapter --help": (CLICK, 2.5),
    "adapter list": (SQLITE, 1.5),
    "adapter show a": (SQLITE, 1.5),
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def compare(command: list[str], yardstick: list[str], runs: int) -> tuple[float, float]:
    """Medians (command, yardstick); one run of each before counts for nothing."""
    pairs = [(seconds(command), seconds(yardstick)) for _ in range(runs + 1)][1:]
    ours, theirs = zip(*pairs, strict=True)
    return statistics.median(ours), statistics.median(theirs)


def main(runs: int) -> int:
    # an installed program has its bytecode, as the yardsticks' modules have
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as home:
        os.environ["ADAPTERKIT_HOME"] = home
        for number, name in enumerate("abcde"):
            folder = sorted(path for path in ADAPTERS.iterdir() if path.name.startswith("llama_"))
            command = [PROGRAM, "add", str(folder[number]), name]
            subprocess.run(command, check=True, capture_output=True)
        print("# Start-up times\n")
        machine = f"{os.cpu_count()} cores, {platform.machine()}"
        print(f"{runs} alternating runs, Python {platform.python_version()}, {machine}.\n")
        print("| command | median | yardstick | median | ratio | bar |\n|---|---|---|---|---|---|")
        good = True
        for text, (yardstick, bar) in BARS.items():
            ours, theirs = compare([PROGRAM, *text.split()[1:]], yardstick, runs)
            good &= ours <= bar * theirs
            row = (f"`{text}`", f"{ours * 1000:.0f} ms", f"`{yardstick[-1]}`",
                   f"{theirs * 1000:.0f} ms", f"{ours / theirs:.2f}x", f"<= {bar}x")  # fmt: skip
            print(f"| {' | '.join(row)} |")
    print("\nAll within the bars." if good else "\nOUTSIDE THE BARS.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 15))

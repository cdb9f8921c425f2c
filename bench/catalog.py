"""The registry at 100,000 versions of 20,000 names.

    python bench/catalog.py [VERSIONS [RUNS [FOLDER]]]

Questions are asked by the command, as a process of its own, in alternation with the same command on
one of five versions: the difference is what the size costs. Making the catalog anew, verify and gc
are processes of their own too, of which the time, the computing and the most memory are told.
Beside it: the scan of a Hugging Face cache of as many repositories and revisions. The log and the
manifests are what `add` writes, written without waiting for the disk; all versions share one file
of weights. What is built is kept in FOLDER and used again.
"""

from __future__ import annotations

import hashlib
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

from adapterkit.registry import FileEntry, Manifest, Meaning, Registry
from adapterkit.registry.log import Place, make_record

PROGRAM = str(Path(sys.executable).with_name("adapter"))
PER_NAME = 5
ONE = "team0/model-0"
QUESTIONS = {
    "list": ["list", "team7/*-31*"],
    "list --where": ["list", "team7/*", "--kind", "lora", "--where", "loss<0.01", "--sort", "loss"],
    "show": ["show", ONE],
    "search": ["search", "word7", "word77"],
    "tag": ["tag", f"{ONE}@1.0", "run-{}"],  # another word each time
}
BARRED = {"list", "show", "search", "tag"}
MOST_SECONDS, MOST_ADD, MOST_REBUILD, MOST_MEMORY = 0.3, 2.0, 60.0, 300.0
REBUILD = """
import sys
from pathlib import Path
from adapterkit.registry import Registry
with Registry(Path(sys.argv[1])) as registry:
    registry.rebuild()
    assert len(registry.versions("team0/model-0")) == 5
"""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(home: Path, versions: int) -> None:
    with Registry(home) as registry:
        registry.add(ONE, {"adapter_model.safetensors": b"w" * 1000}, meaning(0))
    place, lines = Place(), []
    for number, name in enumerate(names(versions)):
        metrics = b'{"loss":%.6f}' % random.random()
        note = b"word%d word%d of note %d" % (number % 50, number % 91, number)
        manifest = Manifest.of([FileEntry("adapter_model.safetensors", WEIGHTS, 1000, "weights")],
                               meaning(number)).dump()  # fmt: skip
        payload = {"name": name, "version": f"1.{number % PER_NAME}", "id": put(home, manifest)}
        attachments = [attachment(home, "metrics", metrics), attachment(home, "note", note)]
        tags = ["prod"] if number % PER_NAME == 2 else []
        payload |= {"tags": tags, "attachments": attachments}
        when = f"2026-01-01T00:00:{number % 60:02}Z"
        record = make_record(place, "version", payload, when, "a@b")
        lines.append(record.line())
        end = place.offset + len(lines[-1])
        place = Place(end, place.offset, record.seq, record.digest)
    (home / "log").write_bytes(b"".join(lines))
    for path in home.glob("catalog.db*"):
        path.unlink()


NUMBERS = count()
WEIGHTS = hashlib.sha256(b"w" * 1000).hexdigest()


def names(versions: int) -> Iterator[str]:
    for number in range(versions):
        model = number // PER_NAME
        yield f"team{model % 20}/model-{model}"


def meaning(number: int) -> Meaning:
    random.seed(number)
    adapter = {
        "kind": "lora", "variant": "LoRA", "rank": 2 ** (number % 7), "format": "peft",
        "target_modules": TARGETS[: 1 + number % 7], "modules": 224,
        "tensors": {"count": 448, "root": f"sha256:{random.randbytes(32).hex()}"},
    }  # fmt: skip
    return Meaning(adapter, {"id": f"org/base-{number % 40}"})


def put(home: Path, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    path = home / "blobs/sha256" / digest[:2] / digest
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return digest


def attachment(home: Path, kind: str, data: bytes) -> dict[str, object]:
    return {"kind": kind, "name": "", "digest": put(home, data), "size": len(data)}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ask(home: Path, question: list[str]) -> None:
    words = [word.format(next(NUMBERS)) for word in question]
    command = [PROGRAM, "--home", str(home), *words]
    subprocess.run(command, check=True, capture_output=True)


def alone(*command: object) -> tuple[float, float, float]:
    """Wall seconds, seconds of computing, and the most memory in MB of a process."""
    words, start = [str(word) for word in command], time.perf_counter()
    child = os.posix_spawn(words[0], words, os.environ, file_actions=[
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)])  # fmt: skip
    _, status, used = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}")
    wall = time.perf_counter() - start
    return wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def whole(home: Path, runs: int) -> bool:
    """What looks at everything there is: the fastest of some runs."""
    works = {
        "rebuild": [sys.executable, "-c", REBUILD, home],
        "`adapter verify`": [PROGRAM, "--home", home, "verify"],
        "`adapter gc --dry-run`": [PROGRAM, "--home", home, "gc", "--dry-run"],
    }
    print("| what | wall | computing | peak memory | bar | reached |\n|---|---|---|---|---|---|")
    good = True
    for what, command in works.items():
        wall, work, memory = min(alone(*command) for _ in range(runs))
        first = what == "rebuild"
        bar = f"< {MOST_REBUILD:.0f} s" if first else f"< {MOST_MEMORY:.0f} MB"
        reached = wall < MOST_REBUILD if first else memory < MOST_MEMORY
        print(f"| {what} | {wall:.1f} s | {work:.1f} s | {memory:.0f} MB | {bar} |"
              f" {'yes' if reached else 'NO'} |")  # fmt: skip
        good &= reached
    return good


def add(home: Path) -> None:
    content = os.urandom(1 << 20)
    with Registry(home) as registry:
        registry.add(ONE, {"adapter_model.safetensors": content}, meaning(next(NUMBERS)))


def alternate(one: Callable[[], object], two: Callable[[], object], runs: int) -> list[float]:
    """Medians of both; one run of each before counts for nothing."""
    pairs = [(seconds(one), seconds(two)) for _ in range(runs + 1)][1:]
    return [statistics.median(times) for times in zip(*pairs, strict=True)]


def cache(folder: Path, versions: int) -> float:
    """How long huggingface_hub takes to scan as many repositories and revisions."""
    from huggingface_hub import scan_cache_dir

    blob = b"{}"
    for number in range(0 if folder.exists() else versions):  # kept from an earlier run
        repo = folder / f"models--team--model-{number // PER_NAME}"
        revision = hashlib.sha1(b"%d" % number).hexdigest()
        snapshot = repo / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (repo / "blobs").mkdir(exist_ok=True)
        (repo / "blobs" / revision).write_bytes(blob)
        (snapshot / "adapter_config.json").symlink_to(f"../../blobs/{revision}")
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs/main").write_text(revision)
    return seconds(lambda: scan_cache_dir(folder))


def row(what: str, large: float, small: float, bar: str, good: bool) -> bool:
    print(f"| {what} | {large:.3f} s | {small:.3f} s | {large - small:+.3f} s | {bar} |"
          f" {'yes' if good else 'NO'} |")  # fmt: skip
    return good


def main(versions: int, runs: int, kept: Path | None = None) -> int:
    with tempfile.TemporaryDirectory() as folder:
        large, small, empty = (Path(folder, name) for name in ("large", "small", "empty"))
        large = kept / "large" if kept else large
        if not large.exists():
            build(large, versions)
        build(small, PER_NAME)
        Registry(small).close()
        machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
        machine += f", load {os.getloadavg()[1]:.1f} at the start"
        print(f"# A registry of {versions:,} versions\n\n{runs} alternating runs, {machine}.\n")
        good = whole(large, 1)
        print("\n| what | large | small | difference | bar | reached |\n|---|---|---|---|---|---|")
        for what, question in QUESTIONS.items():
            ours, least = partial(ask, large, question), partial(ask, small, question)
            times = alternate(ours, least, runs)
            bar = f"difference < {MOST_SECONDS} s" if what in BARRED else "none"
            reached = times[0] - times[1] < MOST_SECONDS or what not in BARRED
            good &= row(f"`adapter {what}`", *times, bar, reached)
        times = alternate(partial(add, large), partial(add, empty), runs)
        good &= row("add of 1 MiB", *times, f"< {MOST_ADD:.0f}x", times[0] < MOST_ADD * times[1])
        scan = cache((kept or Path(folder)) / "cache", versions)
        print(f"\nBeside it: huggingface_hub's scan_cache_dir (`hf cache scan`), which every of its"
              f" listings needs, over {versions // PER_NAME:,} repositories and {versions:,}"
              f" revisions: {scan:.1f} s.")  # fmt: skip
    print("\nAll within the bars." if good else "\nOUTSIDE THE BARS.")
    return 0 if good else 1


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:3]]
    place = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    sys.exit(main(given[0] if given else 100_000, given[1] if len(given) > 1 else 9, place))

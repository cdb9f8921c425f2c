"""Sides timed in turn, and what is printed of them."""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS["wall"]


def seconds(work: Callable[[], object]) -> float:
    start = clock()
    work()
    return clock() - start


class Times(dict[str, list[float]]):
    """Seconds of each side. more: of what it takes more than the base just before it."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__((name, []) for name in names)
        self.more: dict[str, list[float]] = {name: [] for name in self}


def alternate(sides: Mapping[str, Callable[[], object]], repeats: int, warm: int = 1) -> Times:
    """The first side is the base, and comes before every other: on a machine that others use, what
    slows one of them down slows both. Each round begins with another side; the first rounds are
    not counted."""
    base, *names = sides
    found = Times(sides)
    gc.collect()
    gc.disable()
    for number in range(repeats + warm):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            plain, spent = seconds(sides[base]), seconds(sides[name])
            if number >= warm:
                found[base].append(plain)
                found[name].append(spent)
                found.more[name].append(spent - plain)
    gc.enable()
    return found


def median(times: list[float]) -> float:
    return statistics.median(times)


def over(times: Times, side: str) -> float:
    """What a side takes more than the base."""
    return median(times.more[side])


def least_share(times: Times, side: str, peer: str) -> float:
    """What a side takes more than the base, in parts of what its peer does, by the least times: a
    busy machine disturbs those less."""
    base = min(times[next(iter(times))])
    return (min(times[side]) - base) / (min(times[peer]) - base)


class Report:
    """Prints Markdown; `close` is the exit code: 1 where a bar was missed. judged: whether there
    are bars; none hold for a small model."""

    def __init__(self, title: str, given: argparse.Namespace, *, judged: bool = True) -> None:
        self._missed: list[str] = []
        self._judged = judged
        load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
        used = ", ".join(f"{name} {version(name)}" for name in ("peft", "transformers", "torch"))
        print(f"# {title}\n")
        print(f"{os.cpu_count()} cores, {platform.machine()}, load {load},", end=" ")
        print(f"Python {platform.python_version()}, {used}, {time.strftime('%Y-%m-%d')};", end=" ")
        kind = "processor" if clock is CLOCKS["cpu"] else "clock"
        print(f"seconds of the {kind}, {torch.get_num_threads()} threads.\n")
        print("Options:", ", ".join(f"{k} {v}" for k, v in vars(given).items()), flush=True)

    def table(self, title: str, *columns: str) -> None:
        print(f"\n## {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)

    def row(self, *cells: object) -> None:
        print(f"| {' | '.join(map(str, cells))} |", flush=True)

    def say(self, line: str) -> None:
        print(f"\n{line}", flush=True)

    def times(self, times: Times) -> None:
        """A row for each side: median, least, and what it adds to the base."""
        for name, spent in times.items():
            extra = shown(median(times.more[name])) if times.more[name] else ""
            self.row(name, shown(median(spent)), shown(min(spent)), extra)

    def share(self, what: str, times: Times, sides: tuple[str, str], limit: float) -> None:
        """The bar of an overhead. sides: ours, PEFT's."""
        least = least_share(times, *sides)
        self.bar(f"{what}: overhead, parts of PEFT's (of least times {least:.2f})",
                 over(times, sides[0]) / over(times, sides[1]), limit)  # fmt: skip

    def bar(self, what: str, found: float, limit: float, *, least: bool = False) -> None:
        """least: the figure must reach the limit, otherwise stay within it."""
        good = found >= limit if least else found <= limit
        if not self._judged:
            print(f"\n- {what}: {found:.4g}", flush=True)
            return
        if not good:
            self._missed.append(what)
        sign, word = (">=" if least else "<="), ("reached" if good else "MISSED")
        print(f"\n- {what}: **{found:.4g}**, bar {sign} {limit:g}: {word}", flush=True)

    def close(self) -> int:
        said = f"OUTSIDE THE BARS: {'; '.join(self._missed)}" if self._missed else "within the bars"
        print(f"\n{said if self._judged else 'not judged'}")
        return 1 if self._missed else 0


def shown(spent: float) -> str:
    """A time to three digits, in the unit that fits it."""
    size = abs(spent)
    unit, by = ("s", 1.0) if size >= 1 else ("ms", 1e3) if size >= 1e-3 else ("µs", 1e6)
    return f"{spent * by:.3g} {unit}"


def arguments(description: str | None, **defaults: Any) -> argparse.Namespace:
    """Every default is an option; --quick is a small model and few repeats, for trying it out.

    --clock cpu counts seconds of the processor, with one thread: on a machine that others use,
    those of the clock say how much they use it. --dtype is that of the base: a processor without
    instructions for bfloat16 takes ten times as long for its products of many rows. --factors is
    that of ours, the base's when left out.
    """
    global clock
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = {"layers": 16, "vocab": 128256, "repeats": 9, "dtype": "bfloat16", **defaults}
    for name, value in known.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="4 layers, vocabulary 4096, 3 repeats")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--factors")
    given = parser.parse_args()
    given.dtype = getattr(torch, given.dtype)
    given.factors = getattr(torch, given.factors) if given.factors else None
    clock = CLOCKS[given.clock]
    if given.clock == "cpu":
        torch.set_num_threads(1)
    if given.quick:
        given.layers, given.vocab, given.repeats = 4, 4096, min(given.repeats, 3)
    return given

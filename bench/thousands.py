"""A thousand adapters under a budget of 64:  python bench/thousands.py

1,000 versions of rank 2 in bf16 lie in a registry; each batch of 8 rows asks for 8 of them, drawn
by Zipf's law. What is not on the model is loaded, and the least recently used make room. Each batch
comes twice, the second time with its rows the other way round: all of it is there, in a mix that
is new, which is the path of a hit. Beside it, a new mix on a model with 64 adapters attached the
plain way. PEFT has nothing like it.

    --quick                 4 layers, a small vocabulary, 100 adapters under a budget of 16
    --adapters 1000 --held 64 --batches 200
    --clock cpu             for a machine that others use
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama
import rounds
import torch

from adapterkit.hub import Adapters, attach
from adapterkit.hub.ingest import add
from adapterkit.registry import Registry

ROWS, RANK, SKEW = 8, 2, 1.0
HIT = 1e-3  # seconds that the path of a hit may add to a batch
Spent = dict[str, list[float]]


def fill(registry: Registry, folders: dict[str, Path]) -> list[str]:
    for name, folder in folders.items():
        add(registry, folder, f"many/{name}")
    return [f"many/{name}@1.0" for name in folders]


def requests(references: Sequence[str], batches: int) -> list[list[str]]:
    """Rows of batches; the first reference is asked for most."""
    chances = 1 / torch.arange(1, len(references) + 1).double() ** SKEW
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(chances, batches * ROWS, replacement=True, generator=generator)
    return [[references[i] for i in rows] for rows in drawn.view(batches, ROWS).tolist()]


def anonymous() -> int:
    """Bytes of memory that are this process's own: not those of files that the kernel may drop."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def batch(adapters: Adapters, names: Sequence[str], step: llama.Step, model: Any) -> list[float]:
    """[seconds until the routing stands, seconds of all]."""
    start = rounds.clock()
    with adapters.routed(list(names)):
        ready = rounds.clock()
        step(model)
    return [ready - start, rounds.clock() - start]


class Budgeted:
    """The model under test, beside one with as many adapters attached the plain way."""

    def __init__(self, bare: Any, registry: Registry, folders: dict[str, Path], given: Any) -> None:
        self.step = llama.Step(bare, ROWS)
        self.plain_model, self.model = llama.twin(bare), llama.twin(bare)
        self.plain = attach(
            self.plain_model,
            dict(itertools.islice(folders.items(), given.held)),
            dtype=given.factors,
        )
        self.plain.activate([])
        batch(
            self.plain, self.plain.names[:ROWS], self.step, self.plain_model
        )  # what a forward takes
        self.size = max(self.plain.report[name].size for name in self.plain.names)
        self.budget = given.held * self.size
        self.before = anonymous()
        self.adapters = attach(
            self.model, registry=registry, budget=self.budget, dtype=given.factors
        )
        self.spent: Spent = {}
        self.most = self.grown = 0

    def _note(self, kind: str, found: list[float]) -> None:
        for part, value in zip(("entered", "whole"), found, strict=True):
            self.spent.setdefault(f"{kind}, {part}", []).append(value)

    def run(self, asked: Sequence[Sequence[str]]) -> None:
        names = itertools.cycle(self.plain.names)
        for number, rows in enumerate(asked):
            misses = self.adapters.counters.misses
            first = batch(self.adapters, rows, self.step, self.model)
            missed = self.adapters.counters.misses - misses
            again = batch(self.adapters, rows[::-1], self.step, self.model)
            plain = batch(self.plain, [next(names) for _ in rows], self.step, self.plain_model)
            if number:
                self._note("missed" if missed else "all there", first)
                self._note("again", again)
                self._note("plain", plain)
            self.most = max(self.most, self.adapters.counters.held)
            self.grown = max(self.grown, anonymous() - self.before)


def check(bare: Any, found: Budgeted, folders: dict[str, Path], rows: Sequence[str]) -> str:
    """The same rows on a model that has only them."""
    names = [row.removeprefix("many/").removesuffix("@1.0") for row in rows]
    model = llama.twin(bare)
    adapters = attach(model, {name: folders[name] for name in dict.fromkeys(names)})
    with adapters.routed(names):
        expected = found.step(model)
    with found.adapters.routed(list(rows)):
        logits = found.step(found.model)
    return llama.require_same(
        "the last batch", logits, expected, found.step(bare), "a model of its own"
    )


def tell(report: rounds.Report, found: Budgeted) -> None:
    spent = found.spent
    report.table("A batch of 8 rows, 8x1 behind a cache", "what", "batches", "median", "least")
    for name, times in spent.items():
        report.row(name, len(times), rounds.shown(rounds.median(times)), rounds.shown(min(times)))
    counters = found.adapters.counters
    asked = counters.hits + counters.misses
    report.say(
        f"{asked} requests: {counters.hits} hits, {counters.misses} misses,"
        f" {counters.evicted} made room; {counters.loaded / 2**20:.0f} MiB were loaded"
    )
    mb = 1024**2
    report.say(
        f"one adapter {found.size / mb:.2f} MiB, budget {found.budget / mb:.0f} MiB; held at most"
        f" {found.most / mb:.0f} MiB, memory of the process grown by {found.grown / mb:.0f} MiB"
    )
    median = rounds.median
    adds = median(spent["again, entered"]) - median(spent["plain, entered"])
    whole = median(
        [a - b for a, b in zip(spent["again, whole"], spent["plain, whole"], strict=True)]
    )
    report.say(f"the whole batch, by pairs: {rounds.shown(whole)} more than with plain routing")
    report.bar("a hit adds to plain routing, ms per batch", adds * 1e3, HIT * 1e3)
    report.bar("bytes held, parts of the budget", found.most / found.budget, 1.0)
    # what is allocated beside the bank: Python's objects for the names, and the last forward
    report.bar("memory grown, parts of the budget", found.grown / found.budget, 1.25)


def main() -> int:
    given = rounds.arguments(__doc__, adapters=1000, held=64, batches=200)
    if given.quick:
        given.adapters, given.held, given.batches = 100, 16, 20
    sizes = llama.Sizes(layers=given.layers, vocab=given.vocab)
    report = rounds.Report("A thousand adapters under a budget", given)
    with tempfile.TemporaryDirectory() as place, llama.quietly():
        root = Path(place)
        folders = llama.write_adapters(root, sizes, given.adapters, RANK, torch.bfloat16)
        with Registry(root / "home") as registry:
            references = fill(registry, folders)
            bare = llama.build(sizes, dtype=given.dtype)
            found = Budgeted(bare, registry, folders, given)
            asked = requests(references, given.batches)
            found.run(asked)
            report.say(check(bare, found, folders, asked[-1]))
            tell(report, found)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())

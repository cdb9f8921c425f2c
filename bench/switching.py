"""Changing which adapter is active, against PEFT's set_adapter:  python bench/switching.py

The call alone, among 16 and among 64 that are attached; then the call and the next decoding step,
beside a step of the bare base and a step of PEFT's without a switch. The first activation of each
adapter, which may have to pack it, is a figure of its own.

    --quick                 4 layers, a small vocabulary
    --adapters 64           how many the larger set has
    --clock cpu             for a machine that others use
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import llama
import rounds
import torch

from adapterkit.hub import Adapters, attach

FEW, USED = 16, 8
CALL_RATIO, STEP_SHARE, EQUAL = 1000.0, 0.6, 1.1


class Side:
    """A model with adapters. switch(name) makes one of them the only active one."""

    def __init__(self, model: Any, names: list[str], switch: Callable[[str], object]) -> None:
        self.model, self.names, self.switch = model, names, switch
        self._turn: Iterator[str] = itertools.cycle(names)

    def among(self, count: int) -> None:
        """Only this many of the names from here on, of all places."""
        self._turn = itertools.cycle(self.names[:: max(1, len(self.names) // count)])

    def next(self) -> None:
        self.switch(next(self._turn))

    def switched(self, step: llama.Step) -> None:
        self.next()
        step(self.model)


def ours(bare: Any, folders: dict[str, Path], factors: torch.dtype | None) -> Side:
    model = llama.twin(bare)
    adapters: Adapters = attach(model, folders, dtype=factors, slots=len(folders))
    return Side(model, list(folders), lambda name: adapters.activate({name: 1.0}))


def theirs(bare: Any, folders: dict[str, Path]) -> Side:
    model = llama.with_peft(llama.twin(bare), folders)
    return Side(model, list(folders), model.set_adapter)


def calls(report: rounds.Report, pairs: dict[int, tuple[Side, Side]], repeats: int) -> None:
    report.table("The call alone", "adapters", "PEFT", "first of each name", "later", "ratio")
    ratios = {}
    for count, (mine, peft) in pairs.items():
        first = [rounds.seconds(mine.next) for _ in mine.names]
        later, old = [], []
        for _ in range(repeats):
            old += [rounds.seconds(peft.next) for _ in range(4)]
            later += [rounds.seconds(mine.next) for _ in mine.names]
        ratios[count] = rounds.median(old) / rounds.median(later)
        shown = [rounds.shown(rounds.median(times)) for times in (old, first, later)]
        report.row(count, *shown, f"{ratios[count]:.0f}x")
    for count, ratio in ratios.items():
        report.bar(f"switch among {count}, times faster", ratio, CALL_RATIO, least=True)


def steps(
    report: rounds.Report, bare: Any, pairs: dict[int, tuple[Side, Side]], repeats: int
) -> None:
    step = llama.Step(bare)
    sides: dict[str, Callable[[], object]] = {"bare base": lambda: step(bare)}
    for count, (mine, peft) in pairs.items():
        sides[f"ours, {count}"] = lambda mine=mine: mine.switched(step)
        sides[f"PEFT, {count}"] = lambda peft=peft: peft.switched(step)
        sides[f"PEFT, {count}, no switch"] = lambda peft=peft: step(peft.model)
    for mine, peft in pairs.values():
        mine.among(USED)
        first = [rounds.seconds(partial(mine.switched, step)) for _ in range(USED)]
        said = rounds.shown(rounds.median(first))
        report.say(f"{len(mine.names)} attached, the first step of each of {USED}: {said}")
        for side in (mine, peft):
            side.switch(side.names[1])
        logits = step(mine.model), step(peft.model), step(bare)
        report.say(llama.require_same(f"{len(mine.names)} attached, one active", *logits))
    found = rounds.alternate(sides, repeats)
    columns = ("switch + decoding step", "median", "least", "more than the base")
    report.table("The next step", *columns)
    report.times(found)
    for count in pairs:
        both = (f"ours, {count}", f"PEFT, {count}, no switch")
        report.share(f"switch among {count} + step, PEFT's without", found, both, STEP_SHARE)
    plain = rounds.median(found["bare base"])
    few, many = (plain + rounds.over(found, f"ours, {count}") for count in pairs)
    report.bar("many attached against few, the longer by the shorter",
               max(few, many) / min(few, many), EQUAL)  # fmt: skip


def main() -> int:
    given = rounds.arguments(__doc__, adapters=64)
    sizes = llama.Sizes(layers=given.layers, vocab=given.vocab)
    report = rounds.Report("Switching the active adapter", given)
    with tempfile.TemporaryDirectory() as place, llama.quietly():
        folders = llama.write_adapters(Path(place), sizes, max(given.adapters, FEW + 1))
        few = dict(itertools.islice(folders.items(), FEW))
        bare = llama.build(sizes, dtype=given.dtype)
        pairs = {
            len(each): (ours(bare, each, given.factors), theirs(bare, each))
            for each in (few, folders)
        }
        calls(report, pairs, given.repeats)
        steps(report, bare, pairs, given.repeats)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())

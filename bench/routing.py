"""Several adapters in one forward, against PEFT:  python bench/routing.py

First 4 active at once on a prompt of 512 tokens and on one decoding step, beside the bare base.
Ours activates another set of 4 before each forward and is charged for it; PEFT is charged for its
forward alone, and with set_adapter on a line of its own. Then 8 rows with 8 different adapters,
8 x 1 behind a cache and 8 x 32: ours enters `routed` inside the timer, PEFT takes adapter_names=.

    --quick                 4 layers, a small vocabulary
    --adapters 64           how many are attached on a further line of the routed figures
    --figures prefill,decode,8x1,8x32
    --clock cpu             for a machine that others use
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import llama
import rounds
import torch
from torch import Tensor

from adapterkit.hub import Adapters, attach

Folders = dict[str, Path]
Run = Callable[..., Tensor]  # of a model, with options for its forward
ROWS = 8
ACTIVE = ROWS // 2
FIGURES = "prefill,decode,8x1,8x32"
PREFILL_SHARE, DECODE_SHARE = 0.15, 0.6
ROUTED_SHARE = {"8x1 decode": 0.25, "8x32": 0.20}


class Pair:
    """The same adapters on a model of ours and on one of PEFT's."""

    def __init__(self, bare: Any, folders: Folders, factors: torch.dtype | None) -> None:
        self.names = list(folders)
        self.mine = llama.twin(bare)
        self.adapters: Adapters = attach(self.mine, folders, dtype=factors)
        self.theirs = llama.with_peft(llama.twin(bare), folders)
        self._turn = itertools.count()

    def set(self) -> list[str]:
        """Every other of the eight, so that no two lie side by side; another four each time."""
        return self.names[next(self._turn) % 2 :: 2]

    def activate(self) -> None:
        self.adapters.activate(self.set())

    def set_adapter(self) -> None:
        self.theirs.base_model.set_adapter(self.set())


def forward(ids: Tensor, model: Any, **options: Any) -> Tensor:
    """A prompt, of which generation needs the last position only."""
    logits: Tensor = model(ids, use_cache=False, logits_to_keep=1, **options).logits
    return logits


def active(report: rounds.Report, bare: Any, pair: Pair, given: Any) -> None:
    ids, step = llama.tokens(bare, 1, given.prompt), llama.Step(bare)
    runs: dict[str, tuple[Run, float]] = {
        f"prefill {given.prompt}": (partial(forward, ids), PREFILL_SHARE),
        "decode 1": (step, DECODE_SHARE),
    }
    for what, (run, limit) in runs.items():
        if what.split()[0] not in given.figures.split(","):
            continue
        sides = {
            "bare base": lambda run=run: run(bare),
            "ours, activate + forward": lambda run=run: (pair.activate(), run(pair.mine)),
            "ours, forward": lambda run=run: run(pair.mine),
            "PEFT, set_adapter + forward": lambda run=run: (pair.set_adapter(), run(pair.theirs)),
            "PEFT, forward": lambda run=run: run(pair.theirs),
        }
        pair.adapters.activate(pair.names[::2])
        pair.theirs.base_model.set_adapter(pair.names[::2])
        logits = [run(model) for model in (pair.mine, pair.theirs, bare)]
        report.say(llama.require_same(f"{what}, {ACTIVE} active", *logits))
        found = rounds.alternate(sides, given.repeats)
        report.table(f"{ACTIVE} active, {what}", "side", "median", "least", "more than the base")
        report.times(found)
        for side in ("ours, activate + forward", "ours, forward"):
            said = f"{what}, {ACTIVE} active, {side}"
            report.share(said, found, (side, "PEFT, forward"), limit)


def routed(report: rounds.Report, bare: Any, pair: Pair, many: Folders, given: Any) -> None:
    large = llama.twin(bare)
    adapters = attach(large, many, dtype=given.factors, slots=len(many))
    adapters.activate([])
    pair.adapters.activate([])
    wanted = pair.names[:ROWS]
    ids, step = llama.tokens(bare, ROWS, 32), llama.Step(bare, ROWS)
    runs: dict[str, Run] = {
        "8x1 decode": step,
        "8x32": partial(forward, ids),
    }
    for what, run in runs.items():
        if what.split()[0] not in given.figures.split(","):
            continue
        sides = {
            "bare base": lambda run=run: run(bare),
            "ours": lambda run=run: _within(pair.adapters, wanted, lambda: run(pair.mine)),
            f"ours, {len(many)} attached": lambda run=run: _within(
                adapters, wanted, lambda: run(large)
            ),
            "PEFT": lambda run=run: run(pair.theirs, adapter_names=wanted),
        }
        logits = sides["ours"](), sides["PEFT"](), sides["bare base"]()
        report.say(llama.require_same(f"{what}, {ROWS} adapters", *logits))
        found = rounds.alternate(sides, given.repeats)
        title = f"{ROWS} rows with {ROWS} adapters, {what}"
        report.table(title, "side", "median", "least", "more than the base")
        report.times(found)
        for side in ("ours", f"ours, {len(many)} attached"):
            sides = (side, "PEFT")
            report.share(f"{what}, {side}", found, sides, ROUTED_SHARE[what])


def _within(adapters: Adapters, names: list[str], run: Callable[[], Tensor]) -> Tensor:
    with adapters.routed(names):
        return run()


def main() -> int:
    given = rounds.arguments(__doc__, adapters=64, prompt=512, figures=FIGURES)
    sizes = llama.Sizes(layers=given.layers, vocab=given.vocab)
    report = rounds.Report("Several adapters in one forward", given)
    with tempfile.TemporaryDirectory() as place, llama.quietly():
        folders = llama.write_adapters(Path(place), sizes, max(given.adapters, ROWS))
        bare = llama.build(sizes, dtype=given.dtype)
        pair = Pair(bare, dict(itertools.islice(folders.items(), ROWS)), given.factors)
        active(report, bare, pair, given)
        routed(report, bare, pair, folders, given)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())

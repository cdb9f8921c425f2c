"""Loading adapters onto a live model, against PEFT's load_adapter:  python bench/loading.py

k adapters from their folders, one made active, one forward of a token; the parts of that apart. The
floor is reading the same files and copying their bytes. Then one adapter of the attached ones is
replaced by another from disk, against PEFT's hotswap_adapter.

    --quick                 4 layers, a small vocabulary
    --counts 4,16,64        the sizes of k
    --repeats 5             PEFT is timed as often for k <= 16, once for more: 64 take it a minute
    --clock cpu             for a machine that others use
"""

from __future__ import annotations

import gc
import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama
import rounds
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor

from adapterkit.hub import Adapters, attach

Folders = dict[str, Path]
FASTER = {16: 5.0, 64: 20.0}
LINEAR, SWAP = 1.5, 8.0
MANY = 16  # from here on PEFT is timed once


class Load:
    """One load of k adapters; seconds of its parts by name."""

    def __init__(self, bare: Any, folders: Folders, given: Any) -> None:
        self.bare, self.folders, self.factors = bare, folders, given.factors
        self.ids = llama.tokens(bare, 1, 1)
        self.first = next(iter(folders))
        self.logits: Tensor = self.ids

    def ours(self) -> dict[str, float]:
        model = llama.twin(self.bare)
        made: list[Any] = []
        spent = {
            "load": rounds.seconds(lambda: made.append(self._attached(model))),
            "activate": rounds.seconds(lambda: made[0].activate({self.first: 1.0})),
            "forward": rounds.seconds(lambda: self._run(model)),
        }
        made[0].detach()
        return spent

    def _attached(self, model: Any) -> Adapters:
        return attach(model, self.folders, dtype=self.factors, slots=len(self.folders))

    def theirs(self) -> dict[str, float]:
        model = llama.twin(self.bare)
        made: list[Any] = []
        return {
            "load": rounds.seconds(lambda: made.append(llama.with_peft(model, self.folders))),
            "activate": rounds.seconds(lambda: made[0].set_adapter(self.first)),
            "forward": rounds.seconds(lambda: self._run(made[0])),
        }

    def floor(self) -> dict[str, float]:
        return {"load": rounds.seconds(self._copied), "activate": 0.0, "forward": 0.0}

    def _copied(self) -> None:
        """As they are: without PEFT's names or ours."""
        place: list[Tensor] = []
        for folder in self.folders.values():
            tensors = load_file(folder / "adapter_model.safetensors")
            place += [tensor.clone() for tensor in tensors.values()]

    def _run(self, model: Any) -> None:
        self.logits = model(self.ids).logits


def medians(call: Callable[[], dict[str, float]], repeats: int) -> dict[str, float]:
    found = []
    for _ in range(repeats):
        gc.collect()
        found.append(call())
    whole = rounds.median([sum(each.values()) for each in found])
    return {part: rounds.median([each[part] for each in found]) for part in found[0]} | {
        "whole": whole
    }


def loads(report: rounds.Report, bare: Any, folders: Folders, given: Any) -> None:
    counts = [int(count) for count in given.counts.split(",")]
    load = Load(bare, dict(itertools.islice(folders.items(), 1)), given)
    load.ours(), load.theirs()  # imports, and files into the page cache
    for folder in folders.values():
        (folder / "adapter_model.safetensors").read_bytes()
    report.table("k adapters and one forward", "k", "side", "load", "activate", "forward", "whole")
    found: dict[tuple[int, str], dict[str, float]] = {}
    for count in counts:
        load = Load(bare, dict(itertools.islice(folders.items(), count)), given)
        sides = {"floor": load.floor, "ours": load.ours, "PEFT": load.theirs}
        logits = {}
        for name, call in sides.items():
            once = name == "PEFT" and count > MANY
            found[count, name] = medians(call, 1 if once else given.repeats)
            logits[name] = load.logits
            report.row(count, name, *map(rounds.shown, found[count, name].values()))
        llama.require_same(
            f"{count} loaded", logits["ours"], logits["PEFT"], load.bare(load.ids).logits
        )
    _judge(report, counts, found)


def _judge(
    report: rounds.Report, counts: list[int], found: dict[tuple[int, str], dict[str, float]]
) -> None:
    for count in counts:
        whole = found[count, "PEFT"]["whole"] / found[count, "ours"]["whole"]
        alone = found[count, "PEFT"]["load"] / found[count, "ours"]["load"]
        report.say(f"k = {count}: {whole:.1f}x faster with the forward, {alone:.1f}x without")
        if count in FASTER:
            report.bar(f"loading {count}, times faster", whole, FASTER[count], least=True)
    if len(counts) > 2:
        # loading and the first activation: whatever is put off is counted here
        spent = [sum(list(found[count, "ours"].values())[:2]) for count in counts]
        pairs = itertools.pairwise(zip(counts, spent, strict=True))
        each = [(b - a) / (m - n) for (n, a), (m, b) in pairs]
        shown = ", ".join(map(rounds.shown, each))
        report.say(f"each further adapter: {shown}")
        report.bar("linear: the last steps' time for one by the first steps'",
                   each[-1] / each[0], LINEAR)  # fmt: skip


def swaps(report: rounds.Report, bare: Any, folders: Folders, given: Any) -> None:
    some = dict(itertools.islice(folders.items(), 4))
    pool = itertools.cycle(list(folders.values())[: llama.DISTINCT])
    mine, model = llama.twin(bare), llama.with_peft(llama.twin(bare), some)
    adapters = attach(mine, some, dtype=given.factors)
    adapters.activate({"a0": 1.0})
    place = {"folder": folders["a0"]}
    sides = {
        "ours": lambda: adapters.swap("a0", place["folder"]),
        "PEFT": lambda: hotswap_adapter(model, str(place["folder"]), adapter_name="a0"),
    }
    found = rounds.Times(sides)
    for number in range(2 * given.repeats + 1):
        place["folder"] = next(pool)
        for name, call in sides.items():
            spent = rounds.seconds(call)
            if number:
                found[name].append(spent)
    ids = llama.tokens(bare, 1, 8)
    logits = [each(ids).logits for each in (mine, model, bare)]
    report.table("One adapter replaced from disk, 4 loaded", "side", "median", "least", "")
    report.times(found)
    report.say(llama.require_same("after the last swap", *logits))
    ratio = rounds.median(found["PEFT"]) / rounds.median(found["ours"])
    report.bar("hot swap, times faster", ratio, SWAP, least=True)


def main() -> int:
    given = rounds.arguments(__doc__, counts="4,16,64", repeats=5)
    sizes = llama.Sizes(layers=given.layers, vocab=given.vocab)
    report = rounds.Report("Loading adapters onto a model", given)
    count = max(int(each) for each in given.counts.split(","))
    with tempfile.TemporaryDirectory() as place, llama.quietly():
        folders = llama.write_adapters(Path(place), sizes, max(count, llama.DISTINCT))
        bare = llama.build(sizes, dtype=given.dtype)
        loads(report, bare, folders, given)
        swaps(report, bare, folders, given)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())

"""The same figures on a GPU, with Llama-7B shapes in bf16 and NF4:  python bench/gpu.py

A prompt of 2,048 tokens and one token, with one adapter; 64 rows of one token with 64 adapters.
Both sides run eagerly, and recorded as a CUDA graph (PEFT's mixed batch cannot be: it makes tensors
of Python lists on the way). One token is a forward without a cache, which a graph can repeat.

For 64 rows nobody is faster than reading the weights of the base and of the adapters once each; the
bar is 1.25 times that bound. Without a GPU it says that the figures are owed, and ends well.

    --adapters 64 --prompt 2048 --repeats 20
    --tiny --device cpu     small shapes anywhere: whether all of it runs and agrees, no figures
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import llama
import rounds
import torch
from torch import Tensor, nn

from adapterkit.hub import Adapters, attach

Run = Callable[[], Tensor]
PREFILL, EAGER_SHARE, GRAPH, BOUND = 1.10, 0.6, 1.35, 1.25


def to_nf4(model: nn.Module) -> nn.Module:
    """Its linear layers but the head, quantized as `load(quantization="nf4")` does."""
    for parent in list(model.model.layers.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Linear):
                setattr(parent, name, _quantized(module))
    setattr(model, "is_loaded_in_4bit", True)  # noqa: B010 (PEFT asks for it)
    return model


def _quantized(linear: nn.Linear) -> nn.Module:
    device, dtype = linear.weight.device, linear.weight.dtype
    found = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    made = bitsandbytes.nn.Params4bit(
        linear.weight.data.cpu(), requires_grad=False, quant_type="nf4", module=found
    )
    found.weight = made.to(device)
    return found


def graphed(run: Run, device: str) -> Run:
    """The same, recorded once and replayed; itself where there are no CUDA graphs."""
    if device != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replayed() -> Tensor:
        graph.replay()
        return result

    return replayed


class Three:
    """The bare base, ours and PEFT's on the same weights, with the same adapters."""

    def __init__(self, bare: Any, folders: dict[str, Path], sizes: llama.Sizes, given: Any) -> None:
        self.device, self.repeats, self.names = given.device, given.repeats, list(folders)
        self.adapter_bytes = 2 * sizes.adapter_values(llama.RANK)
        self.bare, self.mine = bare, llama.twin(bare)
        self.adapters: Adapters = attach(self.mine, folders)
        self.theirs = llama.with_peft(llama.twin(bare), folders)
        self.one(self.names[0])

    def one(self, name: str) -> None:
        self.adapters.activate({name: 1.0})
        self.theirs.set_adapter(name)

    def forward(self, model: Any, ids: Tensor, **options: Any) -> Run:
        """A mask of its own keeps transformers from looking at values, which no graph may."""
        if ids.shape[1] == 1:
            options["attention_mask"] = ids.new_zeros((len(ids), 1, 1, 1), dtype=torch.bfloat16)
        return lambda: model(input_ids=ids, use_cache=False, **options).logits

    def timed(self, sides: dict[str, Run]) -> rounds.Times:
        return rounds.alternate({name: self._synced(run) for name, run in sides.items()},
                                self.repeats, warm=3)  # fmt: skip

    def _synced(self, run: Run) -> Callable[[], None]:
        def synced() -> None:
            run()
            if self.device == "cuda":
                torch.cuda.synchronize()

        return synced


def prefill(report: rounds.Report, three: Three, what: str, length: int) -> None:
    ids = llama.tokens(three.bare, 1, length)
    models = {"bare base": three.bare, "ours": three.mine, "PEFT": three.theirs}
    sides = {name: three.forward(model, ids) for name, model in models.items()}
    said = f"{what}, prefill {length}"
    report.say(llama.require_same(said, sides["ours"](), sides["PEFT"](), sides["bare base"]()))
    found = three.timed(sides)
    report.table(said, "side", "median", "least", "more than the base")
    report.times(found)
    ratio = rounds.median(found["ours"]) / rounds.median(found["bare base"])
    report.bar(f"{said}: times the bare base", ratio, PREFILL)


def switched(report: rounds.Report, three: Three, what: str, folders: dict[str, Path]) -> None:
    """A graph recorded with one adapter, replayed after a switch to another."""
    ids = llama.tokens(three.bare, 1, 1)
    first, second = three.names[:2]
    model = llama.twin(three.bare)
    some = {name: folders[name] for name in (first, second)}
    adapters = attach(model, some, slots=2, max_rank=llama.RANK)
    adapters.activate({first: 1.0})
    run = graphed(three.forward(model, ids), three.device)
    adapters.activate({second: 1.0})
    found = run().clone()
    three.one(second)
    expected, bare = (three.forward(each, ids)() for each in (three.mine, three.bare))
    said = f"{what}, one token, graph, switched after it was recorded"
    report.say(llama.require_same(said, found, expected, bare, "an eager run"))
    three.one(first)


def decode(report: rounds.Report, three: Three, what: str) -> None:
    ids = llama.tokens(three.bare, 1, 1)
    turn = itertools.cycle(three.names)  # another adapter each time
    models = {"bare base": three.bare, "ours": three.mine, "PEFT": three.theirs}
    plain = {name: three.forward(model, ids) for name, model in models.items()}

    def another() -> Tensor:
        three.adapters.activate({next(turn): 1.0})
        return plain["ours"]()

    eager = three.timed({**plain, "ours, with a switch": another})
    three.one(three.names[0])
    expected = plain["ours"]()
    graphs = {f"{name}, graph": graphed(run, three.device) for name, run in plain.items()}
    report.say(llama.require_same(f"{what}, one token, graph", graphs["ours, graph"](),
               graphs["PEFT, graph"](), plain["bare base"]()))  # fmt: skip
    report.say(llama.require_same(f"{what}, one token", graphs["ours, graph"](), expected,
               plain["bare base"](), "the same run eagerly"))  # fmt: skip
    replayed = three.timed(graphs)
    report.table(f"{what}, one token", "side", "median", "least", "more than the base")
    report.times(eager)
    report.times(replayed)
    sides = ("ours, with a switch", "PEFT")
    report.share(f"{what}, one token, eager", eager, sides, EAGER_SHARE)
    ratio = rounds.median(replayed["ours, graph"]) / rounds.median(replayed["bare base, graph"])
    report.bar(f"{what}, one token, graph: times the bare base", ratio, GRAPH)


def mixed(report: rounds.Report, three: Three, what: str) -> None:
    rows = len(three.names)
    ids = llama.tokens(three.bare, rows, 1)
    bare, mine = three.forward(three.bare, ids), three.forward(three.mine, ids)
    peft = three.forward(three.theirs, ids, adapter_names=three.names)
    three.adapters.activate([])

    def routed() -> Tensor:
        with three.adapters.routed(three.names):
            return mine()

    said = f"{what}, {rows} rows with {rows} adapters"
    report.say(llama.require_same(said, routed(), peft(), bare()))
    eager = three.timed({"bare base": bare, "ours": routed, "PEFT, mixed batch": peft})
    with three.adapters.routed(three.names):  # recorded with it, replayed with it
        sides = {"bare base, graph": bare, "ours, graph": mine}
        replayed = three.timed({name: graphed(run, three.device) for name, run in sides.items()})
    report.table(said, "side", "median", "least", "more than the base")
    report.times(eager)
    report.times(replayed)
    read = rows * three.adapter_bytes
    whole = bytes_read(three.bare)
    bound = 1 + read / whole
    report.say(f"adapters {read / 1e9:.3g} GB, base {whole / 1e9:.3g} GB: bound {bound:.3f}")
    for times, mode in ((eager, ""), (replayed, ", graph")):
        ratio = rounds.median(times[f"ours{mode}"]) / rounds.median(times[f"bare base{mode}"])
        report.bar(f"{said}{mode or ', eager'}: times the bare base", ratio, BOUND * bound)


def bytes_read(model: Any) -> int:
    """Of the weights in one forward: all but the table of embeddings, where it is not the head."""
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    total = 0
    for parameter in model.parameters():
        if parameter is not table or head is table:
            total += parameter.numel() * parameter.element_size()
            total += _scales(getattr(parameter, "quant_state", None))
    return total


def _scales(state: Any) -> int:
    if state is None:
        return 0
    nested = _scales(state.state2) if state.nested else 0
    return state.absmax.numel() * state.absmax.element_size() + nested


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: these figures are owed")
        return 0
    sizes = llama.SEVEN_B
    if given.tiny:
        sizes, given.adapters, given.prompt, given.repeats = llama.TINY, 4, 32, 2
    card = torch.cuda.get_device_name() if given.device == "cuda" else "the CPU"
    report = rounds.Report(f"Adapters on {card}", given, judged=not given.tiny)
    with tempfile.TemporaryDirectory() as place, llama.quietly():
        folders = llama.write_adapters(Path(place), sizes, given.adapters, dtype=torch.bfloat16)
        for what in ("bf16", "NF4"):
            bare = llama.build(sizes, given.device)
            three = Three(bare if what == "bf16" else to_nf4(bare), folders, sizes, given)
            prefill(report, three, what, given.prompt)
            decode(report, three, what)
            switched(report, three, what, folders)
            mixed(report, three, what)
            del three, bare
    return report.close()


if __name__ == "__main__":
    sys.exit(main())

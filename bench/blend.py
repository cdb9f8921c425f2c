"""Blending against PEFT's add_weighted_adapter on the same adapters: python bench/blend.py

Prints medians of runs in alternation, their ratio, the memory that ours takes beside the inputs,
and the error of each low-rank result against the dense optimum. k = 4 adapters of rank 16: one
linear layer at a time, as on a model of 7 billion parameters, and a whole model of 1 billion.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from adapterkit.hub.blend.entries import entrywise
from adapterkit.hub.blend.factors import Factors, Term, concatenated
from adapterkit.hub.blend.methods import method
from adapterkit.hub.blend.settings import Place, Settings
from adapterkit.hub.blend.truncate import _by_qr, spectrum
from adapterkit.hub.mixing.blend import blend

K, RANK, DENSITY = 4, 16, 0.2
WEIGHTS = [0.4, 0.3, 0.2, 0.1]
SHAPES = ((4096, 4096), (11008, 4096))
NAMES = [f"a{i}" for i in range(K)]
# Of the linear layers of a model of 1 billion parameters.
WIDTHS = {
    "q_proj": (2048, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048), "o_proj": (2048, 2048),
    "gate_proj": (8192, 2048), "up_proj": (8192, 2048), "down_proj": (2048, 8192),
}  # fmt: skip
PARTS = ("factors", "svd", "ties", "model")


class Layer(nn.Module):
    def __init__(self, n_out: int, n_in: int) -> None:
        super().__init__()
        self.proj = nn.Linear(n_in, n_out, bias=False)


def peft_model(n_out: int, n_in: int) -> peft.PeftModel:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["proj"])
    model = peft.get_peft_model(Layer(n_out, n_in), config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, copy.deepcopy(config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def layer_of(model: peft.PeftModel) -> nn.Module:
    return next(module for module in model.modules() if hasattr(module, "lora_A"))


def terms_of(model: peft.PeftModel) -> list[Term]:
    layer = layer_of(model)
    return [
        Term(w, Factors(layer.lora_B[n].weight.detach(), layer.lora_A[n].weight.detach()), i)
        for i, (n, w) in enumerate(zip(NAMES, WEIGHTS, strict=True))
    ]


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def medians(calls: Sequence[Callable[[], float]], repeats: int) -> list[float]:
    """Of each call's own seconds, in alternation, the first round left out where there are more."""
    rounds = [[call() for call in calls] for _ in range(repeats + (repeats > 1))]
    return [statistics.median(spans) for spans in zip(*rounds[repeats > 1 :], strict=True)]


class Memory(threading.Thread):
    """The most anonymous memory beyond what there was, in MB, seen every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done, self._least, self._most = threading.Event(), anonymous(), 0

    def run(self) -> None:
        while not self._done.wait(0.002):
            self._most = max(self._most, anonymous())

    def __enter__(self) -> Memory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

    @property
    def peak(self) -> float:
        return max(self._most - self._least, 0) / 1e6


def anonymous() -> int:
    """Resident pages that belong to no file, in bytes."""
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def memory(call: Callable[[], object], seconds: float = 0.0) -> float:
    """Of one call, or of as many as fill that time."""
    with Memory() as seen:
        end = time.perf_counter() + seconds
        call()
        while time.perf_counter() < end:
            call()
    return seen.peak


def peft_call(model: peft.PeftModel, kind: str) -> float:
    """Seconds of add_weighted_adapter alone; made anew each time, as a name that exists is left as
    it is."""
    if "mix" in model.peft_config:
        model.delete_adapter("mix")
    return timed(
        lambda: model.add_weighted_adapter(NAMES, WEIGHTS, "mix", kind, density=DENSITY)
    )


def optimum(whole: Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(whole.double())
    return float((values[rank:].square().sum() / values.square().sum()).sqrt())


def distance(whole: Tensor, found: Tensor) -> float:
    return float((whole - found).double().norm() / whole.double().norm())


def row(name: str, theirs: float, ours: float, extra: str = "") -> None:
    print(f"{name:44} {theirs * 1e3:11.1f} ms {ours * 1e3:10.2f} ms {theirs / ours:9.1f}x  {extra}")


def svd(n_out: int, n_in: int) -> None:
    model = peft_model(n_out, n_in)
    given = terms_of(model)
    whole = concatenated(given)

    def by_gram() -> Factors:
        return spectrum(concatenated(given)).truncated(RANK)

    def by_qr() -> Factors:
        return _by_qr(whole).truncated(RANK)

    used = memory(by_gram, 1.0)
    gram, qr = medians([lambda: timed(by_gram), lambda: timed(by_qr)], 31)
    theirs = peft_call(model, "svd")
    dense = whole.rows(0, n_out)
    best = optimum(dense, RANK)
    f = by_gram()
    gap = distance(dense, f.B @ f.A)
    shape = f"{n_out} x {n_in}"
    size = sum(4 * (n_out + n_in) * term.factors.rank for term in given) / 1e6
    note = f"{used:.0f} MB, factors {size:.0f} MB; error {gap:.6f}, optimum {best:.6f}"
    row(f"svd {shape}, from Gram matrices", theirs, gram, note)
    row(f"svd {shape}, from QR", theirs, qr)


def ties(n_out: int, n_in: int) -> None:
    model = peft_model(n_out, n_in)
    given = terms_of(model)
    settings = Settings(dialect="peft", rank=RANK, density=DENSITY)
    run = method("ties_svd", settings)
    used = memory(lambda: run(given, Place("proj", settings)))
    ours = statistics.median(timed(lambda: run(given, Place("proj", settings))) for _ in range(3))
    theirs = peft_call(model, "ties_svd")
    found = run(given, Place("proj", settings))
    layer = layer_of(model)
    dense = entrywise("ties")(given, Place("proj", settings)).whole()
    gap = distance(dense, layer.lora_B["mix"].weight @ layer.lora_A["mix"].weight)
    note = f"{used:.0f} MB; error {found.error:.4f}, PEFT's {gap:.4f}"
    row(f"ties + svd {n_out} x {n_in}", theirs, ours, note)


def factorwise(n_out: int, n_in: int) -> None:
    model = peft_model(n_out, n_in)
    given = terms_of(model)
    for kind in ("ties", "magnitude_prune", "dare_linear"):
        settings = Settings(dialect="peft", density=DENSITY)
        run = method(kind, settings)
        place = Place("proj", settings)
        theirs, ours = medians(
            [
                lambda kind=kind: peft_call(model, kind),
                lambda run=run, place=place: timed(lambda: run(given, place)),
            ],
            15,
        )
        row(f"{kind} on A and B, {n_out} x {n_in}", theirs, ours)


def whole_model(n_layers: int) -> None:
    """4 adapters on all linear layers of a model of this many layers, folder to folder."""
    with tempfile.TemporaryDirectory() as place:
        folders = [write(Path(place) / name, n_layers, WIDTHS, i) for i, name in enumerate(NAMES)]
        size = sum(f.stat().st_size for folder in folders for f in folder.iterdir())

        def copy_bytes() -> None:
            data = b"".join(f.read_bytes() for folder in folders for f in folder.iterdir())
            target = Path(place) / "copy"
            target.write_bytes(data)
            target.unlink()

        def mixed(**chosen: Any) -> None:
            made = blend(dict(zip(folders, WEIGHTS, strict=True)), **chosen)
            shutil.rmtree(made.save(Path(place) / "mix"))

        plain, ours, svd = medians(
            [
                lambda: timed(copy_bytes),
                lambda: timed(mixed),
                lambda: timed(lambda: mixed(method="svd", rank=RANK)),
            ],
            5,
        )
    print(
        f"sum of {K}, {n_layers} layers, {size / 2**20:.0f} MiB: {ours:.2f} s,"
        f" reading and writing as many bytes {plain:.2f} s: {ours / plain:.1f}x"
    )
    # PEFT's takes many minutes: one module of each shape, times how often there is one
    shapes = Counter(WIDTHS.values())
    theirs = n_layers * sum(n * peft_call(peft_model(*s), "svd") for s, n in shapes.items())
    row(f"svd of a model of {n_layers} layers (PEFT: one each)", theirs, svd, "ours with files")


def write(folder: Path, n_layers: int, widths: dict[str, tuple[int, int]], seed: int) -> Path:
    import json

    from safetensors.torch import save_file

    torch.manual_seed(seed)
    tensors = {}
    for layer in range(n_layers):
        for name, (n_out, n_in) in widths.items():
            block = "self_attn" if name[0] in "qkvo" else "mlp"
            stem = f"base_model.model.model.layers.{layer}.{block}.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, n_in) * 0.02
            tensors[f"{stem}.lora_B.weight"] = torch.randn(n_out, RANK) * 0.02
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(widths)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small shape only")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    given = parser.parse_args()
    shapes = ((1024, 1024),) if given.quick else SHAPES
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, peft {peft.__version__}")
    print(f"load {load} on {os.cpu_count()} processors")
    print(f"{'':44} {'PEFT':>14} {'adapterkit':>13} {'ratio':>10}")
    single = {"factors": factorwise, "svd": svd, "ties": ties}
    with torch.no_grad():
        for part in given.parts or PARTS:
            if part == "model":
                whole_model(2 if given.quick else 16)
            else:
                for shape in shapes:
                    single[part](*shape)


if __name__ == "__main__":
    main()

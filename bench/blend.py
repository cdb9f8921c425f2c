"""Blending against PEFT's add_weighted_adapter on the same adapters: python bench/blend.py

Prints medians and their ratio, and the error of each low-rank result against the dense optimum.
One linear layer at a time, k = 4 adapters of rank 16, as on a model of 7 billion parameters.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

from adapterkit.hub.blend.factors import Factors, Term, concatenated
from adapterkit.hub.blend.methods import method
from adapterkit.hub.blend.settings import Place, Settings
from adapterkit.hub.blend.truncate import _by_qr, spectrum
from adapterkit.hub.mixing.blend import blend

K, RANK, DENSITY = 4, 16, 0.2
WEIGHTS = [0.4, 0.3, 0.2, 0.1]
SHAPES = ((4096, 4096), (11008, 4096))
NAMES = [f"a{i}" for i in range(K)]


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


def timed(call: Callable[[], object], repeats: int) -> float:
    """Median seconds, the first call left out where there are several."""
    spans = []
    for _ in range(repeats + (repeats > 1)):
        start = time.perf_counter()
        call()
        spans.append(time.perf_counter() - start)
    return statistics.median(spans[1:] or spans)


def peft_call(model: peft.PeftModel, kind: str) -> Tensor:
    """The result's change; made anew each time, as a name that exists is left as it is."""
    if "mix" in model.peft_config:
        model.delete_adapter("mix")
    model.add_weighted_adapter(NAMES, WEIGHTS, "mix", kind, density=DENSITY)
    layer = layer_of(model)
    return layer.lora_B["mix"].weight @ layer.lora_A["mix"].weight


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
    theirs = timed(lambda: peft_call(model, "svd"), 1)
    ours = timed(lambda: spectrum(concatenated(given)).truncated(RANK), 15)
    whole = concatenated(given)
    by_qr = timed(lambda: _by_qr(whole).truncated(RANK), 15)
    dense = whole.rows(0, n_out)
    best = optimum(dense, RANK)
    f = spectrum(whole).truncated(RANK)
    gap = distance(dense, f.B @ f.A)
    shape = f"{n_out} x {n_in}"
    row(f"svd {shape}, from Gram matrices", theirs, ours, f"error {gap:.6f}, optimum {best:.6f}")
    row(f"svd {shape}, from QR", theirs, by_qr)


def ties(n_out: int, n_in: int) -> None:
    model = peft_model(n_out, n_in)
    given = terms_of(model)
    settings = Settings(dialect="peft", rank=RANK, density=DENSITY)
    run = method("ties_svd", settings)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours = timed(lambda: run(given, Place("proj", settings)), 2)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    theirs = timed(lambda: peft_call(model, "ties_svd"), 1)
    found = run(given, Place("proj", settings))
    note = f"error {found.error:.4f}, peak memory + {peak:.0f} MB"
    row(f"ties + svd {n_out} x {n_in}", theirs, ours, note)


def factorwise(n_out: int, n_in: int) -> None:
    model = peft_model(n_out, n_in)
    given = terms_of(model)
    for kind in ("ties", "magnitude_prune", "dare_linear"):
        settings = Settings(dialect="peft", density=DENSITY)
        run = method(kind, settings)
        theirs = timed(lambda kind=kind: peft_call(model, kind), 7)
        ours = timed(lambda run=run, s=settings: run(given, Place("proj", s)), 7)
        row(f"{kind} on A and B, {n_out} x {n_in}", theirs, ours)


def whole_model(n_layers: int) -> None:
    """A sum of 4 adapters on all linear layers of a model of this many layers, folder to folder."""
    widths = {"q_proj": (2048, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048),
              "o_proj": (2048, 2048), "gate_proj": (8192, 2048), "up_proj": (8192, 2048),
              "down_proj": (2048, 8192)}  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folders = [write(Path(place) / name, n_layers, widths, i) for i, name in enumerate(NAMES)]
        size = sum(f.stat().st_size for folder in folders for f in folder.iterdir())

        def copy_bytes() -> None:
            data = b"".join(f.read_bytes() for folder in folders for f in folder.iterdir())
            target = Path(place) / "copy"
            target.write_bytes(data)
            target.unlink()

        def mixed() -> None:
            made = blend(dict(zip(folders, WEIGHTS, strict=True)))
            target = made.save(Path(place) / "mix")
            for path in target.iterdir():
                path.unlink()
            target.rmdir()

        plain, ours = timed(copy_bytes, 3), timed(mixed, 3)
        print(
            f"sum of {K}, {n_layers} layers, {size / 2**20:.0f} MiB: {ours:.2f} s,"
            f" reading and writing as many bytes {plain:.2f} s: {ours / plain:.1f}x"
        )


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
    quick = parser.parse_args().quick
    shapes = ((1024, 1024),) if quick else SHAPES
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, peft {peft.__version__}")
    print(f"{'':44} {'PEFT':>14} {'adapterkit':>13} {'ratio':>10}")
    with torch.no_grad():
        for shape in shapes:
            factorwise(*shape)
        for shape in shapes:
            svd(*shape)
        for shape in shapes:
            ties(*shape)
        whole_model(2 if quick else 16)


if __name__ == "__main__":
    main()

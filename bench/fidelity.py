"""Four adapters of rank 16 into an NF4 base: what the report predicts, against the files written.

    python bench/fidelity.py [--hidden 1024 --share 0.014 ...]

The change, of rank 64, is a share of |W|. Weights are read back by transformers and bitsandbytes,
everything is compared in dense float64. PEFT's own merge of the same adapters stands beside.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import merge as merging
import peft
import shapes
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit.hub import merge
from adapterkit.hub.merge.fidelity import Fidelity

COUNT, RANK = 4, 16
WITHIN, OVER_OPTIMUM = 0.02, 1.01
Weights = dict[str, Tensor]


@dataclass
class Sums:
    """Over modules. applied, left: from the quantized base, and to what was wanted."""

    delta: float = 0.0
    applied: float = 0.0
    product: float = 0.0
    left: float = 0.0

    def add(self, delta: Tensor, applied: Tensor, left: Tensor) -> None:
        self.delta += float(delta.square().sum())
        self.applied += float(applied.square().sum())
        self.product += float((applied * delta).sum())
        self.left += float(left.square().sum())

    @property
    def figures(self) -> tuple[float, float, float]:
        """Gain, cosine, |left| / |delta|."""
        cosine = self.product / (self.delta * self.applied) ** 0.5
        return self.product / self.delta, cosine, (self.left / self.delta) ** 0.5


def opened(folder: Path, **settings: Any) -> Any:
    loader = transformers.AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"}, **settings)


def weights(model: Any) -> Weights:
    """Of the linear layers inside, as bitsandbytes dequantizes them."""
    return dict(_weights(model))


def _weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if not name.endswith(merging.LINEARS):
            continue
        held = module.weight.data
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            held = bitsandbytes.functional.dequantize_4bit(held, module.weight.quant_state)
        yield name.rpartition("base_model.model.")[2], held.double()


def products(folder: Path) -> Weights:
    """B A of each module, the scale left out."""
    held = load_file(folder / "adapter_model.safetensors")
    ends = ".lora_A.weight", ".lora_B.weight"
    names = {key.removesuffix(ends[0]) for key in held if key.endswith(ends[0])}
    return {
        name.removeprefix("base_model.model."):
            held[name + ends[1]].double() @ held[name + ends[0]].double()
        for name in names
    }


def make_adapters(root: Path, dense: Weights, base: Path, share: float) -> list[Path]:
    """alpha is twice the rank: a scale of 2. The sum is that share of every weight."""
    found = []
    for number in range(COUNT):
        folder = merging.make_adapter(root / f"adapter-{number}", base, RANK)
        path = folder / "adapter_model.safetensors"
        generator = torch.Generator().manual_seed(number)
        held = load_file(path)
        drawn = {key: torch.randn(t.shape, generator=generator) for key, t in held.items()}
        save_file(drawn, path, {"format": "pt"})
        found.append(folder)
    total = [products(folder) for folder in found]
    for folder in found:
        path = folder / "adapter_model.safetensors"
        held = load_file(path)
        for name, w in dense.items():
            size = float(share * w.norm() / sum(2 * each[name] for each in total).norm())
            held[f"base_model.model.{name}.lora_B.weight"] *= size
        save_file(held, path, {"format": "pt"})
    return found


def by_peft(base: Any, adapters: list[Path]) -> Weights:
    model = peft.PeftModel.from_pretrained(base, adapters[0], adapter_name="0")
    for number, folder in enumerate(adapters[1:], 1):
        model.load_adapter(folder, adapter_name=str(number))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [str(number) for number in range(len(adapters))]
        return weights(model.merge_and_unload(adapter_names=names))


def measured(standing: Weights, target: Weights, result: Weights, w: Weights) -> Sums:
    found = Sums()
    for name, wanted in target.items():
        found.add(wanted - w[name], result[name] - standing[name], result[name] - wanted)
    return found


def best(matrix: Tensor, rank: int) -> Tensor:
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * values[:rank] @ v[:rank]


def compare(root: Path, stored: str, bases: dict[str, Path], adapters: list[Path]) -> bool:
    base, out = bases[stored], root / f"merged-{stored}"
    settings: dict[str, Any] = {"base": base, "quantize": "nf4", "min_gain": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        predicted = merge(adapters, dry_run=True, correction_rank=RANK, **settings).correction
        merge(adapters, out=out, correction_rank=RANK, **settings)
        merge(adapters, out=root / f"plain-{stored}", **settings)
    if predicted is None:
        raise SystemExit("nothing was corrected")
    w, standing = weights(opened(base)), weights(opened(bases["nf4"]))
    delta = {name: sum(2 * products(folder)[name] for folder in adapters) for name in w}
    target = {name: w[name] + delta[name] for name in w}
    codes, factors = weights(opened(out)), products(out / "correction")
    over = [
        float((target[n] - codes[n] - factors[n]).norm())
        / float(torch.linalg.svdvals(target[n] - codes[n])[RANK:].norm())
        for n in w
    ]
    results: dict[str, tuple[Weights, Fidelity | None, float | None]] = {
        "PEFT": (by_peft(opened(bases["nf4"]), adapters), None, None),
        "merged, plain": (weights(opened(root / f"plain-{stored}")), predicted.plain, None),
        f"merged, correction {RANK}":
            ({n: codes[n] + factors[n] for n in w}, predicted.corrected, predicted.left),
        f"rival: base, blend {RANK}":
            ({n: standing[n] + best(delta[n], RANK) for n in w}, predicted.rival,
             predicted.rival_left),
    }  # fmt: skip
    good = max(over) <= OVER_OPTIMUM
    for label, (result, said, left) in results.items():
        gain, cosine, rest = measured(standing, target, result, w).figures
        shown = "| | |" if said is None else f"{said.gain:.4f} | {said.cosine:.4f} |"
        shown += " |" if left is None else f" {left:.4f} |"
        print(f"| {stored} | {label} | {gain:.4f} | {cosine:.4f} | {rest:.4f} | {shown}")
        if said is not None:
            good &= abs(said.gain - gain) <= WITHIN and abs(said.cosine - cosine) <= WITHIN
    print(f"| {stored} | left over Eckart-Young, most of {len(over)} | {max(over):.5f} | | | | | |")
    print(f"| {stored} | better, as predicted | {predicted.better} | | | | | |")
    return good


def main(share: float, sizes: dict[str, Any]) -> int:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        bases = {"dense": shapes.make_base(root / "dense", **sizes), "nf4": root / "nf4"}
        merging.fill(bases["dense"])
        four = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
        opened(bases["dense"], quantization_config=four).save_pretrained(bases["nf4"])
        adapters = make_adapters(root, weights(opened(bases["dense"])), bases["dense"], share)
        print(f"{COUNT} adapters of rank {RANK}, the change {share:.2%} of |W|\n")
        print("| base | result | gain | cosine | left | predicted gain | cosine | left |")
        print("|---|---|---|---|---|---|---|---|")
        every = [compare(root, stored, bases, adapters) for stored in bases]
    good = all(every)
    print(f"\n{'within' if good else 'OUTSIDE'} the bars: gain and cosine within {WITHIN:g}, left")
    print(f"within {OVER_OPTIMUM - 1:.0%} of the optimum")
    return 0 if good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=0.014)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    given = parser.parse_args()
    wide = {"intermediate": 2 * given.hidden, "vocab": 1024, "heads": 8, "kv_heads": 4,
            "shards": 1, "dtype": "F32"}  # fmt: skip
    sys.exit(main(given.share, {"hidden": given.hidden, "layers": given.layers, **wide}))

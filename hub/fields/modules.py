"""Kinds that act on modules with a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from adapterkit.hub.fields.replaced import ReplacedFields
from adapterkit.hub.matching import Patterns


@dataclass(frozen=True)
class LoraFields:
    """LoRA and its variants. Hu et al. 2021, arXiv:2106.09685.

    ranks, alphas: per module of the file, after `rank_pattern` and `alpha_pattern`;
    rank, alpha: for every other. rslora: scaling alpha / sqrt(r), Kalajdzievski 2023,
    arXiv:2312.03732. dora: Liu et al. 2024, arXiv:2402.09353. lora_bias: B has a bias.
    transposed_experts: factors of fused parameters may be those of the transpose. start: "pissa" or
    "olora" if as much was taken out of the base before training, "" if nothing was.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False
    transposed_experts: bool = False
    start: str = ""
    replaced: ReplacedFields = ReplacedFields()

    @classmethod
    def scaled(cls, rank: int, scale: float, **others: Any) -> Self:
        """With s itself, not alpha, as mlx-lm has it."""
        return cls(rank, scale * rank, **others)

    def rank_of(self, module: str) -> int:
        return self.ranks.get(module, self.rank)

    def scaling(self, module: str) -> float:
        """s of W + s B A."""
        rank = self.rank_of(module)
        return self.alphas.get(module, self.alpha) / (rank**0.5 if self.rslora else rank)


@dataclass(frozen=True)
class FusedLoraFields(LoraFields):
    """LoRA on modules some of which are several matrices in one.

    fused: last name of such a module, whose matrices have as many outputs each -> which of them
    have factors.
    """

    fused: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)

    def parts(self, module: str) -> tuple[bool, ...]:
        """Which of the matrices in a module have factors; (True,) for one that is a single one."""
        return self.fused.get(module.rpartition(".")[2], (True,))


@dataclass(frozen=True)
class TokensFields:
    """Rows of the token table, trained alone (`peft_type: TRAINABLE_TOKENS`)."""

    replaced: ReplacedFields


@dataclass(frozen=True)
class Ia3Fields:
    """IA3. Liu et al. 2022, arXiv:2205.05638.

    feedforward: the modules whose vector scales the input, not the output: ends of names, or a
    regular expression over whole names; None where the config does not say, so that shapes tell.
    """

    feedforward: tuple[str, ...] | str | None = None
    replaced: ReplacedFields = ReplacedFields()

    def scales_input(self, module: str, patterns: Patterns) -> bool | None:
        if isinstance(self.feedforward, str):
            return patterns.match(self.feedforward, module, "feedforward_modules") is not None
        return None if self.feedforward is None else module.endswith(self.feedforward)


@dataclass(frozen=True)
class OftFields:
    """OFT. Qiu et al. 2023, arXiv:2306.07280.

    size: inputs that one block turns, or count: blocks; the other is 0 and follows. shared: one
    block for all runs of inputs. terms: of the series that stands for the Cayley transform, None
    for the transform itself; last_twice: how its last term counts. limit: COFT's largest norm.
    """

    size: int
    count: int
    shared: bool = False
    terms: int | None = None
    last_twice: bool = False
    limit: float | None = None
    replaced: ReplacedFields = ReplacedFields()

    def block_size(self, n_in: int) -> int:
        """For a module of n_in inputs: the nearest size that divides them, as PEFT takes it."""
        if self.size:
            return _nearest_divisor(n_in, self.size)
        return n_in // _nearest_divisor(n_in, self.count)


def _nearest_divisor(n: int, wanted: int) -> int:
    """The smaller one of two that are as near."""
    if wanted >= n:
        return n
    below = next(d for d in range(wanted, 0, -1) if n % d == 0)
    above = next(d for d in range(wanted, n + 1) if n % d == 0)
    return below if wanted - below <= above - wanted else above


@dataclass(frozen=True)
class MosloraFields(LoraFields):
    """LoRA with a mixer between its factors. Wu et al. 2024, arXiv:2406.11909.

    mixers: per module of the file, after `lora_use_mixer_pattern`; mixer: for every other.
    """

    mixer: bool = True
    mixers: Mapping[str, bool] = field(default_factory=dict)

    def has_mixer(self, module: str) -> bool:
        return self.mixers.get(module, self.mixer)


@dataclass(frozen=True)
class AdaloraFields:
    """AdaLoRA. Zhang et al. 2023, arXiv:2303.10512.

    initial: the rank before pruning; ranks: what pruning left, by module; 0 means none of it.
    """

    initial: int
    alpha: float
    ranks: Mapping[str, int] = field(default_factory=dict)
    replaced: ReplacedFields = ReplacedFields()

    def rank_of(self, module: str) -> int:
        return self.ranks.get(module, self.initial)

    def scaling(self, module: str) -> float:
        """PEFT divides by the initial rank, which pruning does not change."""
        alpha = self.alpha if self.alpha > 0 else float(self.rank_of(module))
        return alpha / (self.initial + 1e-5)


@dataclass(frozen=True)
class VeraFields:
    """VeRA. Kopiczko et al. 2023, arXiv:2310.11454.

    saved: the file holds the projections; else they are drawn again from `seed`.
    """

    rank: int
    seed: int
    saved: bool
    replaced: ReplacedFields = ReplacedFields()


@dataclass(frozen=True)
class ProductFields:
    """LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098) and LoKr (Edalati et al. 2022,
    arXiv:2212.10650): ranks and alphas as in LoraFields."""

    rank: int
    alpha: float
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    replaced: ReplacedFields = ReplacedFields()

    def rank_of(self, module: str) -> int:
        return self.ranks.get(module, self.rank)

    def scaling(self, module: str) -> float:
        return self.alphas.get(module, self.alpha) / self.rank_of(module)


@dataclass(frozen=True)
class PlainFields:
    """Kinds whose tensors say everything: LN tuning, BEFT."""

    replaced: ReplacedFields = ReplacedFields()


@dataclass(frozen=True)
class BitfitFields:
    """BitFit. Ben Zaken et al. 2022, arXiv:2106.10199.

    modules, exclude, whole: ends of names of the modules whose biases, and of those that, must be
    there as a whole; () where nothing says so. extends: a layer without a bias gets one.
    """

    modules: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    extends: bool = False
    replaced: ReplacedFields = ReplacedFields()


@dataclass(frozen=True)
class BoftFields:
    """BOFT. Liu et al. 2024, arXiv:2311.06243.

    size: inputs that one block turns, or count: blocks; the other is 0 and follows. stages: sparse
    matrices that are multiplied.
    """

    size: int
    count: int
    stages: int = 1
    replaced: ReplacedFields = ReplacedFields()

    def block_size(self, n_in: int) -> int:
        """For a module of n_in inputs; 0 if they do not divide so."""
        return self.size or (0 if n_in % self.count else n_in // self.count)

"""What the config of each kind means, in canonical form: plain data, every value checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ReplacedFields:
    """What any PEFT kind may carry beside its own tensors.

    bias: "none", "all" or "lora_only": which biases of the base the file replaces.
    saved: names of modules replaced as a whole (`modules_to_save`).
    tokens: module suffix -> rows of its table that are replaced; "" is the input embedding.
    tie: what happens to the input embedding happens to a tied head as well.
    """

    bias: str = "none"
    saved: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tie: bool = False


@dataclass(frozen=True)
class LoraFields:
    """LoRA and its variants. Hu et al. 2021, arXiv:2106.09685.

    ranks, alphas: per module of the file, after `rank_pattern` and `alpha_pattern`;
    rank, alpha: for every other. rslora: scaling alpha / sqrt(r), Kalajdzievski 2023,
    arXiv:2312.03732. dora: Liu et al. 2024, arXiv:2402.09353. lora_bias: B has a bias.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False
    replaced: ReplacedFields = ReplacedFields()

    def rank_of(self, module: str) -> int:
        return self.ranks.get(module, self.rank)

    def scaling(self, module: str) -> float:
        """s of W + s B A."""
        rank = self.rank_of(module)
        return self.alphas.get(module, self.alpha) / (rank**0.5 if self.rslora else rank)


@dataclass(frozen=True)
class TokensFields:
    """Rows of the token table, trained alone (`peft_type: TRAINABLE_TOKENS`)."""

    replaced: ReplacedFields

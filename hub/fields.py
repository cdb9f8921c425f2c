"""What the config of each kind means, in canonical form: plain data, every value checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from adapterkit.hub.matching import Patterns, Targets

# What the roles of a head's layers start with.
HEAD = "replace.head."


@dataclass(frozen=True)
class Seat:
    """leaf: the module whose place the last layer takes. module: whose output becomes the head's.
    first: it gets the whole sequence, of which its first token counts. pooler: what it gets comes
    from there, and is the first token of what that gets where the head wants none of it."""

    leaf: str
    module: str
    first: bool = False
    pooler: str = ""


@dataclass(frozen=True)
class HeadFields:
    """A head of an adapter's own. seat: where it stands. bias: of its last layer. act: between its
    layers. pools: it gets what a pooler gives, where there is one."""

    seat: Seat
    labels: int
    layers: int = 1
    act: str | None = None
    bias: bool = True
    pools: bool = True


@dataclass(frozen=True)
class ReplacedFields:
    """What any PEFT kind may carry beside its own tensors.

    bias: "none", "all" or "lora_only": which biases of the base the file replaces.
    tokens: module suffix -> rows of its table that are replaced; "" is the input embedding.
    tie: what happens to the input embedding happens to a tied head as well.
    head: of several layers, in place of the base's.
    """

    bias: str = "none"
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tie: bool = False
    head: HeadFields | None = None


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
class UnionPart:
    """One of several kinds in an adapter: its row in `kinds.KINDS`, its fields, its modules."""

    kind: str
    fields: Any
    targets: Targets


@dataclass(frozen=True)
class UnionFields:
    """Several kinds in one adapter. The roles of a part's tensors have its number in front."""

    parts: tuple[UnionPart, ...]
    replaced: ReplacedFields = ReplacedFields()


@dataclass(frozen=True)
class ReftFields:
    """ReFT. Wu et al. 2024, arXiv:2404.03592.

    first, last: tokens at both ends that are changed. orthogonal: the projection has orthonormal
    rows. tied: both ends have the same tensors. subtracts: what the projection gives is taken out.
    layers: those that have one, None for all.
    """

    rank: int
    first: int
    last: int
    orthogonal: bool
    tied: bool = False
    subtracts: bool = True
    act: str | None = None
    layers: tuple[int, ...] | None = None
    replaced: ReplacedFields = ReplacedFields()


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
class PrefixFields:
    """Prefix-Tuning (Li and Liang 2021, arXiv:2101.00190), P-Tuning v2 (Liu et al. 2021,
    arXiv:2110.07602).

    length: keys in front of each attention. layers, heads, width: as the file records them, None
    where it does not. activation: of the network that makes the prefix. shifts: the real tokens
    stand at positions behind it. doubled: the order of pairs in which PEFT reads the prefix of an
    encoder-decoder. gate_rows: 0 without gates, 1 for keys and values together, 2 apart.
    """

    length: int
    layers: int | None = None
    heads: int | None = None
    width: int | None = None
    activation: str = "tanh"
    shifts: bool = True
    doubled: bool = False
    gate_rows: int = 0
    places: tuple[str, ...] = ("self",)
    replaced: ReplacedFields = ReplacedFields()


@dataclass(frozen=True)
class PromptFields:
    """Prompt-Tuning (Lester et al. 2021, arXiv:2104.08691), P-Tuning (Liu et al. 2021,
    arXiv:2103.10385).

    length: rows that are used; stored: rows in the file, of which those are the first. place: as
    in `VirtualTokens`. encoder: "", "mlp" or "lstm", the network that makes the rows.
    """

    length: int
    stored: int
    width: int | None = None
    place: str = "front"
    encoder: str = ""
    replaced: ReplacedFields = ReplacedFields()


@dataclass(frozen=True)
class Wiring:
    """How a bottleneck u stands in its layer, where h is what its last linear gives, x0 what is
    added to that, and LN the norm that follows, if any.

    ln_before: z is LN(h + x0), else h. residual: u is added to h ("before"), to h + x0
    ("post_add") or to z ("after"). residual_inside: a norm of its own is of that sum, not of u.
    ln_after: LN(. + x0) follows. parallel: z is x0, and u is added to h.
    """

    ln_before: bool = False
    ln_after: bool = True
    residual: str = "before"
    residual_inside: bool = False
    parallel: bool = False


@dataclass(frozen=True)
class PhmFields:
    """Compacter. Karimi Mahabadi et al. 2021, arXiv:2106.04647: H = sum_i kron(rule_i, W_i).

    size: n of the n rules (n, n); rank: of W_i where they are products. shared_rule, shared_weights:
    one for all layers; rule_product, weight_product: stored as two factors. bias: has one.
    """

    size: int
    rank: int
    shared_rule: bool = True
    rule_product: bool = False
    shared_weights: bool = False
    weight_product: bool = True
    bias: bool = True


@dataclass(frozen=True)
class BottleneckFields:
    """Bottlenecks in the layers. Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020,
    arXiv:2005.00247; He et al. 2021, arXiv:2110.04366.

    places: names of the places that have one. factors: number of the layer -> width / d; factor:
    for every other, None if there is none. leave_out: layers without. scaling: a number,
    "learned" or "channel". coupling: width / d of the invertible one after the embeddings.
    width: of the model it was trained on, if known.
    """

    places: tuple[str, ...]
    factor: float | None
    act: str
    factors: Mapping[int, float] = field(default_factory=dict)
    leave_out: tuple[int, ...] = ()
    scaling: float | str = 1.0
    norm_before: bool = False
    norm_after: bool = False
    gate: bool = False
    coupling: float | None = None
    wiring: Wiring = Wiring()
    phm: PhmFields | None = None
    width: int | None = None
    replaced: ReplacedFields = ReplacedFields()

    def size(self, layer: int, width: int) -> int | None:
        """d of a layer; None if the config has no factor for it."""
        factor = self.factors.get(layer, self.factor)
        return None if factor is None else max(1, int(width // factor))


@dataclass(frozen=True)
class Mixing:
    """How a fusion mixes. before_softmax: the value matrix acts on each u, not on their sum.
    query_before: the query is h, not z. residual_before: the residual is part of each u."""

    before_softmax: bool = True
    query_before: bool = False
    residual_before: bool = False


@dataclass(frozen=True)
class FusionFields:
    """AdapterFusion. Pfeiffer et al. 2020, arXiv:2005.00247.

    names: of the adapters it joins, in order; query, key, value: which matrices there are.
    """

    names: tuple[str, ...]
    query: bool = True
    key: bool = True
    value: bool = True
    mixing: Mixing = Mixing()
    width: int | None = None


@dataclass(frozen=True)
class LlmBottleneckFields:
    """Bottlenecks on single linear layers. Hu et al. 2023, arXiv:2304.01933.

    size: d. parallel: on the input, added to the output; else before the linear or behind it, by
    the module's name. learned: the scaling is trained.
    """

    size: int
    act: str
    scaling: float = 1.0
    learned: bool = False
    parallel: bool = False
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

"""Kinds that act at places of layers, or on the input of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterkit.hub.fields.replaced import ReplacedFields
from adapterkit.hub.matching import Targets


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

    size: n of the n rules (n, n); rank: of W_i where they are products. shared_rule,
    shared_weights: one for all layers; rule_product, weight_product: stored as two factors.
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

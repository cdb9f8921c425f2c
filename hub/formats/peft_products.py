"""`peft_type: LOHA` and `LOKR`.  peft 0.21 `tuners/lycoris_utils.py`, `loha`, `lokr`."""

from __future__ import annotations

from collections.abc import Collection

from adapterkit.hub.fields import ProductFields
from adapterkit.hub.formats.config import ConfigReader
from adapterkit.hub.formats.peft_config import MAX_RANK, replaced, resolved
from adapterkit.hub.formats.peft_type import PeftType
from adapterkit.hub.matching import Patterns

KNOWN = frozenset({"r", "alpha", "rank_pattern", "alpha_pattern"})
INERT = frozenset({"rank_dropout", "module_dropout", "init_weights"})
# Of convolutions only, whose shapes show it.
CONVOLUTIONS = frozenset({"use_effective_conv2d"})


def read(reader: ConfigReader, names: Collection[str]) -> ProductFields:
    ranks = reader.numbers_by_pattern("rank_pattern", integer=True)
    alphas = reader.numbers_by_pattern("alpha_pattern", integer=False)
    rank, alpha = reader.count("r", 8, MAX_RANK), reader.number("alpha", 8)
    parts = replaced(reader)
    reader.done()
    patterns = Patterns()
    return ProductFields(
        rank=rank,
        alpha=alpha,
        ranks=resolved(ranks, names, patterns, "rank_pattern"),
        alphas=resolved(alphas, names, patterns, "alpha_pattern"),
        replaced=parts,
    )


LOHA = PeftType(
    kind="loha",
    endings={
        ".hada_w1_a": "w1_a",
        ".hada_w1_b": "w1_b",
        ".hada_w2_a": "w2_a",
        ".hada_w2_b": "w2_b",
        ".hada_t1": "t1",
        ".hada_t2": "t2",
    },
    fields=read,
    known=KNOWN,
    inert=INERT | CONVOLUTIONS,
)

LOKR = PeftType(
    kind="lokr",
    endings={
        ".lokr_w1": "w1",
        ".lokr_w1_a": "w1_a",
        ".lokr_w1_b": "w1_b",
        ".lokr_w2": "w2",
        ".lokr_w2_a": "w2_a",
        ".lokr_w2_b": "w2_b",
        ".lokr_t2": "t2",
    },
    fields=read,
    known=KNOWN,
    # how a matrix was split shows in the shapes
    inert=INERT | CONVOLUTIONS | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
)

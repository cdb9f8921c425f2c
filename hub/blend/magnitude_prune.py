"""The weighted sum of what is left of each change when its small entries are dropped.

Peft 0.21 `utils/merge_utils.py` (magnitude_prune).
"""

from __future__ import annotations

from collections.abc import Sequence

from adapterkit.hub.blend import pruning
from adapterkit.hub.blend.factors import Term
from adapterkit.hub.blend.settings import Place
from adapterkit.hub.blend.streamed import Streamed


def matrix(terms: Sequence[Term], place: Place) -> Streamed:
    prunes = [pruning.by_magnitude(term, place.settings.density) for term in terms]
    return pruning.merged(terms, prunes, pruning.weighted_sum)

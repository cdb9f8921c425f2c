"""TIES: trim, elect a sign, merge what agrees.  Yadav et al. 2023, arXiv:2306.01708.

paper: the sign of the weighted sum; the mean of w_k change_k over those that agree, so that equal
weights are the paper's lambda.  peft (0.21 `utils/merge_utils.py`): the sign is that of the sum
without weights.  mergekit: weighted sign, and the mean is divided by the weights that agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from adapterkit.hub.blend import pruning
from adapterkit.hub.blend.factors import Term
from adapterkit.hub.blend.settings import Place, Settings
from adapterkit.hub.blend.streamed import Streamed


def matrix(terms: Sequence[Term], place: Place) -> Streamed:
    settings = place.settings
    prunes = [pruning.by_magnitude(term, settings.density) for term in terms]
    return pruning.merged(terms, prunes, partial(disjoint_mean, settings))


def disjoint_mean(
    settings: Settings, changes: Sequence[Tensor], weights: Sequence[float], *, divided: bool = True
) -> Tensor:
    """(rows, in) from pruned changes (rows, in) and their weights; their sum if not divided."""
    stacked = torch.stack(list(changes))
    wide = stacked.new_tensor(weights).view(-1, 1, 1)
    weighted = stacked * wide
    # peft compares signs before the weights turn any
    voting = stacked if settings.dialect == "peft" else weighted
    agreeing = pruning.elected(voting, settings.sign)
    total = weighted.mul_(agreeing).sum(0)
    if not divided:
        return total
    if settings.dialect == "mergekit":
        shares = (wide * agreeing).sum(0)
        return total / torch.where(shares == 0, 1.0, shares)
    return total.div_(agreeing.sum(0).clamp_(min=1))

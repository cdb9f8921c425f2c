"""AdapterHub's dialect: what the library's average_adapter does.  adapters 1.3 `model_mixin.py`,
`methods/lora.py`.

Weights count as they are given, which is its normalize_weights=False. With `lora_delta_w_svd` the
alpha stays when the rank changes, so that the result is r / rank times as strong as the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.hub.bases.base import Base
from adapterkit.hub.blend.factors import Factors, Term, concatenated
from adapterkit.hub.blend.methods import method
from adapterkit.hub.blend.truncate import spectrum
from adapterkit.hub.findings import clean
from adapterkit.hub.formats.peft_write import Place, is_replacing
from adapterkit.hub.mixing import parameters
from adapterkit.hub.mixing.inputs import Input
from adapterkit.hub.mixing.options import AUTO, Options
from adapterkit.hub.mixing.result import parts_of, result, variant
from adapterkit.hub.mixing.run import settings_of
from adapterkit.hub.mixing.written import Blend
from adapterkit.registry.errors import InvalidError

if TYPE_CHECKING:
    from torch import Tensor

NEGATING, SVD = "lora_linear_only_negate_b", "lora_delta_w_svd"


def blended(inputs: Sequence[Input], base: Base | None, chosen: Options) -> Blend:
    method(chosen.method, settings_of(inputs, chosen))  # whether there is one of this name
    _require_asked(inputs, chosen)
    parameters.require_alike(inputs)
    if isinstance(chosen.rank, int):
        tensors, changes = _svd(inputs, chosen.rank), {"r": chosen.rank}
    else:
        negating = chosen.method == NEGATING
        tensors = _negated(inputs) if negating else parameters.tensors_of(inputs)
        changes = {}
    parts = parts_of(tensors, chosen)
    return result(inputs, base, chosen, parameters.files(inputs, parts, **changes), parts)


def _require_asked(inputs: Sequence[Input], chosen: Options) -> None:
    odd = [variant(one) for one in inputs if one.adapter.format != "adapterhub"]
    if odd:
        raise InvalidError(f"{', '.join(odd)}: the dialect adapters is for AdapterHub's folders")
    if chosen.at:
        raise InvalidError("at: AdapterHub's average_adapter has one weight for all modules")
    if chosen.method == SVD and (chosen.rank is None or chosen.rank == AUTO):
        raise InvalidError(f"{SVD} needs a rank", hint="--rank R")
    if chosen.method != SVD and chosen.rank is not None:
        raise InvalidError(f"{chosen.method} takes no rank, {SVD} does")


def _negated(inputs: Sequence[Input]) -> dict[Place, Tensor]:
    """A negative weight negates B alone.  Zhang et al. 2023, arXiv:2306.14870."""
    _require_factors(inputs, NEGATING)
    positive = [replace(one, weight=abs(one.weight)) for one in inputs]
    a, b = parameters.tensors_of(positive), parameters.tensors_of(inputs)
    return {place: (a if place[1] == "A" else b)[place] for place in b}


def _svd(inputs: Sequence[Input], rank: int) -> dict[Place, Tensor]:
    """A = V^T and B = U S of sum w B A."""
    _require_factors(inputs, SVD)
    found: dict[Place, Tensor] = {}
    for module in inputs[0].modules:
        terms = [Term(one.weight, _factors(one, module)) for one in inputs]
        whole = spectrum(concatenated(terms))
        b, a = whole.left() * whole.values, whole.right()
        found[module, "A"], found[module, "B"] = _sized(a, rank), _sized(b.mT, rank).mT
    return found


def _factors(one: Input, module: str) -> Factors:
    a, b = (one.tensors[module, role].double() for role in ("A", "B"))
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise InvalidError(
            f"{variant(one)}: {clean(module)} is several matrices in one, which {SVD} does not take"
        )
    return Factors(b, a)


def _sized(rows: Tensor, count: int) -> Tensor:
    """So many of them: the first, or all with zeros behind, which stand for singular values 0."""
    found = rows.new_zeros(count, rows.shape[1])
    found[: len(rows)] = rows[:count]
    return found


def _require_factors(inputs: Sequence[Input], name: str) -> None:
    roles = {role for one in inputs for _, role in one.tensors if not is_replacing(role)}
    if not roles <= {"A", "B"}:
        shown = ", ".join(sorted(roles))
        raise InvalidError(f"{variant(inputs[0])}: {name} is for LoRA alone, found {shown}")

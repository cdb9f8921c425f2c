"""Compacter: a bottleneck whose projections are sums of Kronecker products, H = sum_i kron(rule_i,
W_i), x H + b.  Karimi Mahabadi et al. 2021, arXiv:2106.04647.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.places import Found
from adapterkit.hub.fields import BottleneckFields, PhmFields
from adapterkit.hub.findings import ERROR, Finding
from adapterkit.hub.kinds.bottleneck import Bottleneck, other_form
from adapterkit.hub.kinds.placed import Form, Size

if TYPE_CHECKING:
    from torch import Tensor

PROJECTIONS = ("down", "up")


class Compacter(Bottleneck):
    def variant(self, kind: str) -> str:
        return "Compacter++" if kind == "Pfeiffer" else "Compacter"

    def sizes(self, adapter: Adapter) -> Iterator[int]:
        for held in adapter.modules.values():
            yield from held["down_bias"].shape[:1] if "down_bias" in held else ()

    def unfit(self, fields: BottleneckFields, found: Found, size: int | None) -> Iterable[Finding]:
        yield from super().unfit(fields, found, size)
        n = _phm(fields).size
        if found.width % n or (size or 0) % n:
            about = f"{found.width} and {size} of layer {found.number}"
            yield Finding(ERROR, "shape-mismatch", "phm_dim", f"sizes that {n} divides", about)

    def form(self, fields: BottleneckFields, width: Size, size: Size) -> Form:
        phm = _phm(fields)
        form: dict[str, tuple[Size, ...]] = dict(other_form(fields, width))
        for name, n_in, n_out in (("down", width, size), ("up", size, width)):
            if phm.bias:
                form[f"{name}_bias"] = (n_out,)
            if not phm.shared_weights:
                form |= _weights(phm, name, n_in, n_out)
            if not phm.shared_rule:
                form |= _rule(phm, f"{name}_rule")
        return form

    def shared_form(self, fields: BottleneckFields, width: Size, size: Size) -> Form:
        phm = _phm(fields)
        form = _rule(phm, "rule") if phm.shared_rule else {}
        if phm.shared_weights:
            form |= _weights(phm, "down", width, size) | _weights(phm, "up", size, width)
        return form

    def dense(self, own: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        p = {**shared, **own}
        return {name: _matrix(p, name) for name in PROJECTIONS}


def _phm(fields: BottleneckFields) -> PhmFields:
    if fields.phm is None:
        raise ValueError("a Compacter's fields have a phm")
    return fields.phm


def _part(n: Size, parts: int) -> Size:
    return None if n is None else n // parts


def _weights(phm: PhmFields, name: str, n_in: Size, n_out: Size) -> dict[str, tuple[Size, ...]]:
    """W_i (n, in / n, out / n), or its two factors."""
    rows, columns = _part(n_in, phm.size), _part(n_out, phm.size)
    if not phm.weight_product:
        return {f"{name}_weight": (phm.size, rows, columns)}
    return {
        f"{name}_left": (phm.size, rows, phm.rank),
        f"{name}_right": (phm.size, phm.rank, columns),
    }


def _rule(phm: PhmFields, name: str) -> dict[str, tuple[Size, ...]]:
    """The n rules (n, n), or their two factors."""
    n = phm.size
    if not phm.rule_product:
        return {name: (n, n, n)}
    return {f"{name}_left": (n, n, 1), f"{name}_right": (n, 1, n)}


def _matrix(p: Mapping[str, Tensor], name: str) -> Tensor:
    """H transposed: (out, in), as a linear layer keeps it."""
    import torch

    rule = f"{name}_rule" if f"{name}_rule" in p or f"{name}_rule_left" in p else "rule"
    rules, weights = _factored(p, rule, rule), _factored(p, name, f"{name}_weight")
    pairs = zip(rules, weights, strict=True)
    total = torch.stack([torch.kron(a.contiguous(), b.contiguous()) for a, b in pairs]).sum(0)
    return total.mT.contiguous()


def _factored(p: Mapping[str, Tensor], stem: str, whole: str) -> Tensor:
    return p[whole] if whole in p else p[f"{stem}_left"] @ p[f"{stem}_right"]

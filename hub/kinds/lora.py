"""LoRA, W' = W + s B A.  Hu et al. 2021, arXiv:2106.09685; rsLoRA arXiv:2312.03732.

DoRA, W' = diag(m / |W + s B A|_row) (W + s B A).  Liu et al. 2024, arXiv:2402.09353.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import CONV, CONV1D, EMBEDDING, EXPERTS, LINEAR, OTHER, Module
from adapterkit.hub.fields import LoraFields
from adapterkit.hub.findings import ERROR, UNSUPPORTED, Finding
from adapterkit.hub.headers import FLOATS, Stored
from adapterkit.hub.kinds import convolution, experts, replaced, starts, targeted
from adapterkit.hub.kinds.base import Expected, Lowered, Schema, Site, Summary
from adapterkit.hub.primitives import BiasShift, LowRank, RowScale

if TYPE_CHECKING:
    from torch import Tensor

# (role of A, role of B) by module type
FACTORS = {
    LINEAR: ("A", "B"),
    CONV1D: ("A", "B"),
    CONV: ("A", "B"),
    EMBEDDING: ("embedding_A", "embedding_B"),
    EXPERTS: experts.ROLES,
    OTHER: ("A", "B"),  # a matrix of another kind of module: a router
}
PAIRS = (("A", "B"), ("embedding_A", "embedding_B"), experts.ROLES)
# Rows of W whose norm is taken at a time: bounds the float32 copy to a few MB.
ROWS = 1024


class Lora:
    def summary(self, adapter: Adapter) -> Summary:
        fields: LoraFields = adapter.fields
        names = [name for name, held in adapter.modules.items() if any(a in held for a, _ in PAIRS)]
        words = {"rsLoRA": fields.rslora, "DoRA": fields.dora, **starts.words(fields)}
        variant = "+".join(word for word, is_one in words.items() if is_one) or "LoRA"
        alphas = {fields.alphas.get(name, fields.alpha) for name in names}
        return Summary(variant, tuple(map(fields.rank_of, names)), tuple(sorted(alphas)))

    def problems(self, adapter: Adapter) -> list[Finding]:
        found = []
        pairs = 0
        for module, tensors in adapter.modules.items():
            found += [f for role, t in tensors.items() for f in form_faults(role, t)]
            for pair in PAIRS:
                held = [role for role in pair if role in tensors]
                pairs += bool(held)
                if pair == experts.ROLES:
                    found += experts.faults(adapter.fields.rank_of(module), module, tensors)
                elif held and "experts" in module.split(".")[-2:]:
                    about = "factors of fused experts that target_parameters does not name"
                    found.append(Finding(ERROR, UNSUPPORTED, module, "factors of a module", about))
                elif held:
                    found += _pair(adapter.fields, module, tensors, pair)
            found += _without_factors(module, tensors)
        fields = adapter.fields
        if not pairs:
            found.append(Finding(ERROR, "no-factors", "the weights", "lora factors", "none"))
        else:
            found += targeted.untargeted(adapter)
        return found + replaced.problems(adapter, fields.replaced)

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        fields: LoraFields = adapter.fields
        tensors: dict[tuple[str, str], Expected] = {}
        findings = []
        selected = adapter.targets.select(modules)
        for name in selected:
            module = modules[name]
            if not _is_usable(adapter, module):
                findings.append(targeted.unsupported(module, FACTORS))
            elif module.type == EXPERTS:
                held = experts.expected(fields, module, adapter.modules.get(name, {}))
                tensors |= {(name, role): shape for role, shape in held.items()}
                findings += experts.undecided(fields, module)
            else:
                tensors |= self.expected(fields, module)
                tensors |= _tied(fields, module, modules)
                findings += convolution.faults(fields, module) + starts.faults(fields, module)
        findings += _untrained_bias(adapter, selected, modules)
        findings += targeted.unmatched(adapter, modules, selected)
        rest = replaced.schema(adapter, fields.replaced, modules, selected)
        return Schema(rest.tensors | tensors, (*findings, *rest.findings))

    def expected(self, fields: Any, module: Module) -> dict[tuple[str, str], Expected]:
        """The tensors of one targeted module."""
        return _factors(fields, module)

    def factors(self, module: Module, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """(A, B) of a module, None if only parts of it are replaced."""
        if experts.A in p:
            return experts.factors(module, p[experts.A], p[experts.B])
        if module.type == CONV and "A" in p:
            return convolution.factors(module, p["A"], p["B"])
        return next(((p[a], p[b]) for a, b in PAIRS if a in p), None)

    def lower(self, fields: LoraFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)
        if (pair := self.factors(site.module, p)) is None:
            return
        a, b = pair
        name, scale = site.module.name, fields.scaling(site.module.name)
        if "magnitude" in p:
            f = p["magnitude"].flatten() / row_norms(site.weight(), b, a, scale)
            yield name, LowRank(b, a, scale, out_scale=f)
            yield name, RowScale(f - 1)
        else:
            yield name, LowRank(b, a, scale)
        yield from starts.lower(fields, site, p)
        if "B_bias" in p:
            yield name, BiasShift(scale * p["B_bias"])
        if fields.replaced.tie and site.module.type == EMBEDDING:
            yield from ((other, LowRank(a.mT, b.mT, scale)) for other in site.tied("A", "B"))


def _is_usable(adapter: Adapter, module: Module) -> bool:
    """PEFT takes a matrix that is targeted as a parameter for (out, in)."""
    if adapter.targets.is_parameter(module):
        return module.type in (LINEAR, EXPERTS) or (module.type == OTHER and len(module.shape) == 2)
    return module.type in FACTORS and (module.type != OTHER or len(module.shape) == 2)


def row_norms(w: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    """|W + scale B A| of each row, (out).  w (out, in), b (out, r), a (r, in)."""
    norms = w.new_empty(w.shape[0])
    for start in range(0, w.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        norms[rows] = (w[rows] + scale * (b[rows].to(w.dtype) @ a.to(w.dtype))).norm(dim=1)
    return norms


def _factors(fields: LoraFields, module: Module) -> dict[tuple[str, str], Expected]:
    if module.type == CONV:
        found = convolution.expected(fields, module)
        return {(module.name, role): shape for role, shape in found.items()}
    a, b = FACTORS[module.type]
    rank = fields.rank_of(module.name)
    shapes: dict[str, tuple[int, ...]] = {a: (rank, module.n_in), b: (module.n_out, rank)}
    shapes |= starts.expected(fields, module)
    shapes |= {"magnitude": (module.n_out,)} if fields.dora else {}
    shapes |= {"B_bias": (module.n_out,)} if fields.lora_bias and module.type != EMBEDDING else {}
    return {(module.name, role): Expected(shape) for role, shape in shapes.items()}


def _tied(
    fields: LoraFields, table: Module, modules: Mapping[str, Module]
) -> dict[tuple[str, str], Expected]:
    """With `ensure_weight_tying` PEFT may write the factors of the head too."""
    if not fields.replaced.tie or table.type != EMBEDDING:
        return {}
    return {
        place: Expected(expected.shape, required=False)
        for module in modules.values()
        if module.tied_to == table.name
        for place, expected in _factors(fields, module).items()
    }


def form_faults(role: str, stored: Stored) -> list[Finding]:
    """Faults of one tensor in itself."""
    if stored.dtype not in FLOATS:
        return [
            Finding(
                ERROR, "wrong-dtype", stored.key, "a floating-point dtype", f"dtype {stored.dtype}"
            )
        ]
    if 0 in stored.shape:
        found = f"empty shape {list(stored.shape)} with a zero size"
        return [Finding(ERROR, "empty-tensor", stored.key, "values", found)]
    n_dims = 2 if role == "tokens" or any(role in pair for pair in PAIRS) else None
    if n_dims and len(stored.shape) != n_dims and not _is_kernel(role, stored):
        shape = f"shape {list(stored.shape)}"
        return [Finding(ERROR, "shape-mismatch", stored.key, f"{n_dims} dimensions", shape)]
    return []


def _is_kernel(role: str, stored: Stored) -> bool:
    """Whether it may be a factor of a convolution."""
    return role in PAIRS[0] and 3 <= len(stored.shape) <= 5


def _pair(
    fields: LoraFields, module: str, tensors: Mapping[str, Stored], pair: tuple[str, str]
) -> list[Finding]:
    """Faults between the tensors of one module: a missing half, ranks that differ."""
    rank = fields.rank_of(module)
    found = [
        Finding(ERROR, "missing-tensor", module, f"a tensor {role}", "none: its pair is incomplete")
        for role in pair
        if role not in tensors
    ]
    wanted = {"magnitude": fields.dora, "B_bias": fields.lora_bias and pair == PAIRS[0]}
    options = {"magnitude": "use_dora", "B_bias": "lora_bias"}
    for role, want in wanted.items():
        if want and role not in tensors:
            found.append(
                Finding(
                    ERROR,
                    "missing-tensor",
                    module,
                    f"a tensor {role}",
                    f"none, though {options[role]} is true",
                )
            )
        if role in tensors and not want:
            said = f"a tensor {role}, though {options[role]} is false"
            found.append(Finding(ERROR, "unexpected-tensor", tensors[role].key, f"no {role}", said))
    for role, axis in zip(pair, (0, 1), strict=True):
        sizes = tensors[role].shape if role in tensors else ()
        if len(sizes) == 2 or (sizes and axis == 0):
            size = sizes[axis]
            if size != rank and 0 not in sizes:
                shape = f"rank {size} in shape {list(sizes)}"
                found.append(
                    Finding(ERROR, "rank-mismatch", tensors[role].key, f"r = {rank}", shape)
                )
    return found


def _without_factors(module: str, tensors: Mapping[str, Stored]) -> list[Finding]:
    """What belongs to a pair that is not there at all."""
    if any(role in tensors for pair in PAIRS for role in pair):
        return []
    want = "a pair of factors beside it"
    return [
        Finding(ERROR, "missing-tensor", module, want, f"none, only {tensors[role].key}")
        for role in ("magnitude", "B_bias")
        if role in tensors
    ]


def _untrained_bias(
    adapter: Adapter, selected: list[str], modules: Mapping[str, Module]
) -> list[Finding]:
    """PEFT up to 0.20 lost the biases of bias="lora_only" when saving."""
    biased = any(modules[name].bias is not None for name in selected)
    held = any(role == "replace.bias" for _, role in adapter.tensors)
    if adapter.fields.replaced.bias != "lora_only" or held or not biased:
        return []
    hint = "PEFT up to 0.20 lost them at saving; if none were trained, set bias to none"
    want = "the biases bias=lora_only trains"
    return [Finding(ERROR, "missing-tensor", "bias", want, "none", hint)]

"""BOFT, y = diag(s) W (x B) + b: the input is turned by a product of sparse orthogonal matrices,
the rows of the weight are scaled.  Liu et al. 2024, arXiv:2311.06243.

B = M_m ... M_1: each M_i turns blocks of inputs, which from one to the next lie further apart, as
in a butterfly network. Together they turn runs of 2^(m - 1) blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import LINEAR, Module
from adapterkit.hub.fields import BoftFields
from adapterkit.hub.findings import ERROR, Finding
from adapterkit.hub.headers import Stored
from adapterkit.hub.kinds import replaced, targeted
from adapterkit.hub.kinds.base import Expected, Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.targeted import Form, Rules
from adapterkit.hub.primitives import InputRotation, RowScale

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS, SCALE = "blocks", "scale"
FORM: Form = {BLOCKS: (None, None, None, None), SCALE: (None, 1)}
TYPES = (LINEAR,)


class Boft:
    def summary(self, adapter: Adapter) -> Summary:
        return Summary("BOFT")

    def problems(self, adapter: Adapter) -> list[Finding]:
        return targeted.problems(adapter, Rules(frozenset(FORM), TYPES, lambda *_: FORM))

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        fields: BoftFields = adapter.fields
        names = adapter.targets.select(modules)
        tensors: dict[tuple[str, str], Expected] = {}
        findings: list[Finding] = []
        for module in (modules[name] for name in names):
            size = fields.block_size(module.n_in)
            stages = _stages(fields, adapter.modules.get(module.name, {}))
            if module.type not in TYPES:
                findings.append(targeted.unsupported(module, TYPES))
            elif fault := _fault(module.n_in, size, stages):
                findings.append(Finding(ERROR, "shape-mismatch", module.name, fault[0], fault[1]))
            else:
                shape = (stages, module.n_in // size, size, size)
                tensors[module.name, BLOCKS] = Expected(shape)
                tensors[module.name, SCALE] = Expected((module.n_out, 1))
        findings += targeted.unmatched(adapter, modules, names)
        rest = replaced.schema(adapter, fields.replaced, modules, names)
        return Schema(rest.tensors | tensors, (*findings, *rest.findings))

    def lower(self, fields: BoftFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)
        if BLOCKS in p:
            yield site.module.name, RowScale(p[SCALE].flatten() - 1)
            yield site.module.name, InputRotation(turns(p[BLOCKS]))


def _stages(fields: BoftFields, held: Mapping[str, Stored]) -> int:
    """m. PEFT trains one, whatever the config says, where its CUDA extension is missing."""
    stored = held.get(BLOCKS)
    return 1 if stored is not None and stored.shape[:1] == (1,) else fields.stages


def _fault(n_in: int, size: int, stages: int) -> tuple[str, str] | None:
    """(what is needed, what is there) if the inputs do not divide into such blocks."""
    run = size << (stages - 1)
    if not size or n_in % run:
        want = f"a multiple of {run}: runs of {1 << (stages - 1)} blocks of {size}"
        return want, f"{n_in} inputs"
    if stages > 1 and size % 2:
        return "blocks that have halves", f"blocks of {size}"
    return None


def turns(entries: Tensor) -> Tensor:
    """B (n, b, b), float32, in runs of b inputs, of entries (m, blocks, size, size) of which the
    skew parts are the Q of each block (I - Q) (I + Q)^-1."""
    import torch

    values = torch.as_tensor(entries).double()
    q = (values - values.mT) / 2
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    rotations = torch.linalg.solve(one + q, one - q, left=False)
    total: Tensor = rotations[0]
    for stage in range(1, len(rotations)):
        total = _spread(rotations[stage], stage) @ _paired(total)
    return total.to(torch.float32)


def _paired(blocks: Tensor) -> Tensor:
    """Every two blocks (n, b, b) as one (n / 2, 2 b, 2 b) with zeros between them."""
    count, size, _ = blocks.shape
    wide = blocks.new_zeros(count // 2, 2, size, 2, size)
    for half in range(2):
        wide[:, half, :, half] = blocks[half::2]
    return wide.reshape(count // 2, 2 * size, 2 * size)


def _spread(blocks: Tensor, stage: int) -> Tensor:
    """M of a stage: its blocks take their halves from a run of 2^stage blocks, the even ones first
    (peft 0.21 `tuners/boft/layer.py`, block_butterfly_perm)."""
    import torch

    half = blocks.shape[-1] // 2
    for _ in range(stage):
        blocks = _paired(blocks)
    halves = torch.arange(blocks.shape[-1], device=blocks.device).reshape(-1, half)
    order = torch.cat((halves[::2], halves[1::2])).flatten()
    return blocks[:, order][:, :, order]

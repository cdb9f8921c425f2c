"""An adapter in the words of another tool: PEFT's folder, or that of AdapterHub's library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.hub import express
from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import Base
from adapterkit.hub.convert import REPEATED, Options, fitting
from adapterkit.hub.findings import ERROR, clean, listing
from adapterkit.hub.fit import fit
from adapterkit.hub.formats import peft_write
from adapterkit.hub.formats.adapterhub_head import task_of
from adapterkit.hub.formats.peft_write import Part, Place
from adapterkit.hub.kinds import kind
from adapterkit.hub.kinds.base import Used, Whole
from adapterkit.hub.locate import Source, locate
from adapterkit.hub.made import Made, Origin, input_of, tool
from adapterkit.hub.offline import Ground, NeedsBaseError, lowered_at
from adapterkit.hub.primitives import LowRank
from adapterkit.hub.read import read_adapter
from adapterkit.hub.recipes import is_recipe
from adapterkit.hub.rooting import rooted
from adapterkit.hub.sources import Folder
from adapterkit.registry.errors import InvalidError, MismatchError

if TYPE_CHECKING:
    from torch import Tensor

    from adapterkit.hub.primitives import Primitive
    from adapterkit.registry import Registry

FORMATS = ("native", "peft", "adapters")


def exported(
    source: Source,
    to: str,
    base: str | Path | Base | None = None,
    *,
    registry: Registry | None = None,
) -> Made:
    """The adapter as the tool reads it, for `save`. base: needed where names or shapes of the base
    decide what is written.

    Raises InvalidError where that tool has nothing that is the same, and NeedsBaseError.
    """
    folder = locate(source, registry)
    if to not in FORMATS[1:]:
        what = f"the format {clean(repr(to), 40)}"
        raise InvalidError(f"{clean(folder.name)}: {what} cannot be written, only peft, adapters")
    if is_recipe(folder):
        raise InvalidError(
            f"{clean(folder.name)} is a recipe, which has no weights of its own",
            hint="export its parts, or make one adapter of them: adapter blend",
        )
    adapter = read_adapter(folder)
    adapter.require_sound()
    described = fitting(folder, adapter, base, Options())
    if described is not None:
        adapter = rooted(adapter, described)
    if to == "peft":
        files = _peft(adapter, described)
    else:
        from adapterkit.hub.formats.adapterhub_write import written

        files = written(folder, adapter, described)
    recipe = {"operation": "export", "inputs": [input_of(folder, adapter)], "tool": tool()}
    made = Made(f"{folder.name} for {to}", files | _others(folder, adapter, files), Origin(recipe))
    _require_read_back(made, adapter, described)
    _require_equal(made, adapter, described)
    return made


def _others(folder: Folder, adapter: Adapter, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Tokenizers and cards go along; what the adapter itself was read from does not."""
    kept = folder.files.keys() - adapter.files.keys() - files.keys()
    sources = {path: folder.files[path] for path in sorted(kept)}
    return {path: source.read(0, source.size) for path, source in sources.items()}


def _peft(adapter: Adapter, base: Base | None) -> dict[str, bytes]:
    if adapter.format == "peft":
        try:
            return peft_write.written(adapter)
        except InvalidError:
            if adapter.kind != "fused_lora":  # of a fork, and yet a LoRA of PEFT's own
                raise
    own, tensors = express.expressed(adapter.name, _primitives(adapter, base), base)
    parts: dict[Place, Part] = {
        place: Part.of(stored)
        for place, stored in adapter.tensors.items()
        if peft_write.is_replacing(place[1]) and not place[1].startswith(REPEATED)
    }
    parts |= {place: _part(adapter, tensor) for place, tensor in tensors.items()}
    modules = {module for module, _ in tensors}
    task = adapter.task or (None if base is None else task_of(base.architecture))
    return peft_write.files(peft_write.config_of(adapter, own, modules, task), parts)


def _part(adapter: Adapter, tensor: Tensor) -> Part:
    """In the dtype of the source where that is exact."""
    from adapterkit.hub.factored import part
    from adapterkit.hub.tensors import DTYPES

    for dtype in sorted({stored.dtype for stored in adapter.tensors.values()} & {"F16", "BF16"}):
        if bool((tensor.to(DTYPES[dtype]).to(tensor.dtype) == tensor).all()):
            return part(tensor.to(DTYPES[dtype]), dtype)
    return part(tensor.float(), "F32")


def _primitives(adapter: Adapter, base: Base | None) -> dict[str, list[Primitive]]:
    """All of them by module, "" for those of the model itself; in float32, as they are stored."""
    from adapterkit.hub.tensors import read_finite

    tensors = {p: t for p, t in read_finite(adapter).items() if not p[1].startswith(REPEATED)}
    made, ground = kind(adapter.kind), Ground.of(adapter, base)
    found: dict[str, list[Primitive]] = {}
    if isinstance(made, Whole):
        if base is None:
            raise NeedsBaseError(
                f"{clean(adapter.name)}: the places in its base are not known",
                hint="give the base: --base BASE",
            )
        whole = Used({p: t for p, t in tensors.items() if p[0] not in base.modules})
        for module, primitive in made.lower_whole(adapter.fields, base, whole):
            found.setdefault(module, []).append(primitive)
    names = adapter.modules if base is None else adapter.modules.keys() & base.modules.keys()
    for name in sorted(names):
        found.setdefault(name, []).extend(lowered_at(ground, name, tensors))
    return found


def _require_read_back(made: Made, adapter: Adapter, base: Base | None) -> None:
    """What was written is sound, and fits the base as the adapter did."""
    found = made.adapter
    errors = [] if base is None else [f for f in fit(found, base) if f.severity == ERROR]
    if errors:
        raise MismatchError(f"{clean(made.name)} cannot be written:\n{listing(errors)}")
    missing = adapter.modules.keys() - found.modules.keys()
    if missing and base is None:
        raise InvalidError(f"{clean(made.name)} lacks {clean(min(missing))}")


def _require_equal(made: Made, adapter: Adapter, base: Base | None) -> None:
    """It does the same: every primitive of one is there in the other."""
    try:
        before = _primitives(adapter, base)
    except NeedsBaseError:  # then its tensors went over as they are
        return
    after = _primitives(made.adapter, base)
    for module in before.keys() | after.keys():
        one, two = before.get(module, []), after.get(module, [])
        if len(one) != len(two) or not all(map(_same, one, two)):
            where = f" at {clean(module)}" if module else ""
            raise InvalidError(f"{clean(made.name)} would do something else{where}")


def _same(one: Primitive, two: Primitive) -> bool:
    """Equal to float32, however a scale is folded."""
    import torch

    if type(one) is not type(two):
        return False
    if isinstance(one, LowRank) and isinstance(two, LowRank):
        if one.B.shape[-2] != two.B.shape[-2] or one.A.shape[-1] != two.A.shape[-1]:
            return False
        y, z = _probed(one), _probed(two)
        return float((y - z).norm()) <= 1e-5 * float(y.norm())
    pairs = [(getattr(one, f.name), getattr(two, f.name), f.name) for f in fields(one)]
    return all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-7)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape
        else a == b or name == "heads"
        for a, b, name in pairs
        if not isinstance(a, tuple) or not any(isinstance(each, torch.Tensor) for each in a)
    )


def _probed(p: LowRank) -> Tensor:
    """What it adds for a few inputs, (..., out, 4)."""
    import torch

    draw = torch.Generator().manual_seed(0)
    z = p.A.double() @ torch.randn(p.A.shape[-1], 4, generator=draw, dtype=torch.float64)
    z = z if p.rank_scale is None else p.rank_scale.double()[:, None] * z
    y = p.scale * (p.B.double() @ z)
    return y if p.out_scale is None else p.out_scale.double()[:, None] * y

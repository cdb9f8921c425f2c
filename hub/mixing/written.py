"""A blend as the files of a PEFT folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import EMBEDDING, Base
from adapterkit.hub.convert import DTYPES, Conversion, biases
from adapterkit.hub.fields import PlainFields
from adapterkit.hub.findings import clean
from adapterkit.hub.formats import peft_write
from adapterkit.hub.formats.peft_write import Part, Place
from adapterkit.hub.made import Origin, input_of, origin_of, tool
from adapterkit.hub.matching import Targets
from adapterkit.hub.mixing.inputs import Input
from adapterkit.hub.mixing.options import AUTO, Options
from adapterkit.registry.errors import InvalidError

if TYPE_CHECKING:
    from torch import Tensor

    from adapterkit.hub.mixing.run import Found


@dataclass(frozen=True)
class Blend(Conversion):
    """dora: whether it is a DoRA, as a sum of DoRAs is one."""

    dora: bool = False


def written(
    inputs: Sequence[Input],
    base: Base | None,
    chosen: Options,
    found: Found,
    replaced_parts: Mapping[Place, Tensor],
) -> Blend:
    from adapterkit.hub import factored
    from adapterkit.hub.tensors import DTYPES as TORCH

    wanted = DTYPES[chosen.dtype or "float32"]
    dtype = factored.fitting_dtype(found.factors.values(), wanted, exact=False)
    size = max(1, *(factors.rank for factors in found.factors.values()))
    ground = inputs[0].ground
    parts: dict[Place, Part] = {}
    rows = []
    for row in found.rows:
        factors = found.factors[row.module]
        stored = factored.stored(factors, factors.rank if chosen.rank == AUTO else size, dtype)
        embedding = ground.module(row.module).type == EMBEDDING
        roles = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        parts[row.module, roles[0]], parts[row.module, roles[1]] = stored.a, stored.b
        rows.append(replace(row, rounding=stored.rounding))
        if row.module in found.magnitudes:
            vector = found.magnitudes[row.module].to(TORCH[dtype])
            parts[row.module, "magnitude"] = factored.part(vector, dtype)
    if found.shifts:
        _refuse_biased_dora(inputs, found)
        parts |= biases(ground, found.factors, found.shifts, dtype)
    for place, tensor in replaced_parts.items():
        parts[place] = factored.part(tensor.to(TORCH[dtype]), dtype)
    config = _config(inputs, found, size)
    if chosen.rank == AUTO:
        config["rank_pattern"] = {name: each.rank for name, each in found.factors.items()}
        config["alpha_pattern"] = dict(config["rank_pattern"])
    made = Blend(
        " + ".join(f"{one.weight:g} {one.name}" for one in inputs),
        peft_write.files(config, parts), origin(inputs, base, chosen), size, dtype, tuple(rows),
        bool(found.magnitudes),
    )  # fmt: skip
    if made.adapter.tensors.keys() != parts.keys():
        raise InvalidError(f"{clean(made.name)} cannot be written: PEFT would read other tensors")
    return made


def _refuse_biased_dora(inputs: Sequence[Input], found: Found) -> None:
    if found.magnitudes:
        names = ", ".join(one.name for one in inputs)
        raise InvalidError(f"{names}: PEFT has no DoRA that shifts biases too")


def _config(inputs: Sequence[Input], found: Found, size: int) -> dict[str, Any]:
    targets = {one.adapter.targets for one in inputs}
    about = common(inputs, inputs[0].adapter.targets if len(targets) == 1 else None)
    whole = {module for one in inputs for module in _whole(one)}
    saved = tuple(sorted({*about.targets.saved, *whole}))
    about = replace(about, targets=replace(about.targets, saved=saved))
    config = peft_write.lora_config(about, size, found.factors, lora_bias=bool(found.shifts))
    return config | ({"use_dora": True} if found.magnitudes else {})


def common(inputs: Sequence[Input], kept: Targets | None = None) -> Adapter:
    """What the config says besides of the kind: on what the inputs agree, and all they replace."""
    from adapterkit.hub.mixing.replaced import fields

    first = inputs[0].adapter
    saved = tuple(sorted({name for one in inputs for name in one.adapter.targets.saved}))
    return replace(
        first,
        fields=PlainFields(replaced=fields(inputs)),
        targets=replace(kept or Targets(), saved=saved),
        base_name=same([one.adapter.base_name for one in inputs]),
        revision=same([one.adapter.revision for one in inputs]),
        task=same([one.adapter.task for one in inputs]),
        config={} if first.format != "peft" else first.config,
    )


def _whole(one: Input) -> set[str]:
    """Modules that it replaces without calling them saved, as norms."""
    adapter = one.adapter
    if adapter.fields.replaced.bias != "none":
        return set()
    whole = {module for module, role in one.replaced if role == "replace.weight"}
    return {module for module in whole if not adapter.targets.is_saved(module)}


def same(values: Sequence[str | None]) -> str | None:
    """What all that say anything agree on."""
    said = {value for value in values if value}
    return said.pop() if len(said) == 1 else None


def _at(inputs: Sequence[Input], chosen: Options) -> dict[str, Any]:
    """Weights by module in the order of the inputs here, not in that they were given in."""
    at = {pattern: [shares[one.given] for one in inputs] for pattern, shares in chosen.at.items()}
    return {"at": at} if at else {}


def origin(inputs: Sequence[Input], base: Base | None, chosen: Options) -> Origin:
    from adapterkit.hub.ingest import touched

    recipe: dict[str, Any] = {
        "operation": "blend",
        "inputs": [{**input_of(one.folder, one.adapter), "weight": one.weight} for one in inputs],
        "parameters": chosen.parameters() | _at(inputs, chosen),
        "tool": tool(),
    }
    if chosen.allow_fields:
        recipe["allowed_fields"] = sorted(chosen.allow_fields)
    names: list[str] = []
    if base is not None:
        from adapterkit.hub.bases.digests import layout_digest

        layout = f"sha256:{layout_digest(base.tensors)}"
        recipe["base"] = {"layout": layout, "quantization": chosen.quantization}
        names = sorted({name for one in inputs for name in touched(one.adapter, base)})
    first = origin_of(inputs[0].folder, base, names, recipe, "blended-from")
    parents = tuple(
        (one.folder.manifest.id, "blended-from")
        for one in inputs
        if one.folder.manifest is not None
    )
    return replace(first, parents=tuple(dict.fromkeys(parents)))

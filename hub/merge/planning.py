"""From adapters and a base to a list of jobs: everything is checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.digests import layout_digest
from adapterkit.hub.bases.folder import find_base, read_base
from adapterkit.hub.compose.admit import Options as Attach
from adapterkit.hub.findings import clean
from adapterkit.hub.gather import Found, labels, require_fit
from adapterkit.hub.made import tool
from adapterkit.hub.merge.carried import merged_config
from adapterkit.hub.merge.given import Adapters, Given, class_of, given, mention_tokenizers
from adapterkit.hub.merge.jobs import Job, Output
from adapterkit.hub.merge.lowering import Input, Lowering
from adapterkit.hub.merge.onto import Ground, Onto, choose, quantized_by
from adapterkit.hub.merge.options import Options
from adapterkit.hub.merge.places import added, places
from adapterkit.hub.quant.packing import Scheme
from adapterkit.hub.quant.stored import DTYPES
from adapterkit.hub.rooting import rooted
from adapterkit.registry.errors import InvalidError, MismatchError


@dataclass(frozen=True, eq=False)
class Plan:
    """shards: file -> jobs. config: of the merged model. recipe: what decides every byte."""

    place: Path
    output: Output
    shards: Mapping[str, Sequence[Job]]
    onto: Onto
    untied: bool
    config: Mapping[str, Any]
    recipe: Mapping[str, Any]
    options: Options

    @property
    def identity(self) -> dict[str, Any]:
        """What has to be the same for a merge to go on: the recipe, and the base's files."""
        files = self.output.base.weight_files
        return {"recipe": self.recipe, "files": {name: _stamp(files[name]) for name in files}}

    @property
    def quantization(self) -> str:
        return "none" if self.output.scheme is None else self.output.scheme.method


def plan(adapters: Adapters, base: str | Path, options: Options) -> Plan:
    """Raises MismatchError with all findings if an adapter does not belong to the base,
    InvalidError for what cannot be merged."""
    place = base if isinstance(base, Path) else find_base(base)
    stored = read_base(place)
    every = given(adapters, options)
    found = [one.found for one in every]
    onto = choose(options.onto, options.trained_on, stored, [one.folder for one in found])
    attach = Attach(strict=options.strict, allow_fields=options.allow_fields)
    require_fit(found, stored, None if onto.scheme is None else onto.scheme.method, attach)
    mention_tokenizers(every, stored)
    described = class_of(every, stored)
    quantized = frozenset[str]()
    if onto.scheme is not None:
        quantized = quantized_by(described, described.config, onto.scheme)
    ground = Ground(described, onto.scheme, quantized)
    lowering = Lowering(described, [_input(one, described, ground) for one in every])
    lowering.require_mergeable()
    _require_biases(described, lowering)
    extra, untied = added(described, lowering)
    changes = _changes(found, stored, described, untied)
    scheme, packed = _packed(described, changes, options)
    if scheme is None and options.correction_rank is not None:
        raise InvalidError(
            "correction_rank is of what 8 or 4 bits lose, and what is written is not quantized",
            hint="--quantize nf4, or leave out --correction-rank",
        )
    output = Output(
        described, lowering, ground, places(described),
        dtype=DTYPES.get(options.dtype or ""), scheme=scheme, packed=packed, added=tuple(extra),
        correction_rank=options.correction_rank,
    )  # fmt: skip
    config = merged_config(described, changes, scheme, options.dtype)
    recipe = _recipe(every, described, onto, scheme, options)
    chosen = replace(options, registry=None)  # nothing more is looked up, here or elsewhere
    return Plan(place, output, output.shards(), onto, untied, config, recipe, chosen)


def _input(one: Given, base: Base, ground: Ground) -> Input:
    adapter = rooted(one.found.adapter, base)
    return Input.of(one.found.name, one.weight, adapter, ground, base)


def _require_biases(base: Base, lowering: Lowering) -> None:
    """A layer of a transformers model has a bias or has none: there is no place for one more."""
    inputs = [one for one in lowering.inputs if any(role in BIASES for _, role in one.tensors)]
    rows = dict.fromkeys(row for one in inputs for row in one.sources)
    lacking = [row for row in rows if not base.modules[row].bias and has_shift(lowering, row)]
    if lacking:
        shown = ", ".join(map(clean, lacking[:10]))
        more = f" and {len(lacking) - 10} more" if len(lacking) > 10 else ""
        raise MismatchError(
            f"the adapters add a bias to modules that have none in {clean(base.architecture)}:"
            f" {shown}{more}",
            hint="attach them instead: adapterkit.hub.load(BASE, adapters)",
        )


# Roles of which the kinds make shifts of a bias.
BIASES = ("B_bias", "shift", "bias")


def has_shift(lowering: Lowering, row: str) -> bool:
    from adapterkit.hub.primitives import BiasShift

    return any(isinstance(update.primitive, BiasShift) for update in lowering.updates(row))


def _changes(found: Sequence[Found], stored: Base, described: Base, untied: bool) -> dict[str, Any]:
    """Fields of the config that differ from the base's."""
    changes: dict[str, Any] = {}
    if untied:
        changes["tie_word_embeddings"] = False
    if described.architecture != stored.architecture:
        changes["architectures"] = [described.architecture]
    count = labels(list(found))
    names = stored.config.get("id2label")
    if count and count != (len(names) if isinstance(names, dict) else 2):
        changes["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
        changes["label2id"] = {f"LABEL_{i}": i for i in range(count)}
    return changes


def _packed(
    base: Base, changes: Mapping[str, Any], options: Options
) -> tuple[Scheme | None, frozenset[str]]:
    """How the output is quantized, and which modules."""
    stored = Scheme.of(base.quantization)
    wanted = options.quantize
    if wanted == "none" or (wanted is None and stored is None):
        return None, frozenset()
    scheme = stored if wanted is None or (stored and wanted == stored.method) else Scheme(wanted)
    if scheme is None:
        return None, frozenset()
    return scheme, quantized_by(base, {**base.config, **changes}, scheme)


def _recipe(
    every: Sequence[Given], base: Base, onto: Onto, scheme: Scheme | None, options: Options
) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "quantize": "none" if scheme is None else vars(scheme),
        "onto": onto.word if onto.scheme is None else {onto.word: vars(onto.scheme)},
        "dtype": options.dtype,
        "dialect": options.dialect,
        "min_gain": options.min_gain,
    }
    if options.correction_rank is not None:
        parameters["correction_rank"] = options.correction_rank
    if options.allow_fields:
        parameters["allow_fields"] = sorted(options.allow_fields)
    return {
        "operation": "merge",
        "inputs": [one.record() for one in every],
        "base": {"layout": f"sha256:{layout_digest(base.tensors)}"},
        "parameters": parameters,
        "tool": tool(),
    }


def _stamp(source: Any) -> dict[str, Any]:
    """What tells that a file is still the one it was when the merge began."""
    path = getattr(source, "path", None)
    stamp = {} if path is None else {"modified": path.stat().st_mtime_ns}
    return {"size": source.size, **stamp}

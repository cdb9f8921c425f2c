"""What is to be loaded onto a base, and what it asks of the base."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import EMBEDDING, Base, Module
from adapterkit.hub.check import check
from adapterkit.hub.compose.admit import Options
from adapterkit.hub.compose.weighing import parse
from adapterkit.hub.findings import INCOMPATIBLE, OTHER_WEIGHTS, UNKNOWN, clean, listing
from adapterkit.hub.locate import Source, locate, named
from adapterkit.hub.read import read_adapter
from adapterkit.hub.recipes import is_recipe
from adapterkit.hub.sources import Folder
from adapterkit.hub.unfold import unfold
from adapterkit.registry.errors import AdapterWarning, MismatchError

HEADS = ("score", "classifier", "out_proj")
TABLES = ("table", "replace.weight")


@dataclass(frozen=True)
class Asked:
    """What is to be attached: an adapter, or a recipe. name, weight: as the user gives them."""

    name: str
    folder: Folder
    weight: float


@dataclass(frozen=True)
class Found:
    """One adapter to load: what messages call it, its files, what it is. asked: for what it is."""

    name: str
    folder: Folder
    adapter: Adapter
    asked: Asked


def gather(
    adapters: Mapping[str, float] | Sequence[Source] | Source | None, options: Options
) -> list[Found]:
    """Every adapter asked for, read; of a recipe, its parts. Raises InvalidError for what is no
    source or no weight."""
    if adapters is None:
        return []
    if isinstance(adapters, Mapping):
        sources = named(list(adapters))
        weights = parse(dict(zip(sources, adapters.values(), strict=True)))
    else:
        sources = named(adapters)
        weights = dict.fromkeys(sources, 1.0)
    found = []
    for name, source in sources.items():
        folder = locate(source, options.registry)
        asked = Asked(name, folder, weights[name])
        for label, part in _adapters(asked, options):
            found.append(Found(label, part, read_adapter(part, options.allow_fields), asked))
    return found


def _adapters(asked: Asked, options: Options) -> Iterator[tuple[str, Folder]]:
    if not is_recipe(asked.folder):
        yield asked.name, asked.folder
        return
    for i, leaf in enumerate(unfold(asked.folder, options.registry).leaves):
        yield f"{asked.name}[{i}] {leaf.label}", leaf.folder


def require_fit(found: list[Found], base: Base, quantization: str | None, options: Options) -> None:
    """MismatchError with the findings of every adapter that does not belong to the base. Warns of
    heads that nobody trained: on the model they cannot be told from others."""
    reports = {one.name: check(one.folder, base=base, quantization=quantization) for one in found}
    bad = (INCOMPATIBLE, OTHER_WEIGHTS, UNKNOWN)
    faults = [
        f"{clean(name)} does not belong to {clean(base.name)}, {report.verdict}:\n"
        f"{listing(report.findings)}"
        for name, report in reports.items()
        if report.verdict in bad or (options.strict and report.warnings)
    ]
    if faults:
        raise MismatchError("\n".join(faults))
    for name, report in reports.items():
        heads = [finding for finding in report.warnings if finding.code == "untrained-head"]
        if heads:
            text = f"{clean(name)} on {clean(base.name)}:\n{listing(heads)}"
            warnings.warn(text, AdapterWarning, stacklevel=3)


def vocabulary(found: list[Found], base: Base) -> int | None:
    """Rows of the tables the adapters carry, when they are more than the base's.

    Raises MismatchError if they differ, or if the base has a table whose new rows none of them
    brings: those would be random.
    """
    tables = {name: row for name, row in base.modules.items() if is_table(base, row)}
    held = dict(_tables(found, tables))
    sizes = {rows for rows in held.values() if rows > (base.vocabulary or 0)}
    if not sizes:
        return None
    if len(sizes) > 1:
        raise MismatchError(f"the adapters carry tables of {sorted(sizes)} rows, expected one size")
    bare = [name for name, row in tables.items() if not {name, row.tied_to} & held.keys()]
    if bare:
        raise MismatchError(
            f"{', '.join(bare)} would get random rows: no adapter brings the new ones",
            hint="save the adapter with the resized head, or load it on the resized base",
        )
    return sizes.pop()


def _tables(found: list[Found], tables: Mapping[str, Module]) -> Iterator[tuple[str, int]]:
    """(module, rows) of every table in an adapter's file."""
    for one in found:
        for (module, role), stored in one.adapter.tensors.items():
            if role in TABLES and module in tables:
                yield module, stored.shape[0]


def is_table(base: Base, module: Module) -> bool:
    """Whether it has a row for each token: an embedding of that size, or a head beside it."""
    rows = base.vocabulary
    kind = module.type == EMBEDDING or module.tied_to is not None or module.name == "lm_head"
    return kind and rows is not None and module.shape[0] >= rows


def labels(found: list[Found]) -> int | None:
    """Rows of the classification heads the adapters carry."""
    sizes = {
        stored.shape[0]
        for one in found
        for (module, role), stored in one.adapter.tensors.items()
        if role == "replace.weight" and one.adapter.task in ("SEQ_CLS", "TOKEN_CLS")
        if module.rpartition(".")[2] in HEADS
    }
    if len(sizes) > 1:
        raise MismatchError(
            f"the adapters have heads of {sorted(sizes)} labels, expected one number"
        )
    return sizes.pop() if sizes else None

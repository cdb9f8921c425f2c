"""Parts of the base that any kind may replace: whole modules, biases, rows of the token table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import CONV1D, EMBEDDING, LINEAR, Module
from adapterkit.hub.fields import HEAD, ReplacedFields
from adapterkit.hub.findings import ERROR, WARNING, Finding
from adapterkit.hub.kinds import heads
from adapterkit.hub.kinds.base import Expected, Lowered, Schema, Site
from adapterkit.hub.primitives import Replace

if TYPE_CHECKING:
    from torch import Tensor

# PEFT adds these to `modules_to_save` of every classification adapter, whatever the head is called.
HEADS = ("classifier", "score")


def schema(
    adapter: Adapter,
    fields: ReplacedFields,
    modules: Mapping[str, Module],
    selected: Iterable[str],
) -> Schema:
    """Tensors that replace parts of a base with these modules; `selected` are the targeted ones."""
    tensors: dict[tuple[str, str], Expected] = {}
    for name, module in modules.items():
        if adapter.targets.is_saved(name):
            tensors |= _whole(module)
        elif fields.bias == "all":
            tensors |= _bias(module) | _named_bias(module) | _copied_bias(module)
    if fields.bias == "lora_only":
        for name in selected:
            tensors |= _bias(modules[name])
    tensors |= _tables(adapter, modules)
    if fields.head is not None:
        tensors |= heads.schema(fields.head, modules)
    rows, findings = _rows(adapter, fields, modules)
    return Schema(tensors | rows, tuple(findings + _absent(adapter, modules)))


def problems(adapter: Adapter, fields: ReplacedFields) -> list[Finding]:
    """Trained rows that the config names and the file lacks, or the other way round."""
    stored = {m: tensor for (m, role), tensor in adapter.tensors.items() if role == "tokens"}
    found = []
    for entry, rows in fields.tokens.items():
        # of two tied tables with the same rows, PEFT stores one
        twins = [other for other, same in fields.tokens.items() if same == rows]
        if not any(belongs(name, twin) for name in stored for twin in twins):
            where, want = entry or "the input embedding", f"{len(rows)} trained token rows"
            found.append(Finding(ERROR, "missing-tensor", where, want, "none"))
    for name, tensor in stored.items():
        n_rows = [len(rows) for entry, rows in fields.tokens.items() if belongs(name, entry)]
        if len(n_rows) > 1:
            about = f"{len(n_rows)} entries of the config mean it"
            found.append(Finding(ERROR, "ambiguous-tokens", tensor.key, "one list of rows", about))
        elif not n_rows:
            about = "token rows, though the config trains none there"
            found.append(Finding(ERROR, "unexpected-tensor", tensor.key, "no token rows", about))
        elif len(tensor.shape) == 2 and tensor.shape[0] != n_rows[0]:
            want, has = f"{n_rows[0]} token rows", f"shape {list(tensor.shape)}"
            found.append(Finding(ERROR, "shape-mismatch", tensor.key, want, has))
    return found


def stored_shape(module: Module) -> tuple[int, ...]:
    """The weight as torch keeps it: transformers' Conv1D is transposed."""
    return module.shape[::-1] if module.type == CONV1D else module.shape


def _whole(module: Module) -> dict[tuple[str, str], Expected]:
    weight = {(module.name, "replace.weight"): Expected(stored_shape(module))}
    copies = {
        (module.name, f"wrapper.{place}.{parameter}"): Expected(shape, required=False)
        for place in ("modules_to_save", "original_module")
        for parameter, shape in (("weight", stored_shape(module)), ("bias", (module.n_out,)))
    }
    return weight | copies | _bias(module)


def _bias(module: Module) -> dict[tuple[str, str], Expected]:
    if module.bias is None:
        return {}
    return {(module.name, "replace.bias"): Expected((module.n_out,))}


def _copied_bias(module: Module) -> dict[tuple[str, str], Expected]:
    """The same bias under another name, where the model has two for it."""
    if module.bias is None:
        return {}
    copy = (module.name, "wrapper.modules_to_save.bias")
    return {copy: Expected((module.n_out,), required=False)}


def _named_bias(module: Module) -> dict[tuple[str, str], Expected]:
    """PEFT's bias="all" takes every parameter with "bias" in its name, such as the relative
    attention bias of T5, which is an embedding."""
    if "bias" not in module.name:
        return {}
    return {(module.name, "replace.weight"): Expected(stored_shape(module), required=False)}


def _tables(adapter: Adapter, modules: Mapping[str, Module]) -> dict[tuple[str, str], Expected]:
    """A copy of a vocabulary table, which PEFT writes for a targeted or resized one."""
    names = [module for module, role in adapter.tensors if role == "table" and module in modules]
    kinds = (EMBEDDING, LINEAR)
    return {
        (name, "table"): Expected(modules[name].shape, required=False)
        for name in names
        if modules[name].type in kinds
    }


def _rows(
    adapter: Adapter, fields: ReplacedFields, modules: Mapping[str, Module]
) -> tuple[dict[tuple[str, str], Expected], list[Finding]]:
    stored = [module for module, role in adapter.tensors if role == "tokens"]
    tensors: dict[tuple[str, str], Expected] = {}
    findings = []
    for entry, rows in fields.tokens.items():
        if not any(belongs(name, entry) for name in stored) and not _is_tied(modules, entry):
            where, want = entry or "the input embedding", f"{len(rows)} trained token rows"
            findings.append(Finding(ERROR, "missing-tensor", where, want, "none"))
        for name in (name for name in stored if belongs(name, entry) and name in modules):
            table = modules[name]
            tensors[name, "tokens"] = Expected((len(rows), table.shape[-1]))
            if max(rows) >= table.shape[0]:
                found, room = f"row {max(rows)}", f"rows below {table.shape[0]}"
                findings.append(Finding(ERROR, "token-out-of-range", name, room, found))
    return tensors, findings


def _is_tied(modules: Mapping[str, Module], entry: str) -> bool:
    """Whether an entry means a module that shares another one's table."""
    return any(module.tied_to for name, module in modules.items() if belongs(name, entry))


def belongs(name: str, entry: str) -> bool:
    return not entry or name == entry or name.endswith(f".{entry}")


def _absent(adapter: Adapter, modules: Mapping[str, Module]) -> list[Finding]:
    """Saved modules that neither the base nor the file has."""
    held = [name for name, _ in adapter.tensors] + list(modules)
    absent = [
        entry
        for entry in adapter.targets.saved
        if entry not in HEADS
        and not any(entry in name.split(".") or name.endswith(entry) for name in held)
    ]
    return [
        Finding(
            WARNING,
            "saved-module-absent",
            entry,
            "a module of the base",
            "neither base nor file has it",
        )
        for entry in absent
    ]


WHOLE = ("table", "replace.weight")


def lower(fields: ReplacedFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
    """Replace for each part; trained rows and tables reach every module tied to the table."""
    name = site.module.name
    whole: Tensor | None = None
    for role in p:
        if role in WHOLE:
            whole = p[role]
        elif role.startswith("replace.") and not role.startswith(HEAD):
            yield name, Replace(p[role], role.removeprefix("replace."))
    if fields.head is not None and any(role.startswith(HEAD) for role in p):
        yield from heads.lower(fields.head, p)
    rows = next((rows for entry, rows in fields.tokens.items() if belongs(name, entry)), ())
    if whole is not None:
        new = _with_rows(whole, rows, p["tokens"]) if "tokens" in p else whole
        yield name, Replace(new)
        if fields.tie or "table" in p:
            yield from ((other, Replace(new)) for other in site.tied(*WHOLE))
    elif "tokens" in p:
        yield name, Replace(p["tokens"], rows=rows)
        yield from ((other, Replace(p["tokens"], rows=rows)) for other in site.tied("tokens"))


def _with_rows(table: Tensor, rows: tuple[int, ...], new: Tensor) -> Tensor:
    """The table with these rows exchanged. table (n, width), new (len(rows), width)."""
    changed = table + 0  # a copy, whatever keeps the values
    changed[list(rows)] = new
    return changed

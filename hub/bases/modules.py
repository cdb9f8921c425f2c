"""From (config.json, header) to the modules transformers builds, by name; see `families`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from adapterkit.hub.bases.base import (
    CONV,
    CONV1D,
    EMBEDDING,
    EXPERTS,
    LINEAR,
    NORM,
    OTHER,
    Module,
)
from adapterkit.hub.bases.names import Names, number
from adapterkit.hub.bases.packed import auxiliary, logical_shapes
from adapterkit.hub.bases.tasks import Head
from adapterkit.hub.findings import clean
from adapterkit.hub.headers import FLOATS, Stored
from adapterkit.registry.errors import DamagedError, MismatchError

EMBEDDING_NAME = (
    r"(?:^|\.)(?:wte|wpe|shared|embed_in|embed_tokens|embed_positions|\w+_embeddings?"
    r"|relative_attention_bias)$"
)
WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "dim")
MAX_DEPTH = 10_000

Shape = tuple[int, ...]


def module_table(
    config: Mapping[str, Any], tensors: Mapping[str, Stored], architecture: str | None = None
) -> dict[str, Module]:
    """Every leaf module with weights, by run-time name, heads the checkpoint lacks included.

    architecture: class to build instead of the config's, to load the same files for another task.
    Raises MismatchError if the model type or the class is not in the table of families,
    DamagedError if the tensors contradict the config.
    """
    names = Names.of(config, architecture)
    return _Builder(config, tensors, names, logical_shapes(tensors)).table()


def unclaimed(
    config: Mapping[str, Any], tensors: Mapping[str, Stored], modules: Mapping[str, Module]
) -> tuple[str, ...]:
    """Checkpoint tensors that are no module's, no quantization constant and no known buffer."""
    used = {name for row in modules.values() for name in (*row.weight, row.bias or "")}
    names = Names.of(config)
    rest = tensors.keys() - used - auxiliary(tensors)
    return tuple(sorted(name for name in rest if not names.is_buffer(name)))


@dataclass(frozen=True)
class _Builder:
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    names: Names
    shapes: Mapping[str, Shape]

    @cached_property
    def keys(self) -> dict[str, str]:
        """Run-time parameter name -> checkpoint tensor."""
        found: dict[str, str] = {}
        for key in self.shapes:
            name = self.names.runtime(key)
            # A file that holds both names of one parameter: its own name wins over a renamed one.
            if name and (name not in found or name == key):
                found[name] = key
        return found

    def table(self) -> dict[str, Module]:
        self._check_prefix()
        self._check_depth()
        single = dict(self.keys)
        rows = self._experts(single)
        owners: dict[str, dict[str, str]] = {}
        for name, key in single.items():
            module, _, leaf = name.rpartition(".")
            if leaf in ("weight", "bias") and module:
                owners.setdefault(module, {})[leaf] = key
            else:
                kind = EXPERTS if re.search(r"\.experts\.\w+$", name) else OTHER
                rows[name] = Module(name, kind, self.shapes[key], (key,))
        for module, leaves in owners.items():
            rows[module] = self._row(module, leaves)
        self._add_heads(rows)
        self._tie(rows)
        return rows

    def _check_prefix(self) -> None:
        """transformers would find none of the weights under another prefix, and start at random."""
        theirs, ours = self.names.family.prefix, self.names.prefix
        if ours in ("", theirs) or not any(name.startswith(theirs + ".") for name in self.shapes):
            return
        raise MismatchError(
            f"{self.names.architecture} names its body `{ours}`, but these weights are named"
            f" `{theirs}.*`: transformers would load none of them"
        )

    def _check_depth(self) -> None:
        depth = self.names.depth
        if not self.names.family.layers or depth is None:
            return
        found = {self.names.layer(self.names.body(name)) for name in self.keys}
        missing = [layer for layer in range(min(depth, MAX_DEPTH)) if layer not in found]
        if missing or depth > MAX_DEPTH:
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise DamagedError(
                f"config.json says {depth} layers, but the weights lack {len(missing)} of them:"
                f" {shown}"
            )

    def _experts(self, single: dict[str, str]) -> dict[str, Module]:
        """Rows of the fused parameters; what they consume leaves `single`."""
        rows: dict[str, Module] = {}
        for fuse in self.names.family.experts:
            parts: dict[str, dict[tuple[int, int], str]] = {}
            for name in list(single):
                if found := re.match(fuse.pattern, name):
                    place = (int(found[2]), fuse.order.index(found[3]))
                    parts.setdefault(f"{found[1]}.{fuse.target}", {})[place] = single.pop(name)
            for target, keys in parts.items():
                rows[target] = self._fused(target, keys, len(fuse.order))
        return rows

    def _fused(self, target: str, keys: Mapping[tuple[int, int], str], n_parts: int) -> Module:
        ordered = [keys[place] for place in sorted(keys)]
        n_experts = max(expert for expert, _ in keys) + 1
        shapes = {self.shapes[key] for key in ordered}
        if len(ordered) != n_experts * n_parts or len(shapes) != 1 or len(min(shapes)) != 2:
            raise DamagedError(
                f"{clean(target)} has {len(ordered)} expert tensors of shapes"
                f" {clean(str(sorted(shapes)))}, expected {n_parts} of one shape for each of"
                f" {n_experts} experts"
            )
        rows, width = min(shapes)
        return Module(target, EXPERTS, (n_experts, n_parts * rows, width), tuple(ordered))

    def _row(self, module: str, leaves: Mapping[str, str]) -> Module:
        bias = leaves.get("bias")
        if "weight" not in leaves:
            for name, head in self.names.heads:
                if name == module:
                    return replace(self._head(name, head), bias=bias)
            return Module(module, OTHER, self.shapes[leaves["bias"]], (), bias)
        key = leaves["weight"]
        kind = self._type(module, self.shapes[key])
        if kind == CONV1D and self.tensors[key].dtype not in FLOATS:
            kind = LINEAR  # bitsandbytes makes it one, and stores it as such
        shape = self.shapes[key][::-1] if kind == CONV1D else self.shapes[key]
        return Module(module, kind, shape, (key,), bias)

    def _type(self, module: str, shape: Shape) -> str:
        if len(shape) != 2:
            return OTHER if not shape else NORM if len(shape) == 1 else CONV
        family = self.names.family
        rules = ((family.routers, OTHER), (family.conv1d, CONV1D), (EMBEDDING_NAME, EMBEDDING))
        return next((kind for rule, kind in rules if rule and re.search(rule, module)), LINEAR)

    def _head(self, name: str, head: Head) -> Module:
        """A head that the checkpoint lacks: transformers creates it with these shapes."""
        rows, cols = self._size(head.rows), self._size(head.cols)
        shape = (rows,) if head.type == NORM else (rows, cols)
        return Module(name, head.type, shape, (), "" if head.bias else None)

    def _add_heads(self, rows: dict[str, Module]) -> None:
        for name, head in self.names.heads:
            if name not in rows:
                rows[name] = self._head(name, head)
            elif head.bias and rows[name].bias is None:
                rows[name] = replace(rows[name], bias="")

    def _size(self, size: str | int) -> int:
        if isinstance(size, int):
            return size
        count: int | None
        if size == "labels":
            labels = self.config.get("id2label")
            said = number(self.config, ("num_labels",))
            # transformers builds two labels where the config is silent.
            count = len(labels) if isinstance(labels, dict) else 2 if said is None else said
        elif size == "hidden":
            count = number(self.config, WIDTH_KEYS)
        else:
            count = self._embedding[0 if size == "vocab" else 1]
        if count is None:
            raise DamagedError(f"config.json does not say the size `{size}` of a head")
        return count

    @cached_property
    def _embedding(self) -> Shape:
        wanted = self.names.join(self.names.family.embedding)
        tied = [name for name, head in self.names.heads if head.tied]
        for name in (wanted, *tied):
            key = self.keys.get(name + ".weight")
            if key is not None and len(self.shapes[key]) == 2:
                return self.shapes[key]
        raise DamagedError(f"the weights hold no input embedding {wanted}")

    def _tie(self, rows: dict[str, Module]) -> None:
        if not self._tied():
            return
        family = self.names.family
        source = self.names.join(family.embedding)
        pairs = [(self.names.join(a), self.names.join(b)) for a, b in family.ties]
        pairs += [(name, source) for name, head in self.names.heads if head.tied]
        for name, other in pairs:
            if not self.names.drops(self.names.body(name)):
                self._share(rows, name, other)

    def _tied(self) -> bool:
        text = self.config.get("text_config")
        sources = (self.config, text if isinstance(text, dict) else {})
        said = [source.get("tie_word_embeddings") for source in sources]
        known = [value for value in said if value is not None]
        family = self.names.family
        return family.always_tied or (any(known) if known else family.tied)

    def _share(self, rows: dict[str, Module], name: str, source: str) -> None:
        """As transformers does: whichever of the two the file holds is the source of the other."""
        for absent in (name, source):
            rows.setdefault(absent, Module(absent, EMBEDDING, self._embedding))
        first, second = rows[name], rows[source]
        if second.weight and (not first.weight or self._same(first, second)):
            rows[name] = replace(first, shape=second.shape, tied_to=source)
        elif first.weight and not second.weight:
            rows[source] = replace(second, shape=first.shape, tied_to=name)

    def _same(self, first: Module, second: Module) -> bool:
        """Whether two stored copies are equal, seen at both ends: different values are not tied."""
        a, b = self.tensors[first.weight[0]], self.tensors[second.weight[0]]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        size = min(a.size, 1 << 16)
        return all(
            a.source.read(x, size) == b.source.read(y, size)
            for x, y in ((a.start, b.start), (a.stop - size, b.stop - size))
        )

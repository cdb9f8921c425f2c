"""From (config.json, header) to the modules transformers builds, by name; see `families`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapterkit.hub.bases.base import (
    CONV, CONV1D, EMBEDDING, EXPERTS, LINEAR, NORM, OTHER, Module,
)  # fmt: skip
from adapterkit.hub.bases.families import FAMILIES, LEGACY, Family, Head, Task
from adapterkit.hub.bases.packed import auxiliary, logical_shapes
from adapterkit.hub.findings import clean
from adapterkit.hub.headers import Stored
from adapterkit.registry.errors import DamagedError, MismatchError

EMBEDDING_NAME = re.compile(
    r"(?:^|\.)(?:wte|wpe|shared|embed_in|embed_tokens|embed_positions|\w+_embeddings?"
    r"|relative_attention_bias)$"
)
# Buffers that older versions of transformers wrote and current ones compute.
BUFFERS = re.compile(
    r"(?:^|\.)(?:inv_freq|position_ids|token_type_ids|(?:attn|attention)\.(?:masked_)?bias)$"
)
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "dim")

Shape = tuple[int, ...]


def module_table(
    config: Mapping[str, Any], tensors: Mapping[str, Stored], architecture: str | None = None
) -> dict[str, Module]:
    """Every leaf module with weights, by run-time name, heads the checkpoint lacks included.

    architecture: class to build instead of the config's, to load the same files for another task.
    Raises MismatchError if the model type or the class is not in the table of families,
    DamagedError if the tensors contradict the config.
    """
    return _Builder.of(config, tensors, architecture).table()


def architectures(model_type: str) -> dict[str, str]:
    """Task suffix (`ForCausalLM`, `Model`, ...) -> class name, the main task first."""
    family = _family({"model_type": model_type})
    names = {suffix: family.classes.get(suffix, family.name + suffix) for suffix in family.tasks}
    return {suffix: name for suffix, name in names.items() if name}


def unclaimed(
    config: Mapping[str, Any], tensors: Mapping[str, Stored], modules: Mapping[str, Module]
) -> tuple[str, ...]:
    """Checkpoint tensors that are no module's, no quantization constant and no known buffer."""
    used = {name for row in modules.values() for name in (*row.weight, row.bias or "")}
    known = re.compile(_family(config).buffers or r"(?!)")
    rest = tensors.keys() - used - auxiliary(tensors)
    return tuple(sorted(n for n in rest if not BUFFERS.search(n) and not known.search(n)))


def _family(config: Mapping[str, Any]) -> Family:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        shown = clean(repr(model_type))
        named = clean(repr(config.get("architectures")))
        raise MismatchError(
            f"model_type {shown} (architecture {named}) is not a known model family",
            hint=f"known: {', '.join(sorted(FAMILIES))}",
        )
    return FAMILIES[model_type]


def _task(config: Mapping[str, Any], family: Family, architecture: str | None) -> Task:
    known = architectures(str(config["model_type"]))
    named = config.get("architectures")
    if architecture is None and isinstance(named, list) and named:
        architecture = str(named[0])
    if architecture is None:
        return next(iter(family.tasks.values()))
    for suffix, name in known.items():
        if name == architecture:
            return family.tasks[suffix]
    raise MismatchError(
        f"architecture {clean(architecture)} is not one of the known classes of model_type"
        f" {config['model_type']}",
        hint=f"known: {', '.join(known.values())}",
    )


@dataclass(frozen=True)
class _Builder:
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    family: Family
    task: Task
    shapes: Mapping[str, Shape]

    @classmethod
    def of(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Stored], architecture: str | None
    ) -> _Builder:
        family = _family(config)
        return cls(
            config, tensors, family, _task(config, family, architecture), logical_shapes(tensors)
        )

    @property
    def prefix(self) -> str:
        return self.family.prefix if self.task.prefix is None else self.task.prefix

    def table(self) -> dict[str, Module]:
        named: dict[str, str] = {}
        for key in self.shapes:
            name = self._name(key)
            # A file that holds both names of one parameter: its own name wins over a renamed one.
            if name and (name not in named or name == key):
                named[name] = key
        self._check_depth(named)
        rows = self._experts(named)
        owners: dict[str, dict[str, str]] = {}
        for name, key in named.items():
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

    def _name(self, key: str) -> str | None:
        """Run-time parameter name of a checkpoint tensor; None if this class has no such one."""
        if BUFFERS.search(key) or re.search(self.family.buffers or r"(?!)", key):
            return None
        name = key
        for pattern, replacement in (*LEGACY, *self.family.renames):
            name = re.sub(pattern, replacement, name)
        body = _strip(name, (self.family.prefix, self.prefix))
        if body is None:
            if self._heads(name):
                return name if name.rpartition(".")[0] in self._outside() else None
            body = name
        if self.task.drop and re.search(self.task.drop, body):
            return None
        if self.family.layers and (layer := re.search(self.family.layers, body)):
            depth = self._number(DEPTH_KEYS)
            # transformers builds as many layers as the config says and ignores the rest.
            if depth is not None and int(layer[1]) >= depth:
                return None
        return self._join(body)

    def _join(self, body: str) -> str:
        return f"{self.prefix}.{body}" if self.prefix else body

    def _outside(self) -> set[str]:
        return {head.name for head in self.task.heads if not head.inside}

    def _heads(self, name: str) -> bool:
        roots = {h.name for task in self.family.tasks.values() for h in task.heads if not h.inside}
        return any(name == root or name.startswith(root + ".") for root in roots)

    def _number(self, keys: tuple[str, ...]) -> int | None:
        text = self.config.get("text_config")
        for source in (self.config, text if isinstance(text, dict) else {}):
            for key in keys:
                if isinstance(source.get(key), int):
                    return int(source[key])
        return None

    def _check_depth(self, named: Mapping[str, str]) -> None:
        depth = self._number(DEPTH_KEYS)
        if not self.family.layers or depth is None:
            return
        bodies = (_strip(name, (self.prefix,)) or name for name in named)
        found = {int(m[1]) for body in bodies if (m := re.search(self.family.layers, body))}
        missing = sorted(set(range(min(depth, 10_000))) - found)
        if missing or depth > 10_000:
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise DamagedError(
                f"config.json says {depth} layers, but the weights lack {len(missing)} of them:"
                f" {shown}"
            )

    def _experts(self, named: dict[str, str]) -> dict[str, Module]:
        """Rows of the fused parameters; what they consume leaves `named`."""
        rows: dict[str, Module] = {}
        for fuse in self.family.experts:
            parts: dict[str, dict[tuple[int, int], str]] = {}
            for name in list(named):
                if found := re.match(fuse.pattern, name):
                    place = (int(found[2]), fuse.order.index(found[3]))
                    parts.setdefault(f"{found[1]}.{fuse.target}", {})[place] = named.pop(name)
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
            head = next((h for h in self._task_heads() if h[0] == module), None)
            if head is None:
                return Module(module, OTHER, self.shapes[leaves["bias"]], (), bias)
            return replace(self._head(*head), bias=bias)
        key = leaves["weight"]
        kind = self._type(module, self.shapes[key])
        shape = self.shapes[key][::-1] if kind == CONV1D else self.shapes[key]
        return Module(module, kind, shape, (key,), bias)

    def _type(self, module: str, shape: Shape) -> str:
        if len(shape) != 2:
            return OTHER if not shape else NORM if len(shape) == 1 else CONV
        rules = (
            (self.family.routers, OTHER), (self.family.conv1d, CONV1D),
            (EMBEDDING_NAME.pattern, EMBEDDING),
        )  # fmt: skip
        return next((kind for rule, kind in rules if rule and re.search(rule, module)), LINEAR)

    def _task_heads(self) -> list[tuple[str, Head]]:
        return [(self._join(h.name) if h.inside else h.name, h) for h in self.task.heads]

    def _head(self, name: str, head: Head) -> Module:
        """A head that the checkpoint lacks: transformers creates it with these shapes."""
        rows, cols = self._size(head.rows), self._size(head.cols)
        shape = (rows,) if head.type == NORM else (rows, cols)
        return Module(name, head.type, shape, (), "" if head.bias else None)

    def _add_heads(self, rows: dict[str, Module]) -> None:
        for name, head in self._task_heads():
            if name not in rows:
                rows[name] = self._head(name, head)
            elif head.bias and rows[name].bias is None:
                rows[name] = replace(rows[name], bias="")

    def _size(self, size: str | int) -> int:
        if isinstance(size, int):
            return size
        if size == "labels":
            labels = self.config.get("id2label")
            count = len(labels) if isinstance(labels, dict) else self.config.get("num_labels", 2)
        elif size == "hidden":
            count = self._number(WIDTH_KEYS)
        else:
            count = self._embedding_shape()[0 if size == "vocab" else 1]
        if not isinstance(count, int) or isinstance(count, bool):
            raise DamagedError(f"config.json does not say the size `{size}` of a head")
        return count

    def _embedding_shape(self) -> Shape:
        wanted = self._join(self.family.embedding) + ".weight"
        heads = {head.name + ".weight" for head in self.task.heads if head.tied}
        for key, shape in self.shapes.items():
            if self._name(key) in {wanted, *heads} and len(shape) == 2:
                return shape
        raise DamagedError(f"the weights hold no input embedding {wanted}")

    def _tie(self, rows: dict[str, Module]) -> None:
        if not self._tied():
            return
        source = self._join(self.family.embedding)
        pairs = [(self._join(a), self._join(b)) for a, b in self.family.ties]
        pairs += [(name, source) for name, head in self._task_heads() if head.tied]
        drop = self.task.drop
        for name, other in pairs:
            body = _strip(name, (self.prefix,)) or name
            if not (drop and re.search(drop, body)):
                self._share(rows, name, other)

    def _share(self, rows: dict[str, Module], name: str, source: str) -> None:
        """As transformers does: whichever of the two the file holds is the source of the other."""
        shape = self._embedding_shape()
        for missing, kind in ((name, EMBEDDING), (source, EMBEDDING)):
            rows.setdefault(missing, Module(missing, kind, shape))
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

    def _tied(self) -> bool:
        if self.family.always_tied:
            return True
        text = self.config.get("text_config")
        sources = (self.config, text if isinstance(text, dict) else {})
        said = [s["tie_word_embeddings"] for s in sources if s.get("tie_word_embeddings") is not None]
        return any(said) if said else self.family.tied


def _strip(name: str, prefixes: tuple[str, ...]) -> str | None:
    """`name` without the first of `prefixes` it starts with; None if it starts with none."""
    for prefix in prefixes:
        if prefix and name.startswith(prefix + "."):
            return name[len(prefix) + 1 :]
    return None

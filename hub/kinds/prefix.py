"""Prefix-Tuning and P-Tuning v2: n keys and values in front of those of every attention.

Li and Liang 2021, arXiv:2101.00190; Liu et al. 2021, arXiv:2110.07602. A prefix is stored whole,
columns (layer, key or value, head, size), or as rows and the network that makes it of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.attention import CROSS, Attention, attentions
from adapterkit.hub.bases.base import Base, Module
from adapterkit.hub.fields import PrefixFields
from adapterkit.hub.findings import ERROR, UNSUPPORTED, Finding
from adapterkit.hub.headers import Stored
from adapterkit.hub.kinds import network, placed, replaced
from adapterkit.hub.kinds.base import Expected, Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.network import Sizes
from adapterkit.hub.kinds.targeted import form_faults
from adapterkit.hub.primitives import PrefixKV
from adapterkit.registry.errors import MismatchError

if TYPE_CHECKING:
    from torch import Tensor

GATE = ("gate.weight", "gate.bias")
FROZEN = "frozen."


class Prefix:
    def summary(self, adapter: Adapter) -> Summary:
        return Summary("prefix tuning")

    def problems(self, adapter: Adapter) -> list[Finding]:
        fields: PrefixFields = adapter.fields
        sizes = _columns(fields.layers, fields.width)
        forms = {place: _forms(adapter, place, sizes) for place in fields.places}
        found = list(_gate_faults(adapter))
        for (path, role), stored in adapter.tensors.items():
            place, _, part = role.partition(".")
            if not path:
                found += _faults(stored, forms.get(place, {}).get(part))
        for place, form in forms.items():
            roles = [f"{place}.{part}" for part in form]
            missing = [role for role in roles if ("", role) not in adapter.tensors]
            found += [_missing(role, "a tensor of the prefix") for role in missing]
        return found + placed.problems(adapter)

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        fields: PrefixFields = adapter.fields
        rest = replaced.schema(adapter, fields.replaced, modules, ())
        tensors = rest.tensors | _repeated(adapter, modules)
        findings = list(rest.findings)
        for place in fields.places:
            found = attentions(modules, place)
            widths = {attention.width for attention in found}
            if len(widths) != 1:
                about = "of several widths" if widths else "none that is known in this family"
                want = f"{place} attentions of one width"
                findings.append(Finding(ERROR, UNSUPPORTED, "the prefix", want, about))
            columns = _columns(_stored(fields, found), widths.pop()) if len(widths) == 1 else None
            forms = _forms(adapter, place, columns)
            for part, sizes in forms.items():
                stored = adapter.tensors.get(("", f"{place}.{part}"))
                tensors["", f"{place}.{part}"] = _expected(stored, sizes)
            if fields.gate_rows:
                tensors |= _gates(adapter, found)
            if fields.doubled:
                findings += _undoubled(fields, found, attentions(modules, CROSS))
        return Schema(tensors, tuple(findings))

    def lower(self, fields: PrefixFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)

    def lower_whole(
        self, fields: PrefixFields, base: Base, p: Mapping[tuple[str, str], Tensor]
    ) -> Lowered:
        for place in fields.places:
            found = attentions(base.modules, place)
            pairs = _pairs(fields, _parts(p, place), _stored(fields, found))
            for layer, attention in enumerate(found):
                k, v = pairs[2 * layer % len(pairs) if fields.doubled else layer]
                gate = {role: p[attention.path, role] for role in GATE if fields.gate_rows}
                yield (
                    attention.path,
                    PrefixKV(k, v, fields.heads, fields.shifts, *gate.values()),
                )


def _repeated(
    adapter: Adapter, modules: Mapping[str, Module]
) -> dict[tuple[str, str], Expected]:
    """Parts of the base that a checkpoint of the whole model has as well."""
    names = [(m, role) for m, role in adapter.tensors if role.startswith(FROZEN) and m in modules]
    return {
        (name, role): Expected(
            replaced.stored_shape(modules[name])
            if role == f"{FROZEN}weight"
            else (modules[name].n_out,)
        )
        for name, role in names
    }


def _stored(fields: PrefixFields, found: Sequence[Attention]) -> int:
    """Pairs in the file: PEFT counts the layers of the encoder, and gives them to the decoder."""
    return fields.layers if fields.doubled and fields.layers is not None else len(found)


def _undoubled(
    fields: PrefixFields, found: Sequence[Attention], cross: Sequence[Attention]
) -> Iterator[Finding]:
    """A prefix for two stacks needs two, the second no larger than what is stored."""
    if not cross or len(found) > _stored(fields, found):
        about = f"a decoder of {len(found)} layers" if cross else "no encoder beside a decoder"
        want = f"an encoder-decoder, {_stored(fields, found)} layers in its decoder at most"
        yield Finding(ERROR, UNSUPPORTED, "num_transformer_submodules 2", want, about)


def _columns(layers: int | None, width: int | None) -> int | None:
    return None if layers is None or width is None else layers * 2 * width


def _forms(adapter: Adapter, place: str, columns: int | None) -> Sizes:
    """part -> shape of what the file should hold for one place."""
    length: int = adapter.fields.length
    held = {
        role.removeprefix(f"{place}."): stored
        for role, stored in adapter.shared.items()
        if role.startswith(f"{place}.")
    }
    if not any(part == "wte" or part.startswith("mlp.") for part in held):
        flat = held.get("prefix")
        if flat is not None and len(flat.shape) == 1:
            return {"prefix": (None if columns is None else length * columns,)}
        return {"prefix": (length, columns)}
    wte = held.get("wte")
    n_in = wte.shape[1] if wte is not None and len(wte.shape) == 2 else None
    return {"wte": (length, n_in)} | network.forms(held, n_in, columns)


def _faults(stored: Stored, sizes: tuple[int | None, ...] | None) -> Iterator[Finding]:
    if sizes is None:
        about = "a tensor for which the config leaves no place"
        yield Finding(ERROR, "unexpected-tensor", stored.key, "a part of the prefix", about)
    else:
        yield from form_faults(stored, sizes)


def _missing(role: str, want: str) -> Finding:
    return Finding(ERROR, "missing-tensor", role, want, "none, it is missing")


def _gate_faults(adapter: Adapter) -> Iterator[Finding]:
    rows: int = adapter.fields.gate_rows
    gates: dict[str, set[str]] = {}
    for (path, role), stored in adapter.tensors.items():
        if path and role in GATE:
            gates.setdefault(path, set()).add(role)
            if rows:
                yield from form_faults(stored, (rows, None) if role == GATE[0] else (rows,))
            else:
                yield from _faults(stored, None)
    for path, roles in gates.items():
        for role in GATE:
            if role not in roles:
                yield _missing(path, f"a tensor {role}")


def _gates(adapter: Adapter, found: list[Attention]) -> dict[tuple[str, str], Expected]:
    rows: int = adapter.fields.gate_rows
    made = {}
    for attention in found:
        made[attention.path, GATE[0]] = Expected((rows, attention.n_in))
        made[attention.path, GATE[1]] = Expected((rows,))
    return made


def _expected(stored: Stored | None, sizes: tuple[int | None, ...]) -> Expected:
    """What is free in a form is what the file says. Its absence is said by `problems`."""
    shape = stored.shape if stored is not None and len(stored.shape) == len(sizes) else ()
    known = shape or (0,) * len(sizes)
    full = tuple(n if size is None else size for size, n in zip(sizes, known, strict=True))
    return Expected(full, required=False)


def _parts(p: Mapping[tuple[str, str], Tensor], place: str) -> dict[str, Tensor]:
    prefix = f"{place}."
    return {
        role.removeprefix(prefix): p[path, role]
        for path, role in p
        if path == "" and role.startswith(prefix)
    }


def _pairs(fields: PrefixFields, parts: Mapping[str, Tensor], layers: int) -> list[list[Tensor]]:
    """(k, v), each (n, width), of every layer."""
    if not layers:
        raise MismatchError("no attention of this model is known, so that a prefix has no place")
    if "wte" in parts:
        flat = network.evaluate(parts["wte"], parts, fields.activation)
    else:
        flat = parts["prefix"]
    by_layer = flat.reshape(fields.length, layers, 2, -1)
    return [[kv.contiguous() for kv in layer.unbind(1)] for layer in by_layer.unbind(1)]

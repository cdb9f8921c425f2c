"""Prompt-Tuning and P-Tuning: n rows among the embedded tokens, stored as they are or as the input
of the network that makes them.

Lester et al. 2021, arXiv:2104.08691; Liu et al. 2021, arXiv:2103.10385.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.attention import token_width
from adapterkit.hub.bases.base import Base, Module
from adapterkit.hub.fields import PromptFields
from adapterkit.hub.findings import ERROR, UNSUPPORTED, Finding
from adapterkit.hub.headers import Stored
from adapterkit.hub.kinds import network, placed, replaced
from adapterkit.hub.kinds.base import Expected, Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.network import Sizes
from adapterkit.hub.kinds.targeted import form_faults
from adapterkit.hub.primitives import VirtualTokens

if TYPE_CHECKING:
    from torch import Tensor

MODEL = ""
LAYER = re.compile(r"lstm\.weight_ih_l(\d)")


class Prompt:
    def summary(self, adapter: Adapter) -> Summary:
        return Summary("P-tuning" if adapter.fields.encoder else "prompt tuning")

    def problems(self, adapter: Adapter) -> list[Finding]:
        fields: PromptFields = adapter.fields
        forms = _forms(fields, adapter.shared, fields.width)
        found: list[Finding] = []
        for role, stored in adapter.shared.items():
            if role == "rows" and stored.shape[:1] not in ((), (fields.stored,), (0,)):
                want = f"{fields.stored} rows, as num_virtual_tokens says"
                about = f"shape {list(stored.shape)}"
                found.append(Finding(ERROR, "shape-mismatch", stored.key, want, about))
            elif role in forms:
                found += form_faults(stored, forms[role])
            else:
                about = "a tensor for which the config leaves no place"
                found.append(
                    Finding(ERROR, "unexpected-tensor", stored.key, "a part of the prompt", about)
                )
        found += [
            Finding(ERROR, "missing-tensor", role, f"a tensor {role}", "none, it is missing")
            for role in forms
            if role not in adapter.shared
        ]
        return found + placed.problems(adapter)

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        fields: PromptFields = adapter.fields
        rest = replaced.schema(adapter, fields.replaced, modules, ())
        width, findings = token_width(modules), list(rest.findings)
        if width is None:
            about = "none that is known in this family"
            findings.append(
                Finding(ERROR, UNSUPPORTED, "the prompt", "a table of token embeddings", about)
            )
        tensors = dict(rest.tensors)
        for role, sizes in _forms(fields, adapter.shared, width).items():
            stored = adapter.shared.get(role)
            shape = stored.shape if stored is not None and len(stored.shape) == len(sizes) else ()
            known = shape or (0,) * len(sizes)
            full = tuple(n if size is None else size for size, n in zip(sizes, known, strict=True))
            tensors[MODEL, role] = Expected(full, required=False)  # absence is said by `problems`
        return Schema(tensors, tuple(findings))

    def lower(self, fields: PromptFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)

    def lower_whole(
        self, fields: PromptFields, base: Base, p: Mapping[tuple[str, str], Tensor]
    ) -> Lowered:
        parts = {role: p[path, role] for path, role in p if path == MODEL}
        rows = parts["rows"]
        if fields.encoder == "lstm":
            rows = _lstm(rows, parts)
        if fields.encoder:
            rows = network.evaluate(rows, parts, "relu")
        yield MODEL, VirtualTokens(rows[: fields.length].contiguous(), fields.place)


def _forms(fields: PromptFields, held: Mapping[str, Stored], width: int | None) -> Sizes:
    """role -> shape. What the network gives has the width of tokens; it takes rows of its own."""
    if not fields.encoder:
        return {"rows": (fields.stored, width)}
    rows = held.get("rows")
    n_in = rows.shape[1] if rows is not None and len(rows.shape) == 2 else None
    found: Sizes = {"rows": (fields.stored, n_in)}
    if fields.encoder == "lstm":
        hidden = _hidden(held)
        found |= _lstm_forms(held, n_in, hidden)
        n_in = None if hidden is None else 2 * hidden
    return found | network.forms(held, n_in, width)


def _hidden(held: Mapping[str, Stored]) -> int | None:
    stored = held.get("lstm.weight_hh_l0")
    return stored.shape[1] if stored is not None and len(stored.shape) == 2 else None


def _lstm_forms(held: Mapping[str, Stored], n_in: int | None, hidden: int | None) -> Sizes:
    found: Sizes = {}
    gates = None if hidden is None else 4 * hidden
    numbers = [int(match[1]) for role in held if (match := LAYER.fullmatch(role))]
    for layer in range(max([1, *numbers]) + 1):
        for end in (f"l{layer}", f"l{layer}_reverse"):
            found[f"lstm.weight_ih_{end}"] = (gates, n_in)
            found[f"lstm.weight_hh_{end}"] = (gates, hidden)
            found[f"lstm.bias_ih_{end}"] = found[f"lstm.bias_hh_{end}"] = (gates,)
        n_in = None if hidden is None else 2 * hidden
    return found


def _lstm(rows: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """rows (n, in) as one sequence, in both directions, (n, 2 hidden)."""
    from torch import no_grad
    from torch.nn import LSTM

    own = {role.removeprefix("lstm."): t for role, t in parts.items() if role.startswith("lstm.")}
    layers = sum(role.startswith("weight_ih") for role in own) // 2
    hidden = own["weight_hh_l0"].shape[1]
    encoder = LSTM(rows.shape[1], hidden, layers, bidirectional=True, batch_first=True)
    encoder.load_state_dict(own)
    with no_grad():
        made: Tensor = encoder.eval()(rows[None])[0][0]
    return made

"""Which versions a listing shows, and in which order: as SQL over `versions v`, `manifests m`."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass

from adapterkit.registry.errors import InvalidError

_CONDITION = re.compile(r"\s*(.+?)\s*(<=|>=|!=|==|=|<|>)\s*(\S+)\s*")
_RANKS = re.compile(r"(\d{1,9})?(\.\.)?(\d{1,9})?")
_METRIC = "SELECT x.value FROM metrics x WHERE x.subject = v.id AND x.name = ?"
ORDERS = {
    "name": "v.name, v.sort",
    "added": "v.created DESC, v.name, v.sort",
    "size": "m.size DESC, v.name, v.sort",
    "rank": "m.rank IS NULL, m.rank DESC, v.name, v.sort",
}


@dataclass(frozen=True)
class Condition:
    """A metric compared with a number."""

    metric: str
    operator: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Condition:
        """`loss<1.2`; the operators are < <= > >= = !=. Raises InvalidError."""
        found = _CONDITION.fullmatch(text)
        try:
            value = float(found[3]) if found else math.nan
        except ValueError:
            value = math.nan
        if found is None or math.isnan(value):
            raise InvalidError(
                f"{text[:200]!r} is not a condition", hint="write METRIC<NUMBER, such as 'loss<1.2'"
            )
        return cls(found[1], "=" if found[2] == "==" else found[2], value)


@dataclass(frozen=True)
class Filter:
    """Everything given must hold.

    kind: "lora" or, as `show` names it, "DoRA". ranks: lowest and highest. base: a pattern of the
    whole id or of its last part. targets: all of them. where: a metric that is not there fails.
    """

    kind: str | None = None
    ranks: tuple[int, int] | None = None
    base: str | None = None
    targets: tuple[str, ...] = ()
    quantization: str | None = None
    tag: str | None = None
    where: tuple[Condition, ...] = ()

    def conditions(self) -> tuple[str, list[object]]:
        """SQL that goes on after other conditions, and its values."""
        parts: list[tuple[str, list[object]]] = []
        if self.kind is not None:
            parts.append(("lower(?) IN (lower(m.kind), lower(m.variant))", [self.kind]))
        if self.ranks is not None:
            parts.append(("m.rank BETWEEN ? AND ?", list(self.ranks)))
        if self.base is not None:
            parts.append(("(m.base GLOB ? OR m.base GLOB '*/' || ?)", [self.base] * 2))
        if self.quantization is not None:
            parts.append(("m.quantization = lower(?)", [self.quantization]))
        if self.tag is not None:
            tag = "EXISTS (SELECT 1 FROM tags t WHERE t.name = v.name AND t.sort = v.sort"
            parts.append((f"{tag} AND t.tag = ?)", [self.tag]))
        # A list of names as JSON: each stands there with its quotes.
        parts += [("instr(m.targets, ?) > 0", [json.dumps(target)]) for target in self.targets]
        parts += [
            (f"({_METRIC}) {each.operator} ?", [each.metric, each.value]) for each in self.where
        ]
        sql = "".join(f" AND {condition}" for condition, _ in parts)
        return sql, [value for _, values in parts for value in values]


def parse_ranks(text: str) -> tuple[int, int]:
    """`8`, `8..64`, `8..` or `..64`. Raises InvalidError."""
    found = _RANKS.fullmatch(text)
    if found is None or not (found[1] or found[3]) or (found[3] and not found[2]):
        raise InvalidError(f"{text[:80]!r} is not a rank", hint="write 8, 8..64, 8.. or ..64")
    low = int(found[1] or 0)
    return low, int(found[3]) if found[3] else 10**9 if found[2] else low


def sorting(key: str) -> tuple[str, list[object]]:
    """SQL to order by: `name`, `added` (newest first), `size`, `rank` (largest first), or a metric,
    smallest first, with `-` before it largest first; versions without it come last."""
    if key in ORDERS:
        return ORDERS[key], []
    metric = key.removeprefix("-")
    way = " DESC" if key.startswith("-") else ""
    return f"({_METRIC}) IS NULL, ({_METRIC}){way}, v.name, v.sort", [metric, metric]

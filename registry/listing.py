"""Versions by pattern, by what they are, and by words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from fnmatch import translate

from adapterkit.registry.catalog import Catalog
from adapterkit.registry.filters import Filter, sorting
from adapterkit.registry.queries import VERSIONS, current, select, version_of
from adapterkit.registry.records import Version
from adapterkit.registry.refs import LOCAL


def listing(
    catalog: Catalog, pattern: str | None = None, wanted: Filter | None = None, sort: str = "name"
) -> list[Version]:
    """Every version whose name matches and that the filter lets through. sort: see sorting."""
    chosen, values = (wanted or Filter()).conditions()
    if pattern is not None:
        chosen += " AND v.name IN (SELECT value FROM json_each(?))"
        values.append(json.dumps(names(catalog, pattern)))
    order, more = sorting(sort)
    return select(catalog, f"{chosen} ORDER BY {order}", *values, *more)


def names(catalog: Catalog, pattern: str | None = None) -> list[str]:
    """Those that match, with or without `local/`; one without wildcards may be an old name."""
    if pattern is not None and not re.search(r"[*?[]", pattern):
        full = pattern if "/" in pattern else f"{LOCAL}/{pattern}"
        return [current(catalog, full)]
    rows = catalog.db.execute("SELECT DISTINCT name FROM versions WHERE removed IS NULL")
    found = sorted(row[0] for row in rows.fetchall())
    if pattern is None:
        return found
    fits = re.compile(translate(pattern)).match
    # Without a slash a pattern is about what users see, which `local/` is not part of.
    whole = "/" in pattern
    return [n for n in found if fits(n.removeprefix(f"{LOCAL}/")) or (whole and fits(n))]


def search(catalog: Catalog, text: str, limit: int | None = None) -> list[Version]:
    """Best match first. All words of `text` must be among names, targets, notes, card and base;
    one that ends in `*` is the beginning of a word."""
    words = [word for word in text.split() if any(map(str.isalnum, word))]
    if not words:
        return []
    quoted = ['"' + word.rstrip("*").replace('"', '""') + '"' for word in words]
    query = " ".join(
        q + "*" if word.endswith("*") else q for q, word in zip(quoted, words, strict=True)
    )
    sql = VERSIONS.replace(
        "WHERE v.removed IS NULL",
        "JOIN search ON search.rowid = m.rowid WHERE v.removed IS NULL AND search MATCH ?"
        " ORDER BY search.rank, v.name, v.sort LIMIT ?",
    )
    return [version_of(row) for row in catalog.rows(sql, [query, -1 if limit is None else limit])]


def metrics_of(catalog: Catalog, ids: Iterable[str]) -> dict[str, dict[str, float]]:
    """id -> metrics, without reading an attachment."""
    rows = catalog.rows(
        "SELECT subject, name, value FROM metrics"
        " WHERE subject IN (SELECT value FROM json_each(?)) ORDER BY name",
        [json.dumps(sorted(set(ids)))],
    )
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row["subject"], {})[row["name"]] = row["value"]
    return found

"""adapter inspect"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli import hints as hinted
from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import count, dtype, emit, fields, finding_record, say, size, table

if TYPE_CHECKING:
    from adapterkit.hub.adapter import Adapter, AdapterInfo
    from adapterkit.hub.sources import Folder

SHOWN_TENSORS = 40


@click.command()
@click.argument("source", metavar="SRC")
@click.option(
    "--allow-field", "allow_fields", metavar="NAME", multiple=True,
    help="Accept this config field although its meaning is unknown. Repeatable.",
)  # fmt: skip
@hinted.option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(
    app: App, source: str, allow_fields: tuple[str, ...], hints: dict[str, Any], as_json: bool
) -> None:
    """Show how an adapter is understood: format, kind, every tensor.

    SRC is a folder (./tone) or a reference (team/sql@1.2). Only headers are read, no base is needed
    and nothing is judged: that is what check is for. With -v all tensors are shown.
    """
    from adapterkit.hub.describe import summarize
    from adapterkit.hub.locate import locate, with_hints
    from adapterkit.hub.read import read_adapter

    folder = locate(with_hints(source, hints), lambda: app.registry)
    adapter = read_adapter(folder, allow_fields)
    info = summarize(adapter, digest=False)
    if as_json:
        emit(record(folder, adapter, info))
    else:
        tell(folder, adapter, info, None if app.detailed else SHOWN_TENSORS)


def record(folder: Folder, adapter: Adapter, info: AdapterInfo) -> dict[str, Any]:
    return {
        "source": folder.name,
        "format": info.format,
        "kind": info.kind,
        "variant": info.variant,
        "ranks": {str(rank): n for rank, n in sorted(info.ranks.items())},
        "alphas": list(info.alphas),
        "base": info.base,
        "task": info.task,
        "writer": info.writer,
        "hints": dict(info.hints),
        "files": [
            {"path": path, "role": role, "size": folder.files[path].size}
            for path, role in sorted(adapter.files.items())
        ],
        "tensors": [
            {"module": module, "role": role, "key": stored.key, "dtype": stored.dtype,
             "shape": list(stored.shape), "size": stored.size}
            for (module, role), stored in sorted(adapter.tensors.items(), key=lambda pair: pair[0])
        ],
        "unconsumed": list(adapter.unconsumed),
        "unknown_fields": dict(info.unknown_fields),
        "findings": [finding_record(finding) for finding in sorted(set(adapter.findings))],
    }  # fmt: skip


def tell(folder: Folder, adapter: Adapter, info: AdapterInfo, limit: int | None) -> None:
    say(folder.name)
    found = record(folder, adapter, info)
    ranks = ", ".join(f"{rank} on {count(n, 'module')}" for rank, n in sorted(info.ranks.items()))
    pairs = [
        ("format", info.format),
        ("kind", info.kind),
        ("variant", info.variant),
        ("rank", ranks),
        ("alpha", ", ".join(f"{alpha:g}" for alpha in info.alphas)),
        ("base", info.base or ""),
        ("task", info.task or ""),
        ("writer", info.writer or ""),
        ("hints", ", ".join(f"{name}={value}" for name, value in info.hints.items())),
        ("files", ", ".join(f"{file['path']} ({file['role']})" for file in found["files"])),
        ("unknown fields", ", ".join(info.unknown_fields)),
        ("unknown tensors", ", ".join(adapter.unconsumed)),
    ]
    fields(pairs, "  ")
    rows = [
        (row["module"] or "(all)", row["role"], dtype(row["dtype"]), str(row["shape"]),
         size(row["size"]))
        for row in found["tensors"]
    ]  # fmt: skip
    table(("MODULE", "ROLE", "DTYPE", "SHAPE", "SIZE"), rows[:limit])
    if limit is not None and len(rows) > limit:
        say(f"{count(len(rows) - limit, 'tensor')} more; -v shows all")
    for finding in sorted(set(adapter.findings)):
        say(f"{finding.severity}: {finding}")

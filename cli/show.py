"""adapter show"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.list import record
from adapterkit.cli.output import dtype, emit, fields, moment, say, size
from adapterkit.registry.refs import Ref

SHOWN_ITEMS = 8


@click.command()
@click.argument("ref")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(app: App, ref: str, as_json: bool) -> None:
    """Show everything recorded about one version.

    REF is NAME, NAME@VERSION, NAME:TAG or NAME@sha256:DIGEST. Long lists are cut; with -v they are
    not.
    """
    found = everything(app, Ref.parse(ref))
    if as_json:
        emit(found)
    else:
        tell(found, None if app.detailed else SHOWN_ITEMS)


def everything(app: App, wanted: Ref) -> dict[str, Any]:
    registry = app.registry
    version = registry.resolve(wanted)
    manifest = registry.manifest(version.ref)
    lineage = registry.lineage(version.ref)
    attachments = registry.attachments(version.ref)
    notes = [a for a in attachments if a.kind == "note"]
    return record(version) | {
        "manifest": json.loads(manifest.dump()),
        "metrics": registry.metrics(version.ref),
        "notes": [registry.read_attachment(each).decode() for each in notes],
        "attachments": [
            {"kind": a.kind, "name": a.name, "digest": f"sha256:{a.digest}", "size": a.size,
             "created": a.created, "author": a.author}
            for a in attachments
        ],
        "ancestors": [_edge(e.parent, e.parent_ref, e.relation) for e in lineage.ancestors],
        "descendants": [_edge(e.child, e.child_ref, e.relation) for e in lineage.descendants],
    }  # fmt: skip


def _edge(id: str, ref: Ref | None, relation: str) -> dict[str, Any]:
    return {"id": f"sha256:{id}", "ref": str(ref) if ref else None, "relation": relation}


def tell(found: Mapping[str, Any], limit: int | None) -> None:
    manifest = found["manifest"]
    say(found["ref"])
    head = {"id": found["id"], "added": f"{moment(found['created'])} by {found['author']}"}
    yanked = "" if found["yanked"] is None else found["yanked"] or "no reason given"
    fields([*head.items(), ("tags", ", ".join(found["tags"])), ("yanked", yanked)], "  ")
    for title in ("adapter", "base", "quantization", "recipe"):
        if manifest[title]:
            say(f"{title}:")
            fields(list(flat(manifest[title], limit)), "  ")
    say("files:")
    fields([(f["path"], file_text(f)) for f in manifest["files"]], "  ")
    section("metrics:", [(name, f"{value:g}") for name, value in found["metrics"].items()])
    section("notes:", [("-", text) for text in found["notes"]])
    others = [a for a in found["attachments"] if a["kind"] not in ("note", "metrics")]
    section("attachments:", [(f"{a['kind']} {a['name']}", a["digest"]) for a in others])
    for title in ("ancestors", "descendants"):
        section(f"{title}:", [(e["relation"], e["ref"] or e["id"]) for e in found[title]])


def file_text(file: Mapping[str, Any]) -> str:
    return f"{file['digest']}  {size(file['size'])}  {file['role']}"


def section(title: str, pairs: list[tuple[str, str]]) -> None:
    if pairs:
        say(title)
        fields(pairs, "  ")


def flat(
    value: Mapping[str, Any], limit: int | None, prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every leaf; null and empty ones are left out."""
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from flat(item, limit, f"{prefix}{name}.")
        elif isinstance(item, list):
            shown = [text(each) for each in item[:limit]]
            more = f", ... ({len(item)} in all)" if len(shown) < len(item) else ""
            yield prefix + name, ", ".join(shown) + more
        elif item is not None:
            yield prefix + dtype(name), text(item)


def text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)

"""adapter log"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import emit, moment, table
from adapterkit.registry.errors import InvalidError, NotFoundError
from adapterkit.registry.records import Event, TagMove
from adapterkit.registry.refs import Ref


@click.command()
@click.argument("name", metavar="NAME[:TAG]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(app: App, name: str, as_json: bool) -> None:
    """Show what happened to an adapter, newest first.

    Versions with what they were made from, tags with where they were before, names, removals. With
    :TAG only the moves of that tag.
    """
    ref = Ref.parse(name)
    if ref.version or ref.digest:
        raise InvalidError(f"{name} is one version", hint=f"adapter log {ref.short_name}")
    moves = app.registry.moves(ref.short_name, ref.tag)
    if ref.tag is not None and not moves:
        raise NotFoundError(f"there was never a tag {ref}")
    events = [] if ref.tag else app.registry.history(ref.short_name)
    found = [entry(app, event) for event in events if event.kind not in ("tag", "untag")]
    found += [move_entry(move) for move in moves]
    found.sort(key=lambda e: (e["seq"], e["kind"] == "tag"), reverse=True)
    if as_json:
        emit(found)
    else:
        table(("TIME", "BY", "WHAT"), [(moment(e["time"]), e["author"], text(e)) for e in found])


def entry(app: App, event: Event) -> dict[str, Any]:
    """The JSON form of a record. Tags have their own: see move_entry."""
    found: dict[str, Any] = {"seq": event.seq, "kind": event.kind}
    found |= {"time": event.time, "author": event.author}
    given = event.payload
    kept = ("version", "id", "previous", "tag", "protected", "yanked", "reason")
    found |= {name: given[name] for name in kept if name in given}
    if event.kind == "version":
        found["parents"] = parents(app, given["id"])
    if event.kind == "attachment":
        found["attachment"] = {name: given["attachment"][name] for name in ("kind", "name")}
    return found


def move_entry(move: TagMove) -> dict[str, Any]:
    return {
        "seq": move.seq, "kind": "tag", "time": move.time, "author": move.author, "tag": move.tag,
        "before": move.before, "after": move.after, "undoes": move.undoes,
    }  # fmt: skip


def parents(app: App, id: str) -> list[dict[str, Any]]:
    return [
        {"id": f"sha256:{e.parent}", "ref": str(e.parent_ref) if e.parent_ref else None,
         "relation": e.relation}
        for e in app.registry.parents(id)
    ]  # fmt: skip


def text(found: Mapping[str, Any]) -> str:
    return WORDS[found["kind"]](found)


def _version(found: Mapping[str, Any]) -> str:
    made = [f"{p['relation']} {p['ref'] or p['id'][:19]}" for p in found["parents"]]
    return ", ".join([f"{found['version']} added", *made])


def _tag(found: Mapping[str, Any]) -> str:
    undo = " (undo)" if found["undoes"] else ""
    return f"{found['tag']}: {found['before'] or 'nothing'} -> {found['after'] or 'nothing'}{undo}"


def _yank(found: Mapping[str, Any]) -> str:
    if not found["yanked"]:
        return f"{found['version']} no longer yanked"
    return f"{found['version']} yanked{': ' + found['reason'] if found['reason'] else ''}"


def _protect(found: Mapping[str, Any]) -> str:
    return f"{found['tag']} {'' if found['protected'] else 'no longer '}protected"


def _attachment(found: Mapping[str, Any]) -> str:
    given = found["attachment"]
    return f"{found['version']} got {given['kind']}{' ' + given['name'] if given['name'] else ''}"


WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "version": _version,
    "tombstone": lambda found: f"{found['version']} removed",
    "tag": _tag,
    "yank": _yank,
    "protect": _protect,
    "attachment": _attachment,
    "rename": lambda found: f"renamed, before {Ref.parse(found['previous'])}",
}

"""The history of tags, read from the records of a name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from adapterkit.registry.records import Event, TagMove


def moves_of(events: Iterable[Event], tag: str | None = None) -> list[TagMove]:
    """Every move of every tag, or of `tag`, oldest first. events: all of one name."""
    at: dict[str, str | None] = {}
    found = []
    for event in events:
        for moved, after in _moved(event):
            undoes = event.payload.get("undoes")
            if at.get(moved) != after:
                found.append(
                    TagMove(
                        event.seq, event.time, event.author, moved, at.get(moved), after, undoes
                    )
                )
            at[moved] = after
    return [move for move in found if tag in (None, move.tag)]


def _moved(event: Event) -> Iterator[tuple[str, str | None]]:
    """(tag, the version it is at now)"""
    given = event.payload
    if event.kind == "tag":
        yield given["tag"], given["version"]
    elif event.kind == "untag":
        yield given["tag"], None
    elif event.kind == "version":
        yield from ((tag, given["version"]) for tag in given["tags"])
    elif event.kind == "tombstone":
        yield from ((tag, None) for tag in given["tags"])


def last(moves: Sequence[TagMove]) -> TagMove | None:
    """The last move of one tag that was not taken back; taking one back is none itself."""
    standing: list[TagMove] = []
    for move in moves:
        if move.undoes is None:
            standing.append(move)
        else:
            standing.pop()
    return standing[-1] if standing else None

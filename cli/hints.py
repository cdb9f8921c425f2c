"""The option --hint: what the files of an adapter do not say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import click

from adapterkit.registry.errors import InvalidError


def parse(
    context: click.Context, parameter: click.Parameter, values: Sequence[str]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise InvalidError(f"{text!r} is not a hint", hint="write KEY=VALUE, such as alpha=16")
        if name in found:
            raise InvalidError(f"the hint {name} is given twice")
        found[name] = meant(value)
    return found


def meant(text: str) -> Any:
    """The JSON value, or the text itself where it is none: team, true, 8, [true, false]."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--hint", "hints", metavar="KEY=VALUE", multiple=True, callback=parse,
    help="Say what the files do not (alpha=16). JSON, else text. Repeatable.",
)  # fmt: skip

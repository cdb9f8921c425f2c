"""Keyword arguments that set single fields of an options class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from adapterkit.registry.errors import InvalidError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def refined(options: T, settings: Mapping[str, Any]) -> T:
    """The options with some fields set anew. Raises InvalidError naming those that do not exist."""
    known = {field.name for field in fields(options)}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise InvalidError(f"no option {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return replace(options, **settings)

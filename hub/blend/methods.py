"""The methods by name, in each dialect."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module

from adapterkit.hub.blend.entries import ENTRYWISE, entrywise
from adapterkit.hub.blend.factors import Term
from adapterkit.hub.blend.settings import DIALECTS, Blended, Method, Place, Settings
from adapterkit.hub.blend.streamed import low_rank
from adapterkit.registry.errors import InvalidError

# Methods that need factors alone, the same in every dialect.
EXACT = {
    "sum": "adapterkit.hub.blend.sums:total",
    "svd": "adapterkit.hub.blend.sums:svd",
    "average": "adapterkit.hub.blend.sums:average",
    "slerp": "adapterkit.hub.blend.sums:slerp",
    "knots": "adapterkit.hub.blend.subspaces:knots",
    "tsv": "adapterkit.hub.blend.subspaces:tsv",
    "iso_c": "adapterkit.hub.blend.subspaces:iso_c",
    "core": "adapterkit.hub.blend.subspaces:core",
}
# Those of them that take changes without factors too, row by row.
SUMS = ("sum", "svd", "average")
# PEFT's names: on both factors apart, and with _svd on the change itself.
PEFT = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
# Those of AdapterHub's average_adapter, which are of whole adapters (hub/mixing).
ADAPTERS = ("linear", "lora_linear_only_negate_b", "lora_delta_w_svd")


def names(dialect: str = "paper") -> tuple[str, ...]:
    """Every method of a dialect."""
    plain = tuple(name for name in ENTRYWISE if name != "linear")
    if dialect == "adapters":
        return ADAPTERS
    if dialect == "peft":
        return ("cat", "svd", *PEFT, *(f"{name}_svd" for name in PEFT if name != "linear"))
    return (*EXACT, *plain)


def method(name: str, settings: Settings) -> Method:
    """Raises InvalidError naming the methods there are."""
    if name not in names(settings.dialect):
        where = "" if settings.dialect == "paper" else f" in the dialect {settings.dialect}"
        also = [d for d in DIALECTS if name in names(d) and d != settings.dialect]
        hint = f"--dialect {also[0]}" if also else None
        known = ", ".join(names(settings.dialect))
        raise InvalidError(f"no method {name}{where}; there are {known}", hint=hint)
    if settings.dialect == "peft":
        return _peft(name, settings)
    if name in ENTRYWISE:
        return partial(_entries, name)
    return _load(EXACT[name]) if name in SUMS else partial(_factors_only, name)


def _peft(name: str, settings: Settings) -> Method:
    from adapterkit.hub.blend import peft_factors

    if name == "cat":
        return _load(EXACT["sum"])
    if name == "svd":
        return peft_factors.clamped if settings.clamp is not None else _load(EXACT["svd"])
    if name in PEFT:
        return partial(peft_factors.factorwise, name)
    return partial(_entries, name.removesuffix("_svd"))


def _entries(name: str, terms: Sequence[Term], place: Place) -> Blended:
    """A method on single entries: the best part of its result that has the rank."""
    matrix = entrywise(name)(terms, place)
    return Blended(*low_rank(matrix, place.settings.rank_of(terms)))


def _factors_only(name: str, terms: Sequence[Term], place: Place) -> Blended:
    if any(term.rest is not None for term in terms):
        raise InvalidError(
            f"{place.name}: {name} works on factors, and a part of a change has none",
            hint="adapter convert --rank R gives it factors first",
        )
    return _load(EXACT[name])(terms, place)


def _load(path: str) -> Method:
    module, _, attribute = path.partition(":")
    found: Method = getattr(import_module(module), attribute)
    return found

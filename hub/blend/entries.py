"""Methods that act on the single entries of changes: one row each, one file each."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from adapterkit.hub.blend.factors import Term
    from adapterkit.hub.blend.settings import Place
    from adapterkit.hub.blend.streamed import Streamed

# name -> (changes with weights, place) -> the matrix of the result, by rows
ENTRYWISE = {
    "ties": "adapterkit.hub.blend.ties:matrix",
    "dare_linear": "adapterkit.hub.blend.dare:linear",
    "dare_ties": "adapterkit.hub.blend.dare:ties",
    "della": "adapterkit.hub.blend.della:ties",
    "della_linear": "adapterkit.hub.blend.della:linear",
    "breadcrumbs": "adapterkit.hub.blend.breadcrumbs:matrix",
    "magnitude_prune": "adapterkit.hub.blend.magnitude_prune:matrix",
    "linear": "adapterkit.hub.blend.pruning:linear",
}


def entrywise(name: str) -> Callable[[Sequence[Term], Place], Streamed]:
    module, _, attribute = ENTRYWISE[name].partition(":")
    found: Callable[[Sequence[Term], Place], Streamed] = getattr(import_module(module), attribute)
    return found

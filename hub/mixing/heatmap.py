"""A comparison as a picture: a row for each module, a column for each pair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adapterkit.hub.mixing.compare import Comparison, Likeness
from adapterkit.registry.errors import ConflictError, InvalidError

# Inches; more rows than this are drawn thinner, not taller.
MOST_ROWS = 120
LETTERS = 60


def draw(found: Comparison, path: Path) -> None:
    """Cosines from -1 (blue) to 1 (red). Raises InvalidError without matplotlib, ConflictError
    where there is a file already."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        hint = "pip install 'adapterkit[plot]'"
        raise InvalidError("a heat map needs matplotlib", hint=hint) from error
    if path.exists():
        raise ConflictError(f"{path} exists already")
    modules = list(dict.fromkeys(row.module for pair in found.pairs for row in pair.modules))
    if not modules:
        raise InvalidError("no module is changed by two of them: there is nothing to draw")
    values = [
        [_cosine(pair.modules, module) for pair in found.pairs] for module in modules
    ]
    height = 2.5 + 0.2 * min(len(modules), MOST_ROWS)
    figure = Figure(figsize=(4.5 + 0.9 * len(found.pairs), height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    if len(modules) <= MOST_ROWS:
        axes.set_yticks(range(len(modules)), [_short(name) for name in modules], fontsize=7)
    names = [f"{_short(pair.a)}\n{_short(pair.b)}" for pair in found.pairs]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    figure.colorbar(image, label="cosine")
    figure.savefig(path, format="png", dpi=150)


def _cosine(rows: Sequence[Likeness], module: str) -> float:
    """Not a number, which is drawn as a gap, where one of the pair leaves the module alone."""
    found = next((row.cosine for row in rows if row.module == module), None)
    return float("nan") if found is None else found


def _short(name: str) -> str:
    return name if len(name) <= LETTERS else f"...{name[3 - LETTERS :]}"

"""Imports go down: cli, hub, registry; and inside hub from what is outside to plain data."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = {
    "registry": {"registry"},
    "hub": {"hub", "registry"},
    "cli": {"cli", "hub", "registry"},
}
# Steps inside hub, lowest first; a file stands on the first step that names it or its folder.
STEPS = {
    "plain": {
        "findings", "headers", "sources", "adapter", "fields", "matching", "settings", "recipes",
        "pickled",
        "storedzip", "strided", "torchfile", "torchnames",
        "bases/base", "bases/attention", "bases/packed", "bases/places", "bases/values",
    },
    "maths": {"primitives", "tensors", "kinds", "quant", "blend", "conv1d"},
    "io": {
        "formats", "bases", "locate", "read", "values", "sums", "fit", "rooting", "identity",
        "check", "task", "norms", "frozen", "offline", "change", "reduce", "factored",
        "unfold", "laid_out",
    },
    "model": {"compose", "gather", "generate", "load", "merge/fidelity", "merge/live",
              "merge/rival", "merge/undo", "merge/update"},
    "outside": {
        "merge", "mixing", "made", "convert", "exporting", "express", "recipe_versions", "papers",
        "parts", "remotes", "diff", "sync", "ingest", "describe", "arrival", "demo",
        "parcels", "workers", "cluster",
    },
}  # fmt: skip
RANK = {step: rank for rank, step in enumerate(STEPS)}
NETWORK = {"socket", "http", "urllib.request", "requests", "httpx"}
# What a file on a step may not import anywhere, functions included. (torch and other slow modules
# at module level are ruff's business: TID253.)
NEVER = {
    "plain": {"torch", "transformers", "huggingface_hub", "sqlite_utils", "click", *NETWORK},
    "maths": {"huggingface_hub", "sqlite_utils", "click", "logging", *NETWORK},
    "io": {"click", *NETWORK},
    "model": {"click", *NETWORK},
    "outside": {"click"},
}
FILES = [path for floor in BELOW for path in sorted((ROOT / floor).rglob("*.py"))]
HUB = [path for path in FILES if path.relative_to(ROOT).parts[0] == "hub"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path, *, typing_too: bool = True) -> Iterator[str]:
    """Dotted names of what a file imports, wherever in the file it does."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(child for part in node.body for child in ast.walk(part))
        if node in skipped and not typing_too:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def step_of(module: str) -> str | None:
    """The step of a module given by its path inside hub, with slashes and no suffix."""
    parts = module.split("/")
    prefixes = {"/".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return next((step for step, names in STEPS.items() if names & prefixes), None)


def module_of(path: Path) -> str:
    return path.relative_to(ROOT / "hub").with_suffix("").as_posix()


def is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path):
    floor = path.relative_to(ROOT).parts[0]
    used = {name.split(".")[1] for name in imports(path) if name.startswith("adapterkit.")}
    assert used <= BELOW[floor]


@pytest.mark.parametrize("path", HUB, ids=name_of)
def test_every_file_of_hub_stands_on_a_step(path):
    assert step_of(module_of(path)) or path == ROOT / "hub/__init__.py"


@pytest.mark.parametrize("path", HUB, ids=name_of)
def test_inside_hub_imports_go_down_too(path):
    step = step_of(module_of(path))
    if step is None:  # hub/__init__.py shows the names of all steps
        return
    names = [name for name in imports(path) if name.startswith("adapterkit.hub.")]
    steps = {step_of(name.removeprefix("adapterkit.hub.").replace(".", "/")) for name in names}
    assert [used for used in steps if used and RANK[used] > RANK[step]] == []


@pytest.mark.parametrize("path", HUB, ids=name_of)
def test_no_file_imports_what_its_step_may_not(path):
    never = NEVER.get(step_of(module_of(path)) or "outside", set())
    used = list(imports(path, typing_too=False))
    assert [name for name in used for package in never if is_under(name, package)] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_are_absolute(path):
    relative = [node for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom) and node.level]  # fmt: skip
    assert relative == []

"""What is installed is what is here: every package, every module, the markers of typed code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("hub", "registry", "cli")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# The oldest versions this promises to run on.
FLOORS = {
    "torch": "2.11", "transformers": "5.17", "huggingface-hub": "1.33",
    "click": "8.1", "sqlite-utils": "3.38",
}  # fmt: skip


def test_every_package_is_listed():
    inits = [p for folder in FOLDERS for p in (ROOT / folder).rglob("__init__.py")]
    found = {".".join(("adapterkit", *p.parent.relative_to(ROOT).parts)) for p in inits}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_folder_of_code_is_a_package():
    folders = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """Names of the files in a wheel built from a copy: a build leaves folders in its source."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def test_a_wheel_holds_every_module(wheel):
    modules = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")]
    expected = {f"adapterkit/{path.relative_to(ROOT).as_posix()}" for path in modules}
    assert {name for name in wheel if name.endswith(".py")} == expected


def test_a_wheel_says_that_it_is_typed(wheel):
    assert {f"adapterkit/{folder}/py.typed" for folder in FOLDERS} <= set(wheel)


def test_a_wheel_holds_nothing_but_the_package(wheel):
    assert [name for name in wheel if not re.match(r"adapterkit(-[^/]*\.dist-info)?/", name)] == []


@pytest.mark.parametrize("name", FLOORS)
def test_the_oldest_supported_versions_are_declared(name):
    assert f"{name}>={FLOORS[name]}" in PROJECT["project"]["dependencies"]


def test_the_oldest_python_is_declared():
    assert PROJECT["project"]["requires-python"] == ">=3.11"


def test_every_dependency_is_pinned_in_the_tested_set():
    pins = (ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    pinned = set(re.findall(r"^([a-z0-9.-]+)==", pins, re.M))
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [*PROJECT["project"]["dependencies"], *(row for rows in extras for row in rows)]
    assert {re.split(r"[<>=\[ ]", row)[0].lower() for row in wanted} <= pinned

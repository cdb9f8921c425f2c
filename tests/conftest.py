"""What every test gets: a clean environment, the fixtures, and the rules for programs and GPUs."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

# Read once at import by the libraries they belong to, so they are set before any test imports one.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("HF_TOKEN", None)
os.environ.pop("HF_ENDPOINT", None)
if "PYTEST_XDIST_WORKER" in os.environ:  # one worker per core: more threads only get in the way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

DATA = Path(os.environ.get("ADAPTERKIT_FIXTURES") or Path(__file__).parent / "data").resolve()
REQUIRED = os.environ.get("ADAPTERKIT_REQUIRE_PROGRAMS") == "1"
PROOF = os.environ.get("ADAPTERKIT_PROOF", "ci")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "needs(program, ...): system programs the test runs; skipped where one is missing,"
        " failed where ADAPTERKIT_REQUIRE_PROGRAMS=1",
    )
    if PROOF not in ("ci", "nightly"):
        raise pytest.UsageError(f"ADAPTERKIT_PROOF is {PROOF!r}, expected ci or nightly")


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = [program for mark in item.iter_markers("needs") for program in mark.args]
    missing = [program for program in wanted if shutil.which(program) is None]
    if missing:
        reason = f"needs {', '.join(missing)}, which is not installed"
        pytest.fail(reason, pytrace=False) if REQUIRED else pytest.skip(reason)
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("homes")
    return (folder / str(number) for number in count())


@pytest.fixture(autouse=True)
def clean_environment(homes: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing a user has set or stored changes a result, and no test writes to the real home."""
    home = next(homes)
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(home / name.lower()))
    monkeypatch.setenv("ADAPTERKIT_HOME", str(home / "adapterkit"))
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR", "PYTHONWARNINGS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of test models and adapters: $ADAPTERKIT_FIXTURES, or tests/data. Read only."""
    return DATA


@pytest.fixture(scope="session")
def index(fixtures: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((fixtures / "index.json").read_text())
    return found


@pytest.fixture(scope="session")
def bad_inputs(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that paths of the index's `bad` entries are relative to."""
    folder = tmp_path_factory.mktemp("hostile")
    with tarfile.open(fixtures / "bad.tar.gz") as archive:
        archive.extractall(folder, filter="data")  # refuses what would leave the folder
    return folder


@pytest.fixture(scope="session")
def proof() -> Callable[[int, int], int]:
    """`proof(ci, nightly)`: the size for the tier that $ADAPTERKIT_PROOF names."""
    return lambda ci, nightly: nightly if PROOF == "nightly" else ci

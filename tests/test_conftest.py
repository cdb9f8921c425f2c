"""The rules that conftest.py sets hold: skips, failures, and a home of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).with_name("conftest.py")
TEST = """
import pytest

@pytest.mark.needs("no-such-program")
def test_it():
    raise AssertionError("ran")
"""


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / "test_it.py").write_text(TEST)
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(folder)]
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        command, cwd=folder, env=outer | environment, capture_output=True, text=True
    )


def test_a_missing_program_skips_the_test_with_its_name(tmp_path):
    done = run(tmp_path, ADAPTERKIT_REQUIRE_PROGRAMS="0")
    assert done.returncode == 0
    assert "needs no-such-program, which is not installed" in done.stdout
    assert "1 skipped" in done.stdout


def test_a_missing_program_fails_the_test_where_programs_are_required(tmp_path):
    done = run(tmp_path, ADAPTERKIT_REQUIRE_PROGRAMS="1")
    assert done.returncode == 1
    assert "needs no-such-program, which is not installed" in done.stdout


def test_an_unknown_tier_is_refused(tmp_path):
    done = run(tmp_path, ADAPTERKIT_PROOF="weekly")
    assert done.returncode != 0
    assert "expected ci or nightly" in done.stderr + done.stdout


def test_no_test_sees_the_real_home(tmp_path_factory):
    assert Path.home().is_relative_to(tmp_path_factory.getbasetemp())
    assert Path(os.environ["ADAPTERKIT_HOME"]).is_relative_to(Path.home())


def test_every_broken_input_is_unpacked(index, bad_inputs):
    paths = [entry["path"] for entry in index["bad"]]
    assert [path for path in paths if not os.path.lexists(bad_inputs / path)] == []


def test_every_file_the_index_names_is_there(index, fixtures):
    named = [case["expected"]["file"] for case in index["cases"]]
    named += [base["path"] for base in index["bases"]]
    named += [adapter["path"] for case in index["cases"] for adapter in case["adapters"]]
    assert [name for name in named if not (fixtures / name).exists()] == []

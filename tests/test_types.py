"""The code is typed throughout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("hub", "registry", "cli")


@pytest.mark.timeout(900)
def test_types(tmp_path):
    """mypy sees the folders under their installed names through three links."""
    (tmp_path / "adapterkit").mkdir()
    for folder in FOLDERS:
        (tmp_path / "adapterkit" / folder).symlink_to(ROOT / folder)
    packages = [argument for folder in FOLDERS for argument in ("-p", f"adapterkit.{folder}")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *packages],
        cwd=ROOT, env=os.environ | {"MYPYPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

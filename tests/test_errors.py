"""Every way to fail has a number of its own, and the number is documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from adapterkit.registry import errors

ROOT = Path(__file__).parent.parent
CODES = {0, 1, 2, 3, 4, 5, 6, 7, 130}


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_stands_in_the_tree_with_a_documented_code(kind):
    assert kind.__name__ in (errors.__doc__ or "") or issubclass(kind, errors.AdapterWarning)
    assert issubclass(kind, errors.AdapterWarning) or kind.exit_code in CODES


@pytest.mark.parametrize("page", ["README.md", "docs/cli.md"])
def test_the_table_of_exit_codes_is_complete(page):
    text = (ROOT / page).read_text()
    assert {int(row) for row in re.findall(r"^\| *(\d+) *\|", text, re.M)} == CODES

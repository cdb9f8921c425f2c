"""Every broken or hostile input of the fixtures, through each door a user has."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from adapterkit.cli.main import main
from adapterkit.hub import check, exit_code
from adapterkit.hub.findings import listing
from adapterkit.hub.formats.adapterhub_type import ARCHITECTURES, BOTTLENECK
from adapterkit.hub.formats.peft_type import OTHER_TYPES, PEFT_TYPES
from adapterkit.registry import AdapterError

FIXTURES = Path(os.environ.get("ADAPTERKIT_FIXTURES") or Path(__file__).parents[1] / "data")
BAD: list[dict[str, Any]] = json.loads((FIXTURES / "index.json").read_text())["bad"]
# Documented: 3 not found or not supported, 5 damaged, 6 does not fit.
CODES = (3, 5, 6)
REFUSED = {"refuse", "refuse_import"}
Outcome = tuple[str, int, str]


def other_type(folder: Path) -> str | None:
    """What the refusal of an adapter of a kind that is not read must name; None: it is read."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
    except (ValueError, OSError):
        return None
    if isinstance(config, dict) and "version" in config and "peft_type" not in config:
        method = config["config"].get("architecture") or BOTTLENECK
        return None if method in ARCHITECTURES else "AdapterHub"
    kind = config.get("peft_type") if isinstance(config, dict) else None
    return kind if kind in OTHER_TYPES and kind not in PEFT_TYPES else None


def by_api(path: Path, base: Path, deep: bool) -> Outcome:
    try:
        report = check(path, base=base, deep=deep)
    except AdapterError as error:
        return "refuse", error.exit_code, f"{error}\n{error.hint}"
    code = exit_code(report)
    doubts = [w for w in report.warnings if w.code != "base-not-recorded"]
    return "refuse" if code else "warn" if doubts else "load", code, listing(report.findings)


def typed(*arguments: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    return done.exit_code, done.output


def by_add(path: Path, base: Path, deep: bool) -> Outcome:
    code, text = typed("add", path, "x", "--base", base)
    return "refuse" if code else "warn" if "Warning:" in text else "load", code, text


def by_check(path: Path, base: Path, deep: bool) -> Outcome:
    code, text = typed("check", path, "--base", base, *(["--deep"] if deep else []))
    doubts = [
        line for line in text.splitlines() if "warning:" in line and "base-not-recorded" not in line
    ]
    return "refuse" if code else "warn" if doubts else "load", code, text


def listed(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            status = (Path(parent) / name).lstat()
            found[str(Path(parent) / name)] = (status.st_size, status.st_mtime_ns)
    return found


@pytest.mark.parametrize("door", [by_api, by_add, by_check])
@pytest.mark.parametrize("entry", BAD, ids=[entry["id"][4:] for entry in BAD])
def test_a_bad_input_is_refused_by_name_and_leaves_nothing_behind(
    entry: dict[str, Any],
    door: Any,
    fixtures: Path,
    bad_inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    home = Path(os.environ["HOME"])
    path = bad_inputs / entry["path"]
    before, started = listed(bad_inputs), time.monotonic()
    got, code, text = door(path, fixtures / entry["base_path"], entry["group"] == "values")
    assert time.monotonic() - started < entry.get("time_limit_s", 20)
    assert listed(bad_inputs) == before
    assert not any(tmp_path.iterdir())
    assert "Traceback" not in text
    assert "\x1b" not in text and all(len(line) < 10_000 for line in text.splitlines())
    for marker in filter(None, [entry.get("marker")]):
        assert not [p for where in (bad_inputs, home, tmp_path) for p in where.rglob(marker)]
    if code:
        assert code in CODES, text
        assert not [p for p in home.rglob("*") if p.is_file() and p.suffix != ".lock"]
    if name := other_type(path):
        assert got == "refuse" and name.lower() in text.lower(), text
        return
    if entry["should"] == "refuse_merge":  # nothing is merged here
        return
    wanted = [entry["should"], *entry.get("acceptable", [])]
    assert (got in wanted) or (got == "refuse" and REFUSED & set(wanted)), text
    if got != "load":
        for pattern in entry["message_should_mention"]:
            assert re.search(pattern, text, re.IGNORECASE), (pattern, text)


def test_most_of_the_corpus_is_of_kinds_that_are_read(bad_inputs: Path) -> None:
    others = [entry["id"] for entry in BAD if other_type(bad_inputs / entry["path"])]
    assert len(others) < len(BAD) / 5

"""Processes that add, tag, remove and collect at once: what each of them saw fits one order."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from adapterkit.registry import Registry
from adapterkit.registry.files import Files
from adapterkit.registry.log import Log, Place, Record

NAME, TAGS = "local/sql", ("a", "b")
WORKER = """
import json, os, random, sys, time
from datetime import timedelta
from pathlib import Path
from adapterkit.registry import ConflictError, Meaning, NotFoundError, Registry

home, me, until, seed = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
chosen, count = random.Random(seed), 0

def act(registry):
    kind = chosen.choices(["add", "tag", "cas", "see", "rm", "gc"], [4, 6, 4, 4, 1, 1])[0]
    have = [v.version for v in registry.versions("sql")]
    tag = chosen.choice("ab")
    if kind == "add" or not have:
        content = {"w": f"{me}-{count % 5}".encode(), "n": f"{me}-{count}".encode()}
        return {"kind": "add", "version": registry.add("sql", content, Meaning({})).ref.version}
    target = chosen.choice(have)
    if kind in ("tag", "cas"):
        options = {"expected": chosen.choice([*have, "none"])} if kind == "cas" else {}
        before = registry.tag(f"sql@{target}", tag, **options)
        found = {"before": before and before.version, "after": target, **options}
        return {"kind": "tag", "tag": tag, **found}
    if kind == "rm":
        registry.rm(f"sql@{target}")
        return {"kind": "rm", "version": target}
    if kind == "gc":
        registry.gc(timedelta(0))
        return {"kind": "gc"}
    try:
        seen = registry.resolve(f"sql:{tag}").version
    except NotFoundError:
        seen = None
    return {"kind": "see", "tag": tag, "seen": seen}

with Registry(home) as registry:
    while time.time() < until:
        count += 1
        os.environ["ADAPTERKIT_AUTHOR"] = f"{me}-{count}"
        start = time.monotonic()
        try:
            done = act(registry)
        except (ConflictError, NotFoundError) as error:
            done = {"kind": "refused", "error": str(error)}
        times = {"start": start, "end": time.monotonic()}
        print(json.dumps({**times, "author": f"{me}-{count}", **done}))
"""


@dataclass
class Did:
    """What a process says it did. seq: of the record it made, 0 for none."""

    start: float
    end: float
    author: str
    told: dict[str, object]
    seq: int = 0


def hammer(home: Path, n_processes: int, seconds: float) -> list[Did]:
    import time

    until = str(time.time() + seconds + 1)
    command = [sys.executable, "-c", WORKER, str(home)]
    children = [
        subprocess.Popen([*command, f"p{n}", until, str(n)], stdout=subprocess.PIPE, text=True)
        for n in range(n_processes)
    ]
    found = []
    for child in children:
        output, _ = child.communicate()
        assert child.returncode == 0
        for line in output.splitlines():
            told = json.loads(line)
            found.append(Did(told.pop("start"), told.pop("end"), told.pop("author"), told))
    return found


def records(home: Path) -> list[Record]:
    return [record for record, _ in Log(home / "log", Files()).read(Place())]


def tag_states(log: list[Record], tag: str) -> list[str | None]:
    """Where the tag was after each record; index 0: before the first."""
    found: list[str | None] = [None]
    for record in log:
        given, at = record.payload, found[-1]
        if record.kind == "tag" and given["tag"] == tag:
            at = given["version"]
        elif record.kind == "tombstone" and tag in given["tags"]:
            at = None
        found.append(at)
    return found


class Order:
    """The one order, and what each act, by its times, may have seen of it."""

    def __init__(self, log: list[Record], acts: Iterable[Did]) -> None:
        self.log, self.acts = log, list(acts)
        seqs = {record.author: record.seq for record in log}
        for act in self.acts:
            act.seq = seqs.get(act.author, 0)
        self.made = [act for act in self.acts if act.seq]
        self.by_end = sorted((act.end, act.seq) for act in self.made)
        self.by_start = sorted((act.start, act.seq) for act in self.made)

    def window(self, act: Did) -> range:
        """Records that were made before it began were seen; those begun after its end were not."""
        low = max((seq for end, seq in self.by_end if end < act.start), default=0)
        later = (seq for start, seq in self.by_start if start > act.end)
        return range(low, min(later, default=len(self.log) + 1))


def check_order(order: Order) -> None:
    """What ended before something else began stands before it in the log."""
    latest = 0
    ends = iter(order.by_end)
    end = next(ends, None)
    for act in sorted(order.made, key=lambda act: act.start):
        while end is not None and end[0] < act.start:
            latest, end = max(latest, end[1]), next(ends, None)
        assert act.seq > latest, act


def check_tags(order: Order) -> None:
    states = {tag: tag_states(order.log, tag) for tag in TAGS}
    for act in order.acts:
        told = act.told
        if told["kind"] == "tag":
            seen, states_of = told["before"], states[told["tag"]]
            if told.get("expected") is not None:
                assert seen == (None if told["expected"] == "none" else told["expected"])
            if act.seq:
                assert states_of[act.seq - 1] == seen and states_of[act.seq] == told["after"], act
            else:  # it was there already
                assert seen == told["after"]
                assert seen in {states_of[at] for at in order.window(act)}, act
        elif told["kind"] == "see":
            seen = {states[told["tag"]][at] for at in order.window(act)}
            assert told["seen"] in seen, act


def check_versions(order: Order, registry: Registry) -> None:
    added = {act.told["version"] for act in order.acts if act.told["kind"] == "add"}
    removed = {act.told["version"] for act in order.acts if act.told["kind"] == "rm"}
    have = {version.version for version in registry.versions("sql")}
    assert have == added - removed
    numbers = [r.payload["version"] for r in order.log if r.kind == "version"]
    assert len(numbers) == len(set(numbers))
    for version in registry.versions("sql"):
        registry.files(version.ref)


def test_eight_processes_at_once_lose_nothing_and_agree_on_one_history(shm, proof):
    home = shm / "home"
    acts = hammer(home, proof(3, 8), proof(5, 60))
    order = Order(records(home), acts)
    assert len(order.made) > 10
    check_order(order)
    check_tags(order)
    with Registry(home) as registry:
        check_versions(order, registry)
        assert registry.verify().damage == ()
    assert {act.told["kind"] for act in acts} >= {"add", "tag", "see"}


def test_the_check_finds_a_history_that_is_none(shm):
    """The test of the test: what one process saw is changed, and that is noticed."""
    home = shm / "home"
    acts = hammer(home, 2, 3)
    move = next(act for act in acts if act.told["kind"] == "tag")
    move.told["before"] = "9.9"
    with pytest.raises(AssertionError):
        check_tags(Order(records(home), acts))
    late = max(Order(records(home), acts).made, key=lambda act: act.seq)
    late.start, late.end = 0.0, 0.1
    early = Order(records(home), acts)
    with pytest.raises(AssertionError):
        check_order(early)



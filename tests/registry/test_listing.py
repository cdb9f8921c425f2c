"""What list, search and du promise."""

from __future__ import annotations

import pytest

from adapterkit.registry import Condition, Filter, InvalidError, Meaning
from adapterkit.registry.filters import parse_ranks

ROWS = {  # name -> kind, variant, rank, targets, base, quantization, metrics
    "sql": ("lora", "LoRA", 8, ["q_proj"], "org/llama", "nf4", b'{"loss":0.5,"acc":0.9}'),
    "tone": ("lora", "DoRA", 64, ["q_proj", "v_proj"], "org/llama", None, b'{"loss":1.5}'),
    "team/ia": ("ia3", "IA3", None, ["k_proj"], "other/qwen", "none", None),
}


@pytest.fixture
def stocked(registry):
    for number, (name, row) in enumerate(ROWS.items()):
        kind, variant, rank, targets, base, quantization, metrics = row
        adapter = {"kind": kind, "variant": variant, "rank": rank, "target_modules": targets}
        trained = {"trained_on": {"method": quantization}} if quantization else None
        registry.add(
            name, {"w": b"x" * (number + 1)}, Meaning(adapter, {"id": base}, trained),
            tags=["prod"] if number == 1 else [],
            attachments={"metrics": metrics} if metrics else None,
        )  # fmt: skip
    return registry


def names(registry, pattern=None, sort="name", **wanted):
    return [str(v.ref.short_name) for v in registry.list(pattern, Filter(**wanted), sort)]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({}, ["sql", "tone", "team/ia"]),
        ({"kind": "lora"}, ["sql", "tone"]),
        ({"kind": "dora"}, ["tone"]),
        ({"kind": "IA3"}, ["team/ia"]),
        ({"ranks": (8, 8)}, ["sql"]),
        ({"ranks": (0, 64)}, ["sql", "tone"]),
        ({"base": "llama"}, ["sql", "tone"]),
        ({"base": "org/ll*"}, ["sql", "tone"]),
        ({"base": "other/*"}, ["team/ia"]),
        ({"base": "lla"}, []),
        ({"targets": ("q_proj",)}, ["sql", "tone"]),
        ({"targets": ("q_proj", "v_proj")}, ["tone"]),
        ({"targets": ("q",)}, []),
        ({"targets": ('q_proj", "v_proj',)}, []),
        ({"quantization": "NF4"}, ["sql"]),
        ({"quantization": "none"}, ["team/ia"]),
        ({"tag": "prod"}, ["tone"]),
        ({"where": (Condition("loss", "<", 1.2),)}, ["sql"]),
        ({"where": (Condition("loss", ">=", 0.5),)}, ["sql", "tone"]),
        ({"where": (Condition("loss", "!=", 0.5), Condition("acc", ">", 0.0))}, []),
        ({"where": (Condition("unknown", "!=", 1.0),)}, []),
        ({"kind": "lora", "tag": "prod", "base": "llama", "ranks": (9, 99)}, ["tone"]),
    ],
)
def test_filters_let_through_what_they_say(stocked, wanted, found):
    assert names(stocked, **wanted) == found
    stocked.home.rebuild()
    assert names(stocked, **wanted) == found


@pytest.mark.parametrize(
    ("sort", "found"),
    [
        ("added", ["team/ia", "tone", "sql"]),
        ("size", ["team/ia", "tone", "sql"]),
        ("rank", ["tone", "sql", "team/ia"]),
        ("loss", ["sql", "tone", "team/ia"]),
        ("-loss", ["tone", "sql", "team/ia"]),
    ],
)
def test_sorting(stocked, sort, found):
    assert names(stocked, sort=sort) == found


def test_a_pattern_and_a_filter_both_hold(stocked):
    assert names(stocked, "s*", kind="lora") == ["sql"]
    assert names(stocked, "[!s]*", kind="lora") == ["tone"]
    assert names(stocked, "team/*", kind="lora") == []


def test_an_old_name_lists_what_it_leads_to(stocked):
    stocked.mv("sql", "team/sql")
    assert names(stocked, "sql") == names(stocked, "local/sql") == ["team/sql"]
    assert names(stocked, "s*") == []


def test_later_metrics_replace_earlier_ones(stocked):
    stocked.attach("sql", "metrics", b'{"loss":2}', "later")
    assert names(stocked, where=(Condition("loss", ">", 1.9),)) == ["sql"]
    found = stocked.metrics_of(stocked.list("sql"))
    assert list(found.values()) == [{"acc": 0.9, "loss": 2.0}] == [stocked.metrics("sql")]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("loss<1.2", Condition("loss", "<", 1.2)),
        ("loss <= -1e-3", Condition("loss", "<=", -0.001)),
        ("eval/f1==1", Condition("eval/f1", "=", 1.0)),
        ("a!=0", Condition("a", "!=", 0.0)),
        ("x>inf", Condition("x", ">", float("inf"))),
    ],
)
def test_conditions(text, found):
    assert Condition.parse(text) == found


@pytest.mark.parametrize("text", ["", "loss", "<1", "loss<", "loss<x", "loss<nan", "a<1;DROP"])
def test_what_is_no_condition(text):
    with pytest.raises(InvalidError, match="condition"):
        Condition.parse(text)


def test_ranks():
    found = [parse_ranks(text) for text in ("8", "8..64", "..64", "8..")]
    assert found == [(8, 8), (8, 64), (0, 64), (8, 10**9)]
    for text in ("", "..", "x", "8.64", "8-64", "9999999999"):
        with pytest.raises(InvalidError):
            parse_ranks(text)


def test_search_reads_cards_and_beginnings_and_stops_at_the_limit(registry):
    for number in range(3):
        card = {"README.md": b"answers questions %d" % number}
        roles = dict.fromkeys(card, "card")
        registry.add(f"a{number}", card, Meaning({"kind": "lora"}), roles=roles)
    assert len(registry.search("question*")) == 3 == len(registry.search("lora"))
    assert registry.search("question") == []
    assert len(registry.search("questions", limit=2)) == 2
    assert [str(v.ref) for v in registry.search("questions 1")] == ["a1@1.0"]
    assert registry.search("* ( - \" ") == []
    assert registry.search('questions" OR names:a0') == []


def test_a_name_ranks_above_a_card(registry):
    text = b"sql " * 20
    registry.add("other", {"README.md": text}, Meaning({}), roles={"README.md": "card"})
    registry.add("sql", {"w": b"x"}, Meaning({}))
    assert [v.ref.name for v in registry.search("sql")] == ["sql", "other"]


def test_a_lost_or_huge_card_does_not_stop_a_rebuild(registry, home):
    roles = {"README.md": "card"}
    found = registry.add("a", {"README.md": b"questions"}, Meaning({}), roles=roles)
    registry.add("b", {"README.md": b"questions " * 30000}, Meaning({}), roles=roles)
    registry.files("a")["README.md"].unlink()
    registry.home.rebuild()
    assert registry.search("questions") == []
    assert registry.resolve("a").id == found.id


def test_du_says_what_goes_when_a_name_goes(registry):
    registry.add("a", {"w": b"1" * 100, "shared": b"s" * 10}, Meaning({}))
    registry.add("a", {"w": b"2" * 100, "shared": b"s" * 10}, Meaning({}))
    registry.add("b", {"w": b"3" * 7, "shared": b"s" * 10, "twice": b"3" * 7}, Meaning({}))
    registry.add("empty", {}, Meaning({}))
    found, disk = registry.usage()
    assert [(u.name, u.n_versions, u.size, u.stored, u.own) for u in found] == [
        ("local/a", 2, 220, 210, 200), ("local/b", 1, 24, 17, 7), ("local/empty", 1, 0, 0, 0),
    ]  # fmt: skip
    blobs = [p for p in (registry.home.path / "blobs").rglob("*") if p.is_file()]
    assert (disk.n_blobs, disk.size) == (len(blobs), sum(p.stat().st_size for p in blobs))
    registry.rm("a@1.1")
    found, after = registry.usage("a")
    assert [(u.n_versions, u.own) for u in found] == [(1, 100)] and after == disk


def test_du_of_nothing(registry):
    found, disk = registry.usage()
    assert (found, disk.n_blobs, disk.size) == ([], 0, 0)


def test_a_file_that_is_here_is_looked_for_not_copied(registry, tmp_path, faults):
    path = tmp_path / "w"
    path.write_bytes(b"large")
    one = registry.add("a", {"w": path}, Meaning({}))
    registry.home.files = registry.home.blobs.files = faults.Counting()
    assert registry.add("a", {"w": path}, Meaning({})).created is False
    assert registry.home.files.names.count("create") == 1  # the manifest
    assert registry.home.blobs.find(path).digest == registry.manifest("a").files[0].digest
    path.write_bytes(b"other")  # of the same size
    assert registry.home.blobs.find(path) is None
    assert registry.add("a", {"w": path}, Meaning({})).id != one.id


def test_a_rotten_file_is_not_taken_for_one_that_is_here(registry, tmp_path):
    path = tmp_path / "w"
    path.write_bytes(b"large")
    registry.add("a", {"w": path}, Meaning({}))
    stored = registry.files("a")["w"]
    stored.chmod(0o644), stored.write_bytes(b"lArge")
    assert registry.home.blobs.find(path) is None
    assert registry.add("b", {"w": path}, Meaning({})).new_bytes > 0
    assert registry.files("a")["w"].read_bytes() == b"large"

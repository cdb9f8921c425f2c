"""Which modules a config means: by examples, and as PEFT decides."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterkit.hub.bases.base import CONV1D, EMBEDDING, LINEAR, NORM, Module
from adapterkit.hub.matching import Patterns, Targets, by_pattern
from adapterkit.registry.errors import DamagedError

NAMES = [
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.1.mlp.experts.0.q_proj",
    "vision.blocks.2.q_proj",
    "q_proj",
    "model.norm",
    "lm_head",
]
TYPES = {"model.embed_tokens": EMBEDDING, "model.norm": NORM}


def table(names: list[str]) -> dict[str, Module]:
    return {name: Module(name, TYPES.get(name, LINEAR), (4, 4)) for name in names}


ALL = table(NAMES)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (Targets(("q_proj",)), [1, 3, 4, 5, 6, 7]),
        (Targets(("proj",)), []),
        (Targets(("self_attn.q_proj",)), [1, 3, 4]),
        (Targets(("layers.1.self_attn.q_proj",)), [3]),
        (Targets(("_attn.q_proj",)), []),
        (Targets(("v_proj", "lm_head", "lm_head")), [2, 9]),
        (Targets(r".*\.(q|v)_proj"), [1, 2, 3, 4, 5, 6]),
        (Targets("q_proj"), [7]),
        (Targets(r"model\.layers\.1.*"), [3, 4, 5]),
        (Targets(("q_proj",), exclude=("vision.blocks.2.q_proj", "q_proj")), []),
        (Targets(("q_proj",), exclude=("experts.0.q_proj",)), [1, 3, 4, 6, 7]),
        (Targets(("q_proj",), exclude=r"vision\..*"), [1, 3, 4, 5, 7]),
        (Targets(("q_proj",), layers=(1,)), [3, 5, 7]),  # a whole name is never restricted
        (Targets(("q_proj",), layers=(2,), layers_pattern=("blocks",)), [6, 7]),
        (Targets(("q_proj",), layers=(0, 2), layers_pattern=("layers", "blocks")), [1, 6, 7]),
        (Targets(("q_proj",), layers=(0,), layers_pattern=("experts",)), [5, 7]),
        (Targets(("lm_head", "q_proj"), saved=("lm_head",)), [1, 3, 4, 5, 6, 7]),
        (Targets(("q_proj",), saved=("mlp",)), [1, 3, 4, 6, 7]),
        (Targets(("q_proj",), saved=("self",)), [1, 3, 4, 5, 6, 7]),
        (Targets("all-linear"), [1, 2, 3, 4, 5, 6]),
        (Targets("ALL-Linear", exclude=("q_proj",)), [2]),
        (Targets(None), []),
    ],
)
def test_selection_by_example(targets: Targets, expected: list[int]) -> None:
    assert targets.select(ALL) == [NAMES[i] for i in expected]


def test_all_linear_takes_conv1d_and_leaves_tied_heads() -> None:
    modules = {
        "h.0.c_attn": Module("h.0.c_attn", CONV1D, (4, 4)),
        "cls.decoder": Module("cls.decoder", LINEAR, (4, 4), tied_to="wte"),
    }
    assert Targets("all-linear").select(modules) == ["h.0.c_attn"]


def test_entries_that_mean_nothing_are_found() -> None:
    targets = Targets(("q_proj", "c_attn", "norm", "attn.q_proj"))
    assert targets.unmatched(NAMES) == ["c_attn", "attn.q_proj"]
    assert Targets("nothing").unmatched(NAMES) == []


@pytest.mark.parametrize(
    ("entry", "name", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("norm", "model.layers.0.input_layernorm", True),  # PEFT: by the end of a path
        ("score", "score.dense", True),
        ("score", "scores", False),
        ("layers.0", "model.layers.0.mlp.up", True),
        ("layers.0", "model.layers.01", False),
    ],
)
def test_saved_modules_are_found_by_the_end_of_a_path(
    entry: str, name: str, expected: bool
) -> None:
    assert Targets(saved=(entry,)).is_saved(name) is expected


@pytest.mark.parametrize(
    ("keys", "name", "expected"),
    [
        (["q_proj"], "model.layers.0.q_proj", "q_proj"),
        (["q"], "model.layers.0.q_proj", None),
        (["layers.0.q_proj", "q_proj"], "model.layers.0.q_proj", "layers.0.q_proj"),
        (["q_proj", "layers.0.q_proj"], "model.layers.0.q_proj", "q_proj"),
        (["layers.0.q_proj"], "layersX0.q_proj", "layers.0.q_proj"),  # a dot is any character
        (["a.b"], "x.ab", None),
        (["^model.layers.0.q_proj"], "model.layers.0.q_proj", "^model.layers.0.q_proj"),
        (["^layers.0.q_proj"], "model.layers.0.q_proj", None),  # not the start of the path
        ([r"layers\.[0-4]\..*"], "model.layers.3.q_proj", r"layers\.[0-4]\..*"),
        (["q_proj|v_proj"], "model.v_proj", "q_proj|v_proj"),
        (["(k|v)_proj", "v_proj"], "model.v_proj", "(k|v)_proj"),
        ([], "q_proj", None),
    ],
)
def test_the_first_matching_pattern_wins(
    keys: list[str], name: str, expected: str | None
) -> None:
    found = by_pattern({key: key for key in keys}, name, Patterns(), "rank_pattern")
    assert found == expected


WORDS = st.sampled_from(["model", "layers", "0", "1", "12", "q_proj", "v_proj", "attn", "h", "x"])
PATHS = st.lists(WORDS, min_size=1, max_size=6).map(".".join)
ENTRIES = st.lists(st.lists(WORDS, min_size=1, max_size=3).map(".".join), min_size=1, max_size=3)
REGEXES = st.sampled_from(
    [r".*\.(q|v)_proj", "q_proj", r"model\..*", r".*attn\.[^.]*", r"(.*\.)?layers\.\d+\.q_proj"]
)
here = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@here
@given(
    names=st.lists(PATHS, min_size=1, max_size=8, unique=True),
    modules=ENTRIES | REGEXES,
    exclude=st.none() | ENTRIES | REGEXES,
    layers=st.none() | st.lists(st.integers(0, 12), max_size=3) | st.integers(0, 2),
    pattern=st.none() | st.sampled_from(["layers", "h"]) | st.just(["h", "layers"]) | st.just([]),
    saved=st.none() | ENTRIES,
)
def test_selection_is_that_of_peft(
    names: list[str], modules: Any, exclude: Any, layers: Any, pattern: Any, saved: Any
) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    from adapterkit.hub.formats.config import ConfigReader
    from adapterkit.hub.formats.peft_config import targets

    config: dict[str, Any] = {
        "target_modules": modules, "exclude_modules": exclude, "modules_to_save": saved,
    }  # fmt: skip
    if not isinstance(modules, str) and layers is not None:  # PEFT takes these two for lists only
        config |= {"layers_to_transform": layers, "layers_pattern": pattern}
    theirs = LoraConfig(**config)
    wanted = [name for name in names if check_target_module_exists(theirs, name)]
    reader = ConfigReader(config, "adapter_config.json")
    ours = targets(reader)
    reader.done()
    assert ours.select(table(names)) == wanted


SPECIAL = [r"layers\.\d+\..*", "^model.layers.0.q_proj", "(q|v)_proj", "q_proj|x", "^x"]
KEYS = st.lists(
    st.lists(WORDS, min_size=1, max_size=4).map(".".join) | st.sampled_from(SPECIAL),
    max_size=6,
    unique=True,
)


@here
@given(keys=KEYS, name=PATHS)
def test_patterns_are_looked_up_as_in_peft(keys: list[str], name: str) -> None:
    pytest.importorskip("peft")
    from peft.utils.other import get_pattern_key

    found = by_pattern({key: key for key in keys}, name, Patterns(), "rank_pattern")
    assert get_pattern_key(keys, name) == (name if found is None else found)


SLOW = [r"(a+)+b", r"(.*)*\1x", r"(?:a|a|aa)+$b", r"(x+x+)+y", r"(\w|\w\w)*!"]
LONG = "a" * 30 + "x" * 40


@pytest.mark.parametrize("pattern", SLOW)
def test_a_slow_pattern_is_an_error_in_time_or_answers(pattern: str) -> None:
    started = time.monotonic()
    patterns = Patterns(0.3)
    try:
        for number in range(200):
            patterns.match(pattern, f"{LONG}{number}", "target_modules")
    except DamagedError as error:
        assert "target_modules" in str(error) and "longer than 0.3 s" in str(error)
    assert time.monotonic() - started < 3


def test_many_quick_patterns_share_one_limit() -> None:
    keys: Mapping[str, int] = {f"(x{i}|y)": i for i in range(5000)}
    started = time.monotonic()
    patterns = Patterns(0.3)
    with pytest.raises(DamagedError, match="rank_pattern"):
        for name in map(str, range(100_000)):
            by_pattern(keys, name, patterns, "rank_pattern")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "pattern",
    [
        "(", "[a-", "*", "(?P<a>x", r"\L<names>", "a{2,1}", "(?<=a*)(", "(" * 9000, "x" * 30_000,
        "[a-z]{1000000000}", "((a{999}){999}){999}", "(?R)", "(a|(?1)b)*", "(?&x)", "(abc){e<=3}",
    ],
)  # fmt: skip
def test_an_unusable_pattern_is_an_error_that_names_field_and_pattern(pattern: str) -> None:
    started = time.monotonic()
    for targets in (Targets(pattern), Targets(("x",), exclude=pattern)):
        field = "target_modules" if targets.modules == pattern else "exclude_modules"
        for use in (lambda t=targets: t.select(ALL), lambda t=targets: t.require_usable([])):
            with pytest.raises(DamagedError) as caught:
                use()
            message = str(caught.value)
            assert message.startswith(f"{field} is not a valid regular expression: {pattern[:20]}")
            assert len(message) < 1000
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("pattern", ["(", "[x", "(?P<layer>"])
def test_an_unusable_layers_pattern_is_an_error(pattern: str) -> None:
    targets = Targets(("q_proj",), layers=(0,), layers_pattern=(pattern,))
    with pytest.raises(DamagedError, match="layers_pattern"):
        targets.require_usable([])


@pytest.mark.parametrize("pattern", ["a)|(?:model", "(?P<layer>layers)", "(?P<layer>x)|layers"])
def test_a_layers_pattern_that_catches_the_number_itself_crashes_nothing(pattern: str) -> None:
    targets = Targets(("q_proj",), layers=(0,), layers_pattern=(pattern,))
    assert set(targets.select(ALL)) <= set(NAMES)


def test_ten_thousand_entries_take_no_time() -> None:
    entries = tuple(f"x{i}.y" for i in range(10_000))
    names = table([f"model.layers.{i}.mlp.proj{j}" for i in range(100) for j in range(20)])
    started = time.process_time()
    targets = Targets((*entries, "proj3"), exclude=entries)
    assert len(targets.select(names)) == 100
    assert len(targets.unmatched(names)) == 10_000
    assert time.process_time() - started < 1


def test_a_name_of_a_million_parts_takes_no_memory() -> None:
    name = "a." * 1_000_000 + "b"
    started = time.process_time()
    assert not Targets(saved=("score",)).is_saved(name)
    assert time.process_time() - started < 1

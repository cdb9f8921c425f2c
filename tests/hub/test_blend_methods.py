"""Blending methods on the factors of one module, against dense matrices and against PEFT's own."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from adapterkit.hub.blend import pruning
from adapterkit.hub.blend.entries import entrywise
from adapterkit.hub.blend.factors import Factors, Term, concatenated, inner, norm
from adapterkit.hub.blend.masks import Masks, splitmix
from adapterkit.hub.blend.methods import method, names
from adapterkit.hub.blend.settings import DIALECTS, Place, Settings
from adapterkit.hub.blend.streamed import ENTRIES, Streamed, low_rank, magnitude_at
from adapterkit.hub.blend.truncate import spectrum
from adapterkit.registry.errors import InvalidError

DATA = Path(os.environ.get("ADAPTERKIT_FIXTURES") or Path(__file__).parents[1] / "data").resolve()
CASES: list[dict[str, Any]] = [
    case
    for case in json.loads((DATA / "index.json").read_text())["cases"]
    if case["kind"] == "multi_lora" and case["operation"]["op"] == "add_weighted_adapter"
]
SIZES = st.integers(1, 9)


def factors(seed: int, n_out: int, n_in: int, rank: int, scale: float = 1.0) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    b = torch.randn(n_out, rank, generator=draw)
    return Factors(b, torch.randn(rank, n_in, generator=draw), scale)


def dense(change: Factors) -> Tensor:
    return change.scale * (change.B.double() @ change.A.double())


def terms(weights: list[float], n_out: int = 12, n_in: int = 20, rank: int = 3) -> list[Term]:
    made = [factors(seed, n_out, n_in, rank, 0.5 + seed) for seed in range(len(weights))]
    return [Term(w, f, i) for i, (w, f) in enumerate(zip(weights, made, strict=True))]


def blended(name: str, given: list[Term], **chosen: Any) -> Factors:
    settings = Settings(**chosen)
    return method(name, settings)(given, Place("m", settings)).factors


def near(found: Factors, expected: Tensor, within: float = 1e-5) -> None:
    gap = (dense(found) - expected).norm() / max(float(expected.norm()), 1.0)
    assert gap <= within, float(gap)


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES, st.floats(-3, 3))
def test_inner_products_are_those_of_the_dense_changes(
    n_out: int, n_in: int, r: int, q: int, scale: float
) -> None:
    a, b = factors(0, n_out, n_in, r, scale), factors(1, n_out, n_in, q)
    assert inner(a, b) == pytest.approx(float((dense(a) * dense(b)).sum()), abs=1e-9)
    assert norm(a) == pytest.approx(float(dense(a).norm()), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.lists(st.tuples(SIZES, st.floats(-2, 2)), min_size=1, max_size=4))
def test_a_sum_is_exact_whatever_the_ranks_and_signs(
    n_out: int, n_in: int, parts: list[tuple[int, float]]
) -> None:
    given_terms = [
        Term(w, factors(i, n_out, n_in, r, 1.5), i) for i, (r, w) in enumerate(parts)
    ]
    whole = concatenated(given_terms)
    assert whole.rank == sum(r for r, _ in parts)
    near(whole, sum((t.weight * dense(t.factors) for t in given_terms), torch.zeros(n_out, n_in)))


def test_one_adapter_at_weight_1_is_itself_bit_for_bit() -> None:
    one = factors(0, 8, 6, 2)
    for name in ("sum", "svd", "average"):
        found = blended(name, [Term(1.0, one)])
        assert torch.equal(found.A, one.A) and torch.equal(found.B, one.B)


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES)
def test_truncation_is_the_optimum_of_a_dense_svd(
    n_out: int, n_in: int, rank: int, keep: int
) -> None:
    """Eckart and Young: no change of that rank is nearer."""
    change = factors(3, n_out, n_in, rank, 0.7)
    values = torch.linalg.svdvals(dense(change))
    best = math.sqrt(float(values[keep:].square().sum()))
    found = spectrum(change)
    gap = float((dense(change) - dense(found.truncated(keep))).norm())
    assert gap == pytest.approx(best, abs=1e-5)
    assert found.error(keep) * float(dense(change).norm()) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("doubt", ["duplicate", "cancelling", "scaled", "zero", "nearly"])
def test_truncation_survives_adapters_that_are_nearly_the_same(doubt: str) -> None:
    """Where the Gram matrix loses its digits, an orthogonal decomposition takes over."""
    a, b = factors(0, 40, 30, 4), factors(1, 40, 30, 4)
    other = {
        "duplicate": Term(0.5, a),
        "cancelling": Term(-1.0, a),
        "scaled": Term(1.0, Factors(1e-12 * a.B, a.A)),
        "zero": Term(1.0, Factors(torch.zeros_like(a.B), a.A)),
        "nearly": Term(-1.0, Factors(a.B * (1 + 1e-6), a.A)),
    }[doubt]
    whole = concatenated([Term(1.0, a), Term(1.0, b), other])
    exact = dense(whole)
    values = torch.linalg.svdvals(exact)
    found = spectrum(whole)
    torch.testing.assert_close(found.values[:8], values[:8], rtol=1e-7, atol=1e-7)
    for keep in (2, 4, 8):
        u, s, v = torch.linalg.svd(exact)
        best = float((exact - (u[:, :keep] * s[:keep]) @ v[:keep]).norm())
        gap = float((exact - dense(found.truncated(keep))).norm())
        assert gap == pytest.approx(best, abs=1e-5 * float(exact.norm()))


def test_a_change_that_is_nothing_has_no_error_and_rank_1() -> None:
    found = spectrum(Factors(torch.zeros(5, 3), torch.zeros(3, 4)))
    assert (found.error(1), found.rank_for(0.99)) == (0.0, 1)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 1.0))
def test_the_rank_for_an_energy_is_the_smallest_that_keeps_it(energy: float) -> None:
    found = spectrum(factors(5, 20, 15, 8))
    shares = found.values.square().cumsum(0) / found.values.square().sum()
    rank = found.rank_for(energy)
    assert shares[rank - 1] >= energy - 1e-12
    assert rank == 1 or shares[rank - 2] < energy


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1))
def test_slerp_turns_from_the_first_to_the_second(t: float) -> None:
    a, b = terms([1 - t, t])
    found = blended("slerp", [a, b])
    x, y = dense(a.factors), dense(b.factors)
    angle = math.acos(float((x * y).sum() / x.norm() / y.norm()))
    expected = (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)
    near(found, expected)


def test_slerp_of_parallel_changes_goes_along_the_line_between_them() -> None:
    a = factors(0, 6, 5, 2)
    near(blended("slerp", [Term(0.25, a), Term(0.75, a)]), dense(a))


@pytest.mark.parametrize("weights", [[1.0], [1.0, -0.5], [0.0, 0.0], [0.3, 0.3, 0.3]])
def test_slerp_takes_two_weights_of_which_none_is_negative(weights: list[float]) -> None:
    with pytest.raises(InvalidError, match="slerp"):
        blended("slerp", terms(weights))


def test_an_average_has_weights_that_add_up_to_1() -> None:
    given_terms = terms([2.0, 1.0, 1.0])
    shares = [0.5, 0.25, 0.25]
    parts = zip(shares, given_terms, strict=True)
    near(blended("average", given_terms), sum(w * dense(t.factors) for w, t in parts))
    with pytest.raises(InvalidError, match="add up to 0"):
        blended("average", terms([1.0, -1.0]))


def trimmed(change: Tensor, density: float) -> Tensor:
    kept = int(density * change.numel())
    least = change.abs().flatten().topk(kept).values[-1] if kept else math.inf
    return torch.where(change.abs() >= least, change, 0.0)


def ties_by_hand(changes: list[Tensor], weights: list[float], dialect: str) -> Tensor:
    """Entry by entry, as each of the three defines it."""
    total = torch.zeros_like(changes[0])
    for place in [(i, j) for i in range(total.shape[0]) for j in range(total.shape[1])]:
        values = [float(change[place]) for change in changes]
        weighted = [w * v for w, v in zip(weights, values, strict=True)]
        votes = sum(values) if dialect == "peft" else sum(weighted)
        voters = values if dialect == "peft" else weighted
        agree = [k for k, v in enumerate(voters) if v != 0 and (v > 0) == (votes >= 0)]
        share = sum(weights[k] for k in agree) if dialect == "mergekit" else len(agree)
        if agree:
            total[place] = sum(weighted[k] for k in agree) / (share or 1)
    return total


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -0.4, 1.2]])
def test_ties_is_what_each_dialect_says(dialect: str, weights: list[float]) -> None:
    given_terms = terms(weights, 7, 9)
    place = Place("m", Settings(density=0.4, dialect=dialect))
    found = torch.cat([rows for _, rows in entrywise("ties")(given_terms, place).blocks()])
    pruned = [trimmed(dense(term.factors), 0.4) for term in given_terms]
    torch.testing.assert_close(
        found.double(), ties_by_hand(pruned, weights, dialect), atol=1e-5, rtol=1e-5
    )


def test_breadcrumbs_drops_both_ends() -> None:
    (term,) = terms([1.0], 10, 10)
    place = Place("m", Settings(density=0.5, gamma=0.1))
    found = torch.cat([rows for _, rows in entrywise("breadcrumbs")([term], place).blocks()])
    order = dense(term.factors).abs().flatten().argsort(descending=True)
    kept = set(order[10:60].tolist())
    assert set(found.flatten().nonzero().flatten().tolist()) == kept


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_dropping_at_random_keeps_the_mean(name: str) -> None:
    (term,) = terms([1.0], 6, 8)
    runs = []
    for seed in range(600):
        place = Place("m", Settings(density=0.5, seed=seed))
        runs.append(torch.cat([rows for _, rows in entrywise(name)([term], place).blocks()]))
    gap = torch.stack(runs).mean(0) - dense(term.factors).float()
    assert float(gap.norm() / dense(term.factors).norm()) < 0.1


def test_della_keeps_large_entries_more_often() -> None:
    (term,) = terms([1.0], 4, 50)
    size = dense(term.factors).abs()
    kept = torch.zeros_like(size)
    for seed in range(400):
        place = Place("m", Settings(density=0.5, epsilon=0.8, seed=seed))
        rows = [rows for _, rows in entrywise("della_linear")([term], place).blocks()]
        kept += (torch.cat(rows) != 0).double()
    largest, smallest = size.argmax(1), size.argmin(1)
    rows = torch.arange(4)
    assert float((kept[rows, largest] / 400).mean()) == pytest.approx(0.9, abs=0.05)
    assert float((kept[rows, smallest] / 400).mean()) == pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_mergekits_random_pruning_keeps_the_sum_of_magnitudes(name: str) -> None:
    (term,) = terms([1.0], 20, 20)
    place = Place("m", Settings(density=0.3, dialect="mergekit"))
    found = entrywise(name)([term], place).whole()
    before, after = dense(term.factors).abs().sum(), found.abs().sum()
    assert float(after) == pytest.approx(float(before), rel=1e-5)


def test_mergekits_dare_ties_is_the_sum_of_what_agrees() -> None:
    place = Place("m", Settings(density=1.0, dialect="mergekit"))
    a, b = terms([0.5, 2.0], 6, 8)
    found = entrywise("dare_ties")([a, b], place).whole()
    x, y = (term.weight * dense(term.factors).float() for term in (a, b))
    sign = torch.where(x + y >= 0, 1.0, -1.0)
    expected = x * (x * sign > 0) + y * (y * sign > 0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_random_choices_depend_on_seed_name_and_input_alone() -> None:
    whole = Masks(7, "layer.q", 1).uniform(0, 1000)
    for start, stop in ((0, 1), (3, 10), (8, 64), (13, 700), (999, 1000)):
        assert torch.equal(Masks(7, "layer.q", 1).uniform(start, stop - start), whole[start:stop])
    for other in (Masks(8, "layer.q", 1), Masks(7, "layer.k", 1), Masks(7, "layer.q", 2)):
        assert not torch.equal(other.uniform(0, 1000), whole)
    assert whole.min() >= 0 and whole.max() < 1 and abs(float(whole.mean()) - 0.5) < 0.05


def test_random_choices_are_those_of_their_numbers() -> None:
    draws = Masks(3, "layer.q", 0)
    numbers = draws.uniform(5, 4000)
    for probability in (2.0**-24, 0.25, float(numbers[7]), float(numbers[8]), 1 - 2.0**-24, 1.0):
        chosen = draws.chosen(5, 4000, probability)
        assert torch.equal(chosen, (numbers < probability).float())
    assert 0.18 < float(draws.chosen(0, 4000, 0.2).mean()) < 0.22


def test_each_entry_has_bits_of_its_own() -> None:
    bits = (Masks(3, "layer.q", 0).uniform(0, 4000) * 2**24).long()
    shares = torch.stack([(bits >> place & 1).float().mean() for place in range(24)])
    assert float(shares.min()) > 0.45 and float(shares.max()) < 0.55


def test_words_are_those_of_splitmix64() -> None:
    """The first outputs from the state 1234567, of the reference implementation."""
    words = splitmix(np.uint64(1234567), np.arange(3, dtype=np.uint64))
    assert words.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_random_choices_are_the_same_on_every_machine() -> None:
    found = Masks(0, "model.layers.0.self_attn.q_proj", 0).uniform(0, 3)
    assert found.tolist() == pytest.approx(RECORDED, abs=0)


RECORDED = [0.010329782962799072, 0.3644474744796753, 0.6742830276489258]


@pytest.mark.parametrize("kept", [0, 1, 7, 40, 239, 240])
def test_the_threshold_is_that_of_a_sorted_list(kept: int) -> None:
    change = factors(2, 12, 20, 3)
    whole = change.rows(0, 12)
    expected = whole.abs().flatten().sort(descending=True).values[kept - 1] if kept else math.inf
    assert magnitude_at(Streamed(change.shape, change.rows), kept) == float(expected)


@pytest.mark.parametrize("kept", [1, 300_000, 1_199_999, 1_200_000])
def test_the_threshold_of_a_matrix_seen_in_parts_is_the_same(kept: int) -> None:
    change = factors(2, 1200, 1000, 3)
    assert ENTRIES < 1200 * 1000
    expected = change.rows(0, 1200).abs().flatten().sort(descending=True).values[kept - 1]
    assert magnitude_at(Streamed(change.shape, change.rows), kept) == float(expected)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_entries_as_large_as_the_smallest_one_kept_stay(density: float) -> None:
    rows = torch.tensor([[1.0, -1.0, 1.0, 0.0], [-2.0, 0.0, -0.0, 1.0], [1.0, 0.5, -1.0, 3.0]])
    term = Term(1.0, Factors(torch.eye(3), rows))
    kept = pruning.by_magnitude(term, density)(rows, 0)
    assert torch.equal(kept, trimmed(rows, density))


def test_the_randomized_svd_is_near_the_optimum_on_a_flat_spectrum() -> None:
    draw = torch.Generator().manual_seed(0)
    whole = torch.randn(700, 600, generator=draw) * (torch.rand(700, 600, generator=draw) < 0.3)
    whole += 3 * torch.randn(700, 24, generator=draw) @ torch.randn(24, 600, generator=draw) / 5
    found, error = low_rank(Streamed((700, 600), lambda start, stop: whole[start:stop]), 16)
    values = torch.linalg.svdvals(whole.double())
    best = math.sqrt(float(values[16:].square().sum() / values.square().sum()))
    assert best - 1e-6 <= error <= 1.01 * best
    gap = float((whole - found.B @ found.A).norm() / whole.norm())
    assert gap == pytest.approx(error, abs=1e-5)


def test_iso_c_makes_all_directions_equally_strong() -> None:
    given_terms = terms([1.0, 0.5])
    values = torch.linalg.svdvals(sum(t.weight * dense(t.factors) for t in given_terms))[:6]
    found = torch.linalg.svdvals(dense(blended("iso_c", given_terms)))[:6]
    torch.testing.assert_close(found, values.mean().expand(6), rtol=1e-5, atol=1e-5)


def test_tsv_of_one_adapter_is_itself_and_of_two_has_orthogonal_parts() -> None:
    one = terms([0.8])
    near(blended("tsv", one), 0.8 * dense(one[0].factors))
    two = terms([1.0, 1.0], rank=4)
    parts = [torch.linalg.svdvals(dense(t.factors))[:2] for t in two]
    found = torch.linalg.svdvals(dense(blended("tsv", two)))[:4]
    torch.testing.assert_close(
        found, torch.cat(parts).sort(descending=True).values, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["knots", "core"])
def test_merging_coordinates_by_their_sum_is_the_sum(name: str) -> None:
    given_terms = terms([0.7, -0.4, 0.2])
    expected = sum(t.weight * dense(t.factors) for t in given_terms)
    near(blended(name, given_terms, inner="linear"), expected)


@pytest.mark.parametrize("name", names())
def test_the_order_of_the_inputs_changes_nothing(name: str) -> None:
    """As far as rounding goes; random choices are keyed by the input, not by its place."""
    given_terms = terms([0.6, 0.5])
    there = dense(blended(name, given_terms, density=0.9, rank=6))
    back = dense(blended(name, given_terms[::-1], density=0.9, rank=6))
    torch.testing.assert_close(there, back, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", names())
def test_a_rank_asked_for_is_kept(name: str) -> None:
    assert blended(name, terms([0.6, 0.5]), density=0.9, rank=2).rank == 2


def test_unknown_methods_and_settings_are_named() -> None:
    with pytest.raises(InvalidError, match="no method tie; there are .*ties"):
        method("tie", Settings())
    with pytest.raises(InvalidError, match="no method linear") as caught:
        method("linear", Settings())
    assert caught.value.hint == "--dialect peft"
    with pytest.raises(InvalidError, match="density is 0.*; dialect is 'x'"):
        Settings(density=0, dialect="x")  # type: ignore[arg-type]
    with pytest.raises(InvalidError, match="della keeps entries"):
        blended("della", terms([1.0, 1.0]), density=0.98)


# PEFT's own results, recorded: index.json, `delta.<module>` of each case.


def loras(case: dict[str, Any]) -> dict[str, dict[str, Factors]]:
    """adapter -> module -> factors, with its scaling."""
    found: dict[str, dict[str, Factors]] = {}
    for adapter in case["adapters"]:
        config = json.loads((DATA / adapter["path"] / "adapter_config.json").read_text())
        tensors = load_file(DATA / adapter["path"] / "adapter_model.safetensors")
        made = {}
        for key, a in tensors.items():
            if not key.endswith(".lora_A.weight"):
                continue
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank = a.shape[0]
            alpha = next(
                (v for k, v in (config["alpha_pattern"] or {}).items() if module.endswith(k)),
                config["lora_alpha"],
            )
            scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
            b = tensors[key.replace("lora_A", "lora_B")]
            made[module] = Factors(b.float(), a.float(), scale)
        found[adapter["name"]] = made
    return found


class Recorded:
    """The masks PEFT drew, for one tensor."""

    def __init__(self, kept: Tensor) -> None:
        self._draws = (1 - kept.flatten().float()) * 0.999999

    def uniform(self, start: int, count: int) -> Tensor:
        return self._draws[start : start + count].clone()

    def chosen(self, start: int, count: int, probability: float) -> Tensor:
        return (self._draws[start : start + count] < probability).float()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_pefts_dialect_gives_pefts_own_change(case: dict[str, Any]) -> None:
    """Where the first adapter is rsLoRA, PEFT applies its result sqrt(r) times: what it meant
    (`delta_scaling_one`) is compared."""
    operation = case["operation"]
    held = loras(case)
    expected = load_file(DATA / case["expected"]["file"])
    largest = max(factors.rank for made in held.values() for factors in made.values())
    rank = operation.get("svd_rank") or largest  # of all modules, as PEFT takes it
    truncates = operation["combination_type"].endswith("svd")
    chosen = Settings(
        dialect="peft",
        rank=rank if truncates else None,
        density=operation.get("density") or 1.0,
        sign=operation.get("majority_sign_method") or "total",
        clamp=operation.get("svd_clamp"),
    )
    found = {}
    prefix = "delta_scaling_one." if "reference_bug" in case["tags"] else "delta."
    for key, delta in expected.items():
        if not key.startswith(prefix):
            continue
        module = key.removeprefix(prefix)
        given_terms = [
            Term(weight, held[name][module], index)
            for index, (name, weight) in enumerate(
                zip(operation["adapters"], operation["weights"], strict=True)
            )
            if module in held[name]
        ]
        place = Place(module, chosen, draws_of(case))
        found[module] = method(operation["combination_type"], chosen)(given_terms, place).factors
        gap = float((dense(found[module]) - delta).abs().max())
        assert gap <= 2e-5, (module, gap)
    assert found


def draws_of(case: dict[str, Any]) -> Any:
    """What PEFT drew: module after module, A before B, one mask for each input."""
    path = DATA / "cases" / case["id"] / "draws.safetensors"
    if not path.exists():
        return None
    masks = load_file(path)
    modules = sorted(loras(case)[case["operation"]["adapters"][0]])
    n_inputs = len(case["operation"]["adapters"])
    per_factor = not case["operation"]["combination_type"].endswith("_svd")
    parts = [m + part for m in modules for part in ((".A", ".B") if per_factor else ("",))]
    return lambda name, index: Recorded(masks[f"{parts.index(name) * n_inputs + index:04}"])

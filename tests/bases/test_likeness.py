"""The same weights are known again after a cast or a quantization, and no others are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load, load_file, save_file

from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.folder import read_base
from adapterkit.hub.bases.likeness import EXACT, NOT_COMPARED, OTHER, SAME_CAST, compare_values
from adapterkit.hub.bases.likeness import compare_sketch as compare
from adapterkit.hub.bases.sketch import parse_sketch, runs, sketch
from adapterkit.hub.bases.values import Values, block_values, dense_values
from adapterkit.registry.errors import DamagedError, NotFoundError

FILE = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
Copy = Callable[[str], Path]
BaseOf = Callable[[str], Base]


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Base:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return read_base(folder)


def cast(tensors: dict[str, torch.Tensor], *dtypes: torch.dtype) -> None:
    for dtype in dtypes:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})


def test_a_sketch_is_two_runs_of_64_values_of_each_tensor(base_of: BaseOf) -> None:
    base = base_of("llama")
    tensors = load(sketch(base))
    assert set(tensors) == set(base.tensors)
    assert tensors["model.norm.weight"].shape == (64,)
    whole = load_file(Path(base.name) / FILE)
    (first, _), (second, _) = runs(UP, (128, 64))
    assert first % 64 == second % 64 == 0
    assert first != second
    expected = torch.cat([whole[UP].flatten()[i : i + 64] for i in (first, second)])
    assert torch.equal(tensors[UP], expected)


def test_equal_weights_have_an_equal_sketch_however_they_are_stored(base_of: BaseOf) -> None:
    names = ["model.norm.weight", UP]
    assert sketch(base_of("llama")) == sketch(base_of("llama_sharded"))
    assert sketch(base_of("llama"), names) == sketch(base_of("llama"), reversed(names))
    assert sketch(base_of("llama")) != sketch(base_of("llama_reseed"))


@pytest.mark.parametrize("shape", [(1,), (127,), (128,), (130,), (3, 7, 64)])
def test_runs_lie_inside_and_do_not_overlap(shape: tuple[int, ...]) -> None:
    size = torch.Size(shape).numel()
    places = [i for start, count in runs("x", shape) for i in range(start, start + count)]
    assert len(places) == len(set(places)) == min(size, 128)
    assert set(places) <= set(range(size))


@pytest.mark.parametrize("recorded", ["llama", "llama_nf4_double", "llama_int8"])
@pytest.mark.parametrize("other", ["llama", "llama_sharded", "llama_nf4_double", "llama_int8"])
def test_a_quantized_base_is_the_base_it_was_made_from(
    recorded: str, other: str, base_of: BaseOf
) -> None:
    result = compare(sketch(base_of(recorded)), base_of(other))
    same = recorded == other or (recorded, other) == ("llama", "llama_sharded")
    assert result.verdict == (EXACT if same else SAME_CAST)
    assert (result.compared, result.differing, result.uncompared) == (21, (), {})


@pytest.mark.parametrize("other", ["llama", "llama_nf4_double", "llama_int8"])
def test_another_base_of_the_same_shapes_is_told_apart_in_every_tensor(
    other: str, base_of: BaseOf
) -> None:
    result = compare(sketch(base_of("llama_reseed")), base_of(other))
    assert result.verdict == OTHER
    assert len(result.differing) == 21


@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16,), (torch.float16,), (torch.bfloat16, torch.float32),
     (torch.float16, torch.bfloat16), (torch.float64,)],
)  # fmt: skip
def test_a_cast_copy_is_the_same_weights(
    dtypes: tuple[torch.dtype, ...], base_of: BaseOf, copied: Copy
) -> None:
    base = changed(copied("llama"), lambda tensors: cast(tensors, *dtypes))
    for one, two in ((base_of("llama"), base), (base, base_of("llama"))):
        assert compare(sketch(one), two).verdict == SAME_CAST
    assert compare(sketch(base_of("llama_reseed")), base).verdict == OTHER


def test_two_casts_of_one_base_are_the_same_weights(copied: Copy, fixtures: Path) -> None:
    folder = copied("llama")
    half = sketch(changed(folder, lambda tensors: cast(tensors, torch.float16)))
    shutil.copy(fixtures / "bases" / "llama" / FILE, folder / FILE)
    other = changed(folder, lambda tensors: cast(tensors, torch.bfloat16))
    assert compare(half, other).verdict == SAME_CAST
    assert compare(sketch(other), other).verdict == EXACT


def test_one_sampled_bit_is_seen(base_of: BaseOf, copied: Copy) -> None:
    (place, _), _ = runs(UP, (128, 64))

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP].view(torch.int32).view(-1)[place + 5] ^= 1

    result = compare(sketch(base_of("llama")), changed(copied("llama"), flip))
    assert result.verdict == OTHER
    (difference,) = result.differing
    assert (difference.tensor, difference.position) == (UP, place + 5)
    assert difference.recorded != difference.found


def test_a_little_training_is_other_weights_even_against_4_bits(
    base_of: BaseOf, copied: Copy
) -> None:
    """A change of a twentieth of a weight moves some values into the next code."""

    def train(tensors: dict[str, torch.Tensor]) -> None:
        torch.manual_seed(0)
        tensors[UP] += 0.05 * tensors[UP].std() * torch.randn_like(tensors[UP])

    trained = sketch(changed(copied("llama"), train))
    for name in ("llama", "llama_nf4_double", "llama_int8"):
        result = compare(trained, base_of(name))
        assert result.verdict == OTHER
        assert [difference.tensor for difference in result.differing] == [UP]


def test_what_cannot_be_compared_is_named(base_of: BaseOf) -> None:
    grown = compare(sketch(base_of("llama")), base_of("llama_resized"))
    assert grown.verdict == EXACT
    assert set(grown.uncompared) == {"lm_head.weight", "model.embed_tokens.weight"}
    assert "[264, 64]" in grown.uncompared["lm_head.weight"]
    other = compare(sketch(base_of("llama")), base_of("gpt2"))
    assert (other.verdict, other.compared, len(other.uncompared)) == (NOT_COMPARED, 0, 21)


def test_a_model_in_memory_is_compared_by_its_values(base_of: BaseOf, fixtures: Path) -> None:
    tensors = load_file(fixtures / "bases" / "llama" / FILE)

    def quantized(name: str, start: int, count: int) -> Values | None:
        if tensors[name].dim() < 2:
            return None
        state = bnb.quantize_4bit(tensors[name].bfloat16(), blocksize=64, quant_type="nf4")
        live = bnb.dequantize_4bit(*state).flatten()[start : start + count]
        return block_values("nf4", live.tolist())

    def halved(name: str, start: int, count: int) -> Values:
        live = tensors[name].flatten()[start : start + count].bfloat16()
        return dense_values("BF16", live.tolist())

    for reader, compared in ((quantized, 16), (halved, 21)):
        result = compare_values(sketch(base_of("llama")), reader)
        assert (result.verdict, result.compared) == (SAME_CAST, compared)
        assert compare_values(sketch(base_of("llama_reseed")), reader).verdict == OTHER


def test_nan_and_infinity_equal_themselves_only(base_of: BaseOf, copied: Copy) -> None:
    (place, _), _ = runs(UP, (128, 64))

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP].view(-1)[place] = float("nan")
        tensors[UP].view(-1)[place + 1] = float("inf")

    spoiled = changed(copied("llama"), spoil)
    assert compare(sketch(spoiled), spoiled).verdict == EXACT
    assert compare(sketch(spoiled), base_of("llama")).verdict == OTHER
    assert compare(sketch(base_of("llama")), spoiled).verdict == OTHER


def test_a_tensor_that_is_not_there_cannot_be_sketched(base_of: BaseOf) -> None:
    with pytest.raises(NotFoundError, match=r"no tensor absent\.weight"):
        sketch(base_of("llama"), ["absent.weight"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-4],
        lambda data: data.replace(b'"version":"1"', b'"version":"9"'),
        lambda data: data.replace(b"[128,64]", b"[128,-4]"),
        lambda data: data.replace(b"[128,64]", b"[1,1,64]"),
        lambda data: data.replace(b"shapes", b"forgot"),
        lambda data: b"",
    ],
)
def test_a_damaged_sketch_is_refused(
    damage: Callable[[bytes], bytes], base_of: BaseOf
) -> None:
    good = sketch(base_of("llama"))
    assert parse_sketch(good)[UP][0] == (128, 64)
    with pytest.raises(DamagedError):
        compare(damage(good), base_of("llama"))

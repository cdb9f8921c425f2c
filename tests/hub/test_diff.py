"""What diff says of two adapters, compared with dense maths and with what was changed."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from adapterkit.hub.diff import Change, diff
from adapterkit.registry import DamagedError, Registry

KEY = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"


def dense(folder, scale):
    """module -> s B A, in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for layer in (0, 1):
        for name in "qv":
            a, b = (tensors[KEY.format(layer, name, role)].astype(np.float64) for role in "AB")
            found[f"model.layers.{layer}.self_attn.{name}_proj"] = scale * b @ a
    return found


def parts(found):
    return {(m.module, m.part): m for m in found.modules}


def test_norms_distances_and_angles_are_those_of_the_dense_changes(make):
    def turned(tensors):
        for key, (dtype, shape, data) in tensors.items():
            values = np.frombuffer(data, "<f4").reshape(shape)
            tensors[key] = (dtype, shape, (values[::-1] * 1.5 + 0.01).astype("<f4").tobytes())

    one, two = make(), make(edit=turned, lora_alpha=4)
    found = diff(one, two)
    a, b = dense(one, 16 / 8), dense(two, 4 / 8)
    assert {m.module for m in found.modules} == set(a)
    for m in found.modules:
        x, y = a[m.module], b[m.module]
        want = [np.linalg.norm(v) for v in (x, y, x - y)]
        np.testing.assert_allclose([m.a, m.b, m.distance], want, rtol=1e-9)
        np.testing.assert_allclose(m.cosine, (x * y).sum() / want[0] / want[1], atol=1e-9)
        assert not m.needs_base
    stacked = [np.concatenate([v.ravel() for v in d.values()]) for d in (a, b)]
    total = [np.linalg.norm(v) for v in (*stacked, stacked[0] - stacked[1])]
    np.testing.assert_allclose([found.total.a, found.total.b, found.total.distance], total)
    assert found.config == (Change("config.lora_alpha", 16, 4),)


def test_an_adapter_does_not_differ_from_itself(make):
    found = diff(make(), make())
    assert found.config == found.metrics == ()
    assert {m.distance for m in found.modules} == {0.0} == {found.total.distance}
    assert min(m.cosine for m in found.modules) > 1 - 1e-12


def test_scaling_b_is_the_same_as_alpha(make):
    def doubled(tensors):
        for key, (dtype, shape, data) in tensors.items():
            factor = 2 if "lora_B" in key else 1
            tensors[key] = (dtype, shape, (np.frombuffer(data, "<f4") * factor).tobytes())

    found = diff(make(edit=doubled), make(lora_alpha=32))
    assert found.total.distance < 1e-6 * found.total.a


def test_what_only_one_has_counts_in_full(fixtures):
    found = diff(fixtures / "cases/llama.lora_qv/adapter", fixtures / "cases/llama.dora/adapter")
    only = parts(found)["model.layers.0.mlp.down_proj", "weight"]
    assert only.a == 0 and only.b == only.distance > 0 and only.cosine is None
    targets = ["q_proj", "v_proj"], ["down_proj", "q_proj", "v_proj"]
    assert Change("targets", *targets) in found.config


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("llama.dora", "magnitude"),
        ("llama.lora_modules_to_save", "replaced weight"),
        ("llama.lora_tokens", "replaced rows 79, 200, 202, 203"),
        ("llama.trainable_tokens", "replaced rows 79, 200, 202, 203"),
    ],
)
def test_what_needs_the_base_is_named_never_dropped(fixtures, case, named):
    folder = fixtures / "cases" / case / "adapter"
    whole = [m for m in diff(folder, folder).modules if m.part == named]
    assert whole and all(m.needs_base and m.a is m.b is None for m in whole)
    assert {m.distance for m in whole} == {0.0}
    found = diff(folder, fixtures / "cases/llama.lora_qv/adapter")
    assert found.total.needs_base
    assert all(m.distance is None for m in found.modules if m.part == named)


def test_every_tensor_of_every_case_has_a_part(fixtures):
    """Whatever the kind: a module of the file never goes missing in the comparison."""
    from adapterkit.hub.read import read_adapter
    from adapterkit.hub.sources import open_folder
    from adapterkit.registry import AdapterError

    compared = 0
    for folder in sorted((fixtures / "cases").glob("llama*/adapter")):
        try:
            adapter = read_adapter(open_folder(folder))
            adapter.require_sound()
        except AdapterError:
            continue  # a kind that is not supported, or made wrong on purpose
        places = {*adapter.modules, *([""] if adapter.shared else [])}
        assert places == {m.module for m in diff(folder, folder).modules}
        compared += 1
    assert compared >= 5


def test_ranks_and_metrics_of_versions(fixtures, make, tmp_path):
    from adapterkit.hub import ingest

    with Registry(tmp_path / "home") as registry:
        ingest.add(registry, make(), "sql", metrics={"loss": 0.5, "acc": 1.0})
        ingest.add(registry, fixtures / "cases/llama.dora/adapter", "sql", metrics={"loss": 0.25})
        found = diff("sql@1.0", "sql", registry)
    assert (found.a, found.b) == ("sql@1.0", "sql@1.1")
    assert found.metrics == (Change("acc", 1.0, None), Change("loss", 0.5, 0.25))
    assert Change("ranks", {"8": 4}, {"4": 6}) in found.config


def test_shapes_that_do_not_go_together_have_no_distance(make):
    def taller(tensors):
        for key, (dtype, shape, data) in tensors.items():
            if "0.self_attn.q_proj.lora_B" in key:
                tensors[key] = (dtype, [2 * shape[0], shape[1]], data * 2)

    found = diff(make(), make(edit=taller))
    odd = parts(found)["model.layers.0.self_attn.q_proj", "weight"]
    assert odd.distance is odd.cosine is None and odd.a and odd.b
    assert found.total.distance is None and found.total.a < found.total.b
    others = [m.distance for m in found.modules if m != odd]
    assert others == [0.0] * 3


def test_values_that_are_not_finite_are_refused(make):
    def broken(tensors):
        key = next(iter(tensors))
        dtype, shape, data = tensors[key]
        tensors[key] = (dtype, shape, b"\0\0\xc0\x7f" + data[4:])

    with pytest.raises(DamagedError, match="not finite"):
        diff(make(), make(edit=broken))

"""What `add` stores, records, skips and refuses."""

from __future__ import annotations

import builtins
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterkit.hub import describe, ingest
from adapterkit.registry import Registry
from adapterkit.registry.errors import (
    AdapterError,
    DamagedError,
    InvalidError,
    MismatchError,
    NotFoundError,
)  # fmt: skip

Make = Callable[..., Path]
KEPT = {
    "adapter_config.json": "config", "adapter_model.safetensors": "weights",
    "tokenizer.json": "tokenizer", "tokenizer_config.json": "tokenizer",
    "special_tokens_map.json": "tokenizer", "vocab.json": "tokenizer", "merges.txt": "tokenizer",
    "tokenizer.model": "tokenizer", "added_tokens.json": "tokenizer", "spiece.model": "tokenizer",
    "chat_template.jinja": "chat-template", "README.md": "card", "LICENSE": "license",
    "LICENSE.txt": "license", "NOTICE": "license",
}  # fmt: skip
SKIPPED = (
    "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    "adapter_model.bin", ".gitattributes", "checkpoint-100/optimizer.pt",
    "checkpoint-100/adapter_config.json", "runs/x/events", "docs/README.md", "license", "x.py",
)  # fmt: skip


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "home") as opened:
        yield opened


def stored(home: Path) -> list[Path]:
    """Files of the registry that hold anything."""
    return [p for p in home.rglob("*") if p.is_file() and p.stat().st_size]


def fill(folder: Path) -> None:
    for name in (*KEPT, *SKIPPED):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            (folder / name).write_text(name)


def test_what_belongs_to_an_adapter_is_stored_and_the_rest_listed(
    registry: Registry, make: Make
) -> None:
    folder = make()
    fill(folder)
    done = ingest.add(registry, folder, "sql")
    manifest = registry.manifest("sql")
    assert {file.path: file.role for file in manifest.files} == KEPT
    inside = sum(len(name) for name in SKIPPED if name.startswith("checkpoint-100/"))
    assert dict(done.skipped)["checkpoint-100/"] == inside
    assert {name for name, _ in done.skipped} == {
        name if "/" not in name else name.split("/")[0] + "/" for name in SKIPPED
    }
    for path, blob in registry.files("sql").items():
        assert blob.read_bytes() == (folder / path).read_bytes()


def test_include_stores_more_by_pattern(registry: Registry, make: Make) -> None:
    folder = make()
    fill(folder)
    done = ingest.add(registry, folder, "sql", include=["*.py", "docs/*"])
    roles = {file.path: file.role for file in registry.manifest("sql").files}
    assert roles["x.py"] == roles["docs/README.md"] == "extra"
    assert "x.py" not in dict(done.skipped) and "optimizer.pt" in dict(done.skipped)


def test_what_is_skipped_is_never_opened(
    registry: Registry, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever opens a file in Python goes through an audit event or one of these three."""
    folder = make()
    fill(folder)
    opened: set[str] = set()

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *rest: Any, **named: Any) -> Any:
            opened.add(str(path))
            return function(path, *rest, **named)

        return wrapped

    monkeypatch.setattr(builtins, "open", note(builtins.open))
    monkeypatch.setattr(os, "open", note(os.open))
    monkeypatch.setattr("io.open", note(__import__("io").open))
    ingest.add(registry, folder, "sql")
    assert str(folder / "adapter_model.safetensors") in opened
    assert not {name for name in SKIPPED if str(folder / name) in opened}


def test_a_skipped_file_that_cannot_be_read_is_no_hindrance(registry: Registry, make: Make) -> None:
    """Opening this one would give text that ends the process of whoever unpickles it."""
    folder = make()
    (folder / "training_args.bin").write_bytes(b"cos\n_exit\n(I9\ntR.")
    with (folder / "optimizer.pt").open("wb") as file:
        file.truncate(1 << 40)  # reading it would take hours
    done = ingest.add(registry, folder, "sql")
    assert dict(done.skipped)["optimizer.pt"] == 1 << 40


def test_everything_the_files_say_is_recorded(
    registry: Registry, make: Make, fixtures: Path
) -> None:
    folder = make(
        alpha_pattern={"v_proj": 3}, revision="abc", peft_version="0.21.2", brand_new=None,
    )  # fmt: skip
    base = fixtures / "bases" / "llama_nf4_double"
    done = ingest.add(
        registry, folder, "sql", base=base, weights=True, metrics={"loss": 0.5}, note="first",
        tags=["prod"],
    )  # fmt: skip
    manifest = registry.manifest("sql:prod")
    adapter: dict[str, Any] = dict(manifest.adapter)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert adapter["kind"] == "lora" and adapter["variant"] == "LoRA"
    assert (adapter["rank"], adapter["ranks"]) == (8, {"8": 4})
    assert adapter["alphas"] == sorted([3, config["lora_alpha"]])
    assert adapter["target_modules"] == ["q_proj", "v_proj"] and adapter["writer"] == "0.21.2"
    assert adapter["tensors"]["count"] == 8 and adapter["tensors"]["dtypes"] == {"F32": 8}
    assert adapter["tensors"]["root"].startswith("sha256:")
    assert adapter["unknown_fields"] == {"brand_new": None}
    recorded: dict[str, Any] = dict(manifest.base or {})
    assert (recorded["id"], recorded["revision"]) == ("bases/llama", "abc")
    for name in ("layout", "files", "tensors", "touched"):
        assert len(recorded[name]["root"]) == len("sha256:") + 64
    assert len(registry.blob(recorded["sketch"]["digest"].removeprefix("sha256:")).read_bytes()) > 0
    assert (manifest.quantization or {})["trained_on"]["method"] == "nf4"
    assert (manifest.quantization or {})["trained_on"]["double_quant"] is True
    assert registry.metrics("sql") == {"loss": 0.5}
    assert {a.kind for a in registry.attachments("sql")} == {"metrics", "note"}
    assert describe("sql", registry).record() == adapter == done.info.record()


def test_adding_again_stores_nothing_new(registry: Registry, make: Make, fixtures: Path) -> None:
    first = ingest.add(registry, make(), "sql", base=fixtures / "bases" / "llama")
    before = {p: p.stat().st_mtime_ns for p in (registry.home.path / "blobs").rglob("*")}
    again = ingest.add(registry, make(), "sql", base=fixtures / "bases" / "llama")
    assert (first.added.created, again.added.created) == (True, False)
    assert (again.added.id, again.added.ref, again.added.new_bytes) == (
        first.added.id, first.added.ref, 0,
    )  # fmt: skip
    assert before == {p: p.stat().st_mtime_ns for p in (registry.home.path / "blobs").rglob("*")}


def test_the_same_tensors_have_the_same_root_whatever_the_file_looks_like(make: Make) -> None:
    turned = make(edit=lambda t: dict(reversed(t.items())))
    renamed = make(edit=lambda t: {k.replace("weight", "default.weight"): t[k] for k in t})
    assert describe(make()).root == describe(turned).root == describe(renamed).root
    other = make(edit=lambda t: {k: (d, s, bytes(len(b))) for k, (d, s, b) in t.items()})
    assert describe(other).root != describe(make()).root


def test_values_that_are_not_finite_are_refused(registry: Registry, make: Make) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        key = next(k for k in tensors if "lora_B" in k)
        dtype, shape, data = tensors[key]
        tensors[key] = dtype, shape, b"\0\0\xc0\x7f" + data[4:]

    folder = make(edit=edit, brand_new=1)
    with pytest.raises(DamagedError, match=r"lora_B.*NaN or Inf") as caught:
        ingest.add(registry, folder, "sql")
    assert "brand_new" in str(caught.value)
    assert not stored(registry.home.path)


@pytest.mark.parametrize(("dtype", "infinity"), [("F32", "0000807f"), ("BF16", "807f")])
def test_no_value_of_a_large_tensor_is_passed_over(
    registry: Registry, make: Make, dtype: str, infinity: str
) -> None:
    """It is looked at in pieces, the last of which is a small one."""
    bad = bytes.fromhex(infinity)
    n_values = 100_000 + 8

    def edit(tensors: dict[str, Any]) -> None:
        key = next(k for k in tensors if "lora_A" in k)
        (rank, _), data = tensors[key][1], bytearray(n_values * 8 * len(bad))
        for at in (0, 32_767, 65_536, n_values, len(data) // len(bad) - 1):
            data[at * len(bad) : (at + 1) * len(bad)] = bad
        tensors[key] = dtype, [rank, n_values * 8 // rank], bytes(data)

    with pytest.raises(DamagedError, match=r"lora_A.* 5 that are NaN or Inf"):
        ingest.add(registry, make(edit=edit), "sql")


def test_an_adapter_without_effect_is_stored_with_a_warning(
    registry: Registry, make: Make
) -> None:
    def edit(tensors: dict[str, Any]) -> dict[str, Any]:
        return {k: (d, s, bytes(len(b)) if "B" in k else b) for k, (d, s, b) in tensors.items()}

    done = ingest.add(registry, make(edit=edit), "sql")
    assert [w.code for w in done.warnings] == ["no-effect"]


def test_unknown_fields_are_refused_or_land_in_the_manifest(
    registry: Registry, make: Make
) -> None:
    folder = make(brand_new={"deep": [1, 2**70, float("nan")]}, harmless=[])
    with pytest.raises(DamagedError, match="brand_new"):
        ingest.add(registry, folder, "sql")
    assert not stored(registry.home.path)
    done = ingest.add(registry, folder, "sql", allow_fields=["brand_new"])
    kept = registry.manifest("sql").adapter["unknown_fields"]
    assert kept == {"brand_new": repr({"deep": [1, 2**70, float("nan")]}), "harmless": []}
    assert [w.tensor for w in done.warnings] == ["brand_new", "harmless"]


def sums(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    path = folder / "adapter_model.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return [{"path": path.name, "sha256": digest, "size": path.stat().st_size} | changes]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"sha256": "0" * 64}, "adapter_model.safetensors does not have the sha256 checksum"),
        ({"sha256": None}, None),
        ({"sha256": 5}, "sha256 checksum"),
        ({"size": 1}, "adapter_model.safetensors has size .*, listed as 1"),
        ({"path": "gone.txt"}, "gone.txt is listed and missing"),
        ({"path": "../x"}, "'../x' leads outside"),
        ({"path": "/etc/passwd"}, "leads outside"),
        ({"path": "a/../../x"}, "leads outside"),
        ({"path": "..\\x"}, "leads outside"),
        ({"path": "C:\\x"}, "leads outside"),
        ({"path": "a\0b"}, "leads outside"),
        ({"path": ""}, "leads outside"),
        ({"path": 5}, "leads outside"),
    ],
)
def test_a_list_of_sums_in_the_folder_is_held_against_its_files(
    registry: Registry, make: Make, change: dict[str, Any], message: str | None
) -> None:
    folder = make()
    (folder / "manifest.json").write_text(json.dumps({"files": sums(folder, **change)}))
    if message is None:
        ingest.add(registry, folder, "sql")
        return
    with pytest.raises(DamagedError, match=message):
        ingest.add(registry, folder, "sql")
    assert not stored(registry.home.path)


def test_sums_in_capitals_are_sums(registry: Registry, make: Make) -> None:
    folder = make()
    row = sums(folder)[0]
    row["sha256"] = row["sha256"].upper()
    (folder / "manifest.json").write_text(json.dumps({"files": [row]}))
    ingest.add(registry, folder, "sql")


def test_another_kind_of_manifest_is_left_alone(registry: Registry, make: Make) -> None:
    for other in ({"files": "x"}, {"files": ["a.txt"]}, {"name": "a web app"}):
        folder = make()
        (folder / "manifest.json").write_text(json.dumps(other))
        ingest.add(registry, folder, "sql")


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "link": lambda f: (f / "x").symlink_to("/etc/passwd"),
    "pipe": lambda f: os.mkfifo(f / "x"),
    "pickle": lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
    "cut": lambda f: os.truncate(f / "adapter_model.safetensors", 9000),
    "empty": lambda f: (f / "adapter_model.safetensors").write_bytes(b""),
    "no config": lambda f: (f / "adapter_config.json").unlink(),
    "config": lambda f: (f / "adapter_config.json").write_text("[]"),
    "manifest": lambda f: (f / "manifest.json").write_text("{"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_leaves_no_file_in_the_registry(
    registry: Registry, make: Make, name: str
) -> None:
    folder = make()
    HOSTILE[name](folder)
    with pytest.raises(AdapterError) as caught:
        ingest.add(registry, folder, "sql")
    assert isinstance(caught.value, DamagedError | NotFoundError)
    assert not stored(registry.home.path)


def test_an_adapter_of_another_base_is_refused_with_every_reason(
    registry: Registry, make: Make, fixtures: Path
) -> None:
    with pytest.raises(MismatchError) as caught:
        ingest.add(registry, make(), "sql", base=fixtures / "bases" / "llama_wide")
    assert str(caught.value).count("shape-mismatch") == 6
    assert not stored(registry.home.path)


def test_faults_with_and_without_the_base_are_said_together(
    registry: Registry, make: Make, fixtures: Path
) -> None:
    with pytest.raises(DamagedError) as caught:
        ingest.add(registry, make(brand_new=1), "sql", base=fixtures / "bases" / "llama_wide")
    assert "brand_new" in str(caught.value) and "shape-mismatch" in str(caught.value)


def test_a_base_that_is_not_there_is_not_found(registry: Registry, make: Make) -> None:
    with pytest.raises(NotFoundError):
        ingest.add(registry, make(), "sql", base=Path("/nothing"))
    assert not stored(registry.home.path)


def test_odd_options_are_invalid(registry: Registry, make: Make) -> None:
    with pytest.raises(InvalidError, match="trained_on is 'nf5'"):
        ingest.add(registry, make(), "sql", trained_on="nf5")
    with pytest.raises(InvalidError, match="loss"):
        ingest.add(registry, make(), "sql", metrics={"loss": float("nan")})
    assert not stored(registry.home.path)


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8", "none"])
def test_how_the_base_was_quantized_in_training_can_be_said(
    registry: Registry, make: Make, method: str
) -> None:
    ingest.add(registry, make(), "sql", trained_on=method)
    assert registry.manifest("sql").quantization == {"trained_on": {"method": method}}
    assert describe("sql", registry).trained_on == {"method": method}


def test_a_dense_base_says_nothing_about_training(
    registry: Registry, make: Make, fixtures: Path
) -> None:
    ingest.add(registry, make(), "sql", base=fixtures / "bases" / "llama")
    assert registry.manifest("sql").quantization is None

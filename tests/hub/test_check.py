"""`check`: the verdict, its exit code, and how little is read for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from adapterkit.cli.main import main
from adapterkit.hub import check, exit_code, ingest
from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.folder import read_base
from adapterkit.hub.check import judge
from adapterkit.hub.findings import (
    ERROR,
    FITS,
    IDENTICAL,
    INCOMPATIBLE,
    OTHER_WEIGHTS,
    QUANTIZED_DIFFERENTLY,
    SAME_CAST,
    UNKNOWN,
    WARNING,
    Finding,
    Report,
    clean,
    listing,
)  # fmt: skip
from adapterkit.hub.headers import read_header
from adapterkit.hub.identity import Identity
from adapterkit.hub.locate import locate
from adapterkit.hub.sources import Folder
from adapterkit.registry import Registry
from adapterkit.registry.errors import DamagedError, InvalidError, NotFoundError
from adapterkit.registry.manifest import Manifest

Make = Callable[..., Path]
Bases = Callable[[str], Base]
P = "base_model.model."


@pytest.mark.parametrize(
    ("verdict", "code", "strict"),
    [
        (IDENTICAL, 0, 0),
        (SAME_CAST, 0, 0),
        (QUANTIZED_DIFFERENTLY, 0, 6),
        (FITS, 0, 6),
        (OTHER_WEIGHTS, 6, 6),
        (INCOMPATIBLE, 6, 6),
    ],
)
def test_every_verdict_has_its_exit_code(verdict: str, code: int, strict: int) -> None:
    report = Report(verdict, (), "none")
    assert (exit_code(report), exit_code(report, strict=True)) == (code, strict)


@pytest.mark.parametrize("failure", [3, 5, 7])
def test_an_unknown_adapter_is_never_good(failure: int) -> None:
    report = Report(UNKNOWN, (), "none", failure=failure)
    assert (exit_code(report), exit_code(report, strict=True)) == (failure, failure)


def test_an_adapter_without_a_recorded_base_fits_with_a_doubt(make: Make, llama: Base) -> None:
    report = check(make(), base=llama)
    (doubt,) = report.findings
    assert (report.verdict, report.level) == (FITS, "none")
    assert (doubt.severity, doubt.code) == (WARNING, "base-not-recorded")
    assert "--base BASE" in doubt.hint


def test_what_does_not_fit_is_incompatible_with_every_reason(make: Make, base_of: Bases) -> None:
    report = check(make(brand_new=1), base=base_of("llama_wide"))
    assert report.verdict == INCOMPATIBLE
    assert {f.code for f in report.errors} == {"shape-mismatch", "unknown-field"}
    assert list(report.findings) == sorted(report.findings)


def test_a_field_can_be_allowed(make: Make, llama: Base) -> None:
    folder = make(brand_new=1)
    assert check(folder, base=llama).verdict == INCOMPATIBLE
    assert check(folder, base=llama, allow_fields=["brand_new"]).verdict == FITS


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"r": "4"}, 5),
        ({"peft_type": "XLORA"}, 3),
        ({"peft_type": ["LORA"]}, 3),
        ({"target_modules": "("}, 5),
        ({"target_modules": "[a-z]{999999999}"}, 5),
    ],
)
def test_an_unreadable_adapter_is_unknown_and_says_why(
    make: Make, llama: Base, change: dict[str, Any], code: int
) -> None:
    report = check(make(**change), base=llama)
    (finding,) = report.findings
    assert (report.verdict, exit_code(report), finding.code) == (UNKNOWN, code, "unreadable")
    assert str(next(iter(change))) in str(finding) or "XLORA" in str(finding)


def test_every_fault_of_a_damaged_header_reaches_the_report(make: Make, llama: Base) -> None:
    folder = make(edit=lambda t: {k: ("F99", s, b) for k, (_, s, b) in t.items()})
    report = check(folder, base=llama)
    assert str(report.findings[0]).count("unknown dtype 'F99'") == 8


def test_what_is_not_there_is_unknown(tmp_path: Path, llama: Base) -> None:
    report = check(tmp_path / "nothing", base=llama)
    assert (report.verdict, exit_code(report)) == (UNKNOWN, 3)


def test_a_base_that_cannot_be_read_raises(make: Make, tmp_path: Path, fixtures: Path) -> None:
    with pytest.raises(NotFoundError):
        check(make(), base=tmp_path / "nothing")
    with pytest.raises(NotFoundError, match="is not a base model"):
        check(make(), base=fixtures / "cases" / "llama.lora_qv" / "adapter")


def test_a_quantization_that_does_not_exist_raises(make: Make, llama: Base) -> None:
    with pytest.raises(InvalidError, match="quantization is 'nf5', expected one of none, nf4"):
        check(make(), base=llama, quantization="nf5")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_values_that_are_not_finite_are_caught_when_values_are_read(
    make: Make, llama: Base, dtype: str, value: float
) -> None:
    import torch

    types = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    key = f"{P}model.layers.0.self_attn.q_proj.lora_B.weight"

    def edit(tensors: dict[str, Any]) -> None:
        _, shape, _ = tensors[key]
        filled = torch.zeros(shape, dtype=types.get(dtype, torch.float64))
        filled[3, 1] = value
        tensors[key] = dtype, shape, filled.view(torch.uint8).numpy().tobytes()

    folder = make(edit=edit)
    assert check(folder, base=llama).verdict == FITS
    report = check(folder, base=llama, deep=True)
    (error,) = report.errors
    assert (report.verdict, error.code, error.tensor) == (INCOMPATIBLE, "not-finite", key)
    assert error.found == "1 that are NaN or Inf"


def test_factors_of_nothing_but_zeros_are_a_doubt_when_values_are_read(
    make: Make, llama: Base
) -> None:
    def edit(tensors: dict[str, Any]) -> dict[str, Any]:
        return {k: (d, s, bytes(len(b)) if "B" in k else b) for k, (d, s, b) in tensors.items()}

    report = check(make(edit=edit), base=llama, deep=True)
    assert report.verdict == FITS
    assert {f.code for f in report.warnings} == {"no-effect", "base-not-recorded"}


def test_of_weights_nothing_is_read_unless_asked_for(
    make: Make, fixtures: Path, counted: Callable[[Folder], tuple[Folder, list[Any]]]
) -> None:
    from adapterkit.hub.bases.folder import open_base

    base_folder, base_reads = counted(open_base(fixtures / "bases" / "llama"))
    folder, reads = counted(locate(make()))
    base = read_base(base_folder)
    report = check(folder, base=base)
    assert report.verdict == FITS
    weights = read_header(folder.files["adapter_model.safetensors"]).tensors
    for name, tensors, seen in (
        ("model.safetensors", base.tensors, base_reads),
        ("adapter_model.safetensors", weights, reads),
    ):
        start = min(tensor.start for tensor in tensors.values())
        touched = [row for row in seen if row[0] == name]
        assert touched and all(first + size <= start for _, first, size in touched)
    reads.clear()
    check(folder, base=base, deep=True)
    assert sum(size for name, _, size in reads if name.endswith(".safetensors")) > 15_000


def stored(method: str | None) -> Folder:
    quantization = None if method is None else {"trained_on": {"method": method}}
    return Folder("x@1.0", {}, manifest=Manifest((), {}, None, quantization))


@pytest.mark.parametrize(
    ("trained", "planned", "base", "differs"),
    [
        ("nf4", "nf4", "llama", False),
        ("nf4", None, "llama_nf4_double", False),
        ("nf4", "int8", "llama", True),
        ("nf4", None, "llama_int8", True),
        ("nf4", "none", "llama", True),
        ("nf4", None, "llama", False),  # how it will be loaded is not known
        ("none", "nf4", "llama", True),
        ("none", None, "llama", False),
        (None, "nf4", "llama", False),
        (None, "int8", "llama_nf4_double", True),  # it cannot be
        (None, "none", "llama_nf4_double", True),
    ],
)
def test_another_quantization_than_in_training_is_a_doubt(
    base_of: Bases, trained: str | None, planned: str | None, base: str, differs: bool
) -> None:
    identity = Identity(IDENTICAL, "touched", ())
    report = judge(stored(trained), base_of(base), [], identity, planned)
    assert report.verdict == (QUANTIZED_DIFFERENTLY if differs else IDENTICAL)
    assert [f.code for f in report.findings] == [QUANTIZED_DIFFERENTLY] * differs
    assert exit_code(report) == 0 and exit_code(report, strict=True) == 6 * differs


def test_other_weights_are_worse_than_another_quantization(base_of: Bases) -> None:
    identity = Identity(OTHER_WEIGHTS, "sketch", ())
    assert judge(stored("nf4"), base_of("llama"), [], identity, "int8").verdict == OTHER_WEIGHTS
    fault = Finding(ERROR, "x", "y")
    assert judge(stored("nf4"), base_of("llama"), [fault], identity, None).verdict == INCOMPATIBLE


@pytest.mark.parametrize("odd", ["nf4", 5, None, [], {}, {"method": 5}])
def test_an_odd_record_of_quantization_breaks_nothing(base_of: Bases, odd: Any) -> None:
    folder = Folder("x@1.0", {}, manifest=Manifest((), {}, None, {"trained_on": odd}))
    identity = Identity(FITS, "none", ())
    assert judge(folder, base_of("llama"), [], identity, None).verdict == FITS


def test_a_version_of_the_registry_is_checked_by_its_reference(
    make: Make, fixtures: Path, tmp_path: Path, llama: Base
) -> None:
    with Registry(tmp_path / "home") as registry:
        ingest.add(registry, make(), "team/sql", tags=["prod"])
        for ref in ("team/sql", "team/sql@1.0", "team/sql:prod"):
            report = check(ref, base=llama, registry=registry)
            assert (report.verdict, report.source) == (FITS, "team/sql@1.0")
        wrong = {"team/other": 3, "team/sql@2.0": 3, "hf://acme/sql": 2, "a//b": 2}
        for ref, code in wrong.items():
            report = check(ref, base=llama, registry=registry)
            assert (report.verdict, exit_code(report)) == (UNKNOWN, code)


def test_a_damaged_blob_is_unknown(make: Make, tmp_path: Path, llama: Base) -> None:
    with Registry(tmp_path / "home") as registry:
        ingest.add(registry, make(), "sql")
        blob = registry.files("sql")["adapter_model.safetensors"]
        blob.chmod(0o644)
        blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
        report = check("sql", base=llama, registry=registry)
    assert (report.verdict, exit_code(report)) == (UNKNOWN, 5)


def test_the_command_exits_with_the_largest_code_of_all(make: Make, fixtures: Path) -> None:
    base = fixtures / "bases" / "llama"

    def code(*sources: Path, options: tuple[str, ...] = ()) -> int:
        texts = [str(source) for source in sources]
        return CliRunner().invoke(main, ["check", *texts, "--base", str(base), *options]).exit_code

    good, damaged, misfit = make(), make(r="4"), make(target_modules=["nothing"])
    assert code(good) == 0
    assert code(good, options=("--strict",)) == 6
    assert code(good, damaged) == 5
    assert code(damaged, misfit, good) == 6
    assert code(good, good.parent / "gone") == 3


def test_a_sketch_that_is_damaged_says_so(make: Make, llama: Base, tmp_path: Path) -> None:
    from adapterkit.hub.sources import FileSource

    (tmp_path / "sketch").write_bytes(b"nonsense" * 4)
    folder = locate(make())
    sketch = FileSource.open(tmp_path / "sketch", "the sketch of the base")
    folder = Folder(folder.name, folder.files, folder.root, None, sketch)
    with pytest.raises(DamagedError, match="sketch"):
        check(folder, base=llama)


def test_findings_are_printed_safely_and_shortly() -> None:
    long = "n" * 9000
    finding = Finding(ERROR, "x", "t\x1b[31m" + long, long, "f\u202e" * 9000, long)
    text = listing([finding])
    assert "\x1b" not in text and "\u202e" not in text and len(text) < 2000
    assert listing([Finding(ERROR, "x", f"t{i}") for i in range(100)]).endswith("and 60 more")


def test_cleaning_is_quick_and_keeps_both_ends() -> None:
    assert clean("a\nb\u200b") == "a\\nb\\u200b"
    assert clean("plain text") == "plain text"
    text = clean("s" + "\x00" * 50_000_000 + "e", 50)
    assert text.startswith("s\\x00") and text.endswith("e") and len(text) <= 50


@pytest.mark.parametrize("name", ["", None, "~nobody-here/x", "n" * 300, "a\0b", "no/such", "./no"])
def test_a_base_an_adapter_names_and_that_is_not_here_is_not_found(
    make: Make, name: str | None
) -> None:
    folder = make(base_model_name_or_path=name)
    done = CliRunner().invoke(main, ["check", str(folder)], catch_exceptions=False)
    assert done.exit_code == 3 and "give --base BASE" in done.output
    if name and "\0" not in name:
        typed = CliRunner().invoke(main, ["check", str(folder), "--base", name])
        assert typed.exit_code in (2, 3) and "Error: " in typed.output


def test_a_base_an_adapter_names_and_that_is_here_is_used(
    make: Make, fixtures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(fixtures)  # the fixtures name their bases relative to it
    done = CliRunner().invoke(main, ["check", str(make())], catch_exceptions=False)
    assert done.exit_code == 0 and "bases/llama: fits" in done.output

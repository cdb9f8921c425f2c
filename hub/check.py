"""Does this adapter belong to this base?  From headers and a few short reads; no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import METHODS, Base
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
)
from adapterkit.hub.fit import OTHER_NAME, fit
from adapterkit.hub.identity import Compare, Identity, identify
from adapterkit.hub.locate import Opener, Source, locate
from adapterkit.hub.read import read_adapter
from adapterkit.hub.recipes import is_recipe
from adapterkit.hub.sources import Folder
from adapterkit.hub.task import doubt, for_task
from adapterkit.hub.unfold import unfold
from adapterkit.registry.errors import AdapterError, InvalidError, MismatchError

# Of verdicts, and of levels of comparison, for several adapters together.
WORSE = (
    IDENTICAL, SAME_CAST, QUANTIZED_DIFFERENTLY, FITS, OTHER_WEIGHTS, INCOMPATIBLE, UNKNOWN,
)  # fmt: skip
STRONGER = ("none", "layout", "sketch", "touched")


def check(
    source: Source,
    *,
    base: str | Path | Base,
    quantization: str | None = None,
    deep: bool = False,
    allow_fields: Collection[str] = (),
    registry: Opener | None = None,
) -> Report:
    """Everything that speaks against using the adapter on the base, and the verdict.

    base: a model folder, a Hub id in the local cache, or a description read before.
    quantization: nf4, fp4, int8 or none: how the base will be loaded; as it is stored when None.
    deep: read values too: not-a-number in the adapter, every touched tensor of the base.
    An adapter that cannot be read is a report with verdict `unknown`; a base that cannot be read
    raises. Of a recipe every part is checked; the verdict is the worst.
    """
    if quantization not in (None, *METHODS):
        choices = ", ".join(METHODS)
        raise InvalidError(f"quantization is {quantization!r}, expected one of {choices}")
    described = base if isinstance(base, Base) else _read(base)
    try:
        folder = locate(source, registry)
        if is_recipe(folder):
            one = partial(check, quantization=quantization, deep=deep, allow_fields=allow_fields)
            leaves = unfold(folder, registry).leaves
            reports = {leaf.label: one(leaf.folder, base=described) for leaf in leaves}
            return _together(folder, described, reports)
        adapter = read_adapter(folder, allow_fields)
        doubts = doubt(adapter, described)
        described = for_task(described, adapter)
        findings = fit(adapter, described) + doubts  # raises when a pattern takes too long
        findings += _values(adapter) if deep else []
    except AdapterError as error:
        return _unreadable(str(source), described.name, error)
    broken = any(finding.severity == ERROR for finding in findings)
    identity = Identity(FITS, "none", ()) if broken else identify(folder, described, deep=deep)
    return judge(folder, described, findings, identity, quantization)


def _together(folder: Folder, base: Base, reports: Mapping[str, Report]) -> Report:
    """Of a recipe: the worst of its parts, and what is said of each."""
    every = [
        replace(finding, tensor=f"{label}: {finding.tensor}")
        for label, report in reports.items()
        for finding in report.findings
    ]
    worst = max((report.verdict for report in reports.values()), key=WORSE.index)
    level = min((report.level for report in reports.values()), key=STRONGER.index)
    failure = max(report.failure for report in reports.values())
    found = Report(worst, tuple(sorted(every)), level, folder.name, base.name)
    return replace(found, failure=failure)


def judge(
    folder: Folder,
    base: Base,
    findings: Collection[Finding],
    identity: Identity,
    quantization: str | None,
) -> Report:
    """The verdict over what `fit` and `identify` saw."""
    every = {*findings, *identity.findings}
    level = identity.level
    if any(finding.severity == ERROR for finding in findings):
        return Report(INCOMPATIBLE, tuple(sorted(every)), level, folder.name, base.name)
    verdict = identity.verdict
    if verdict in (IDENTICAL, SAME_CAST):  # the weights are known, so that a name says nothing
        every = {finding for finding in every if finding.code != OTHER_NAME}
    doubt = _quantized_differently(folder, base, quantization)
    if doubt is not None and verdict != OTHER_WEIGHTS:
        every.add(doubt)
        verdict = QUANTIZED_DIFFERENTLY
    return Report(verdict, tuple(sorted(every)), level, folder.name, base.name)


def _quantized_differently(folder: Folder, base: Base, planned: str | None) -> Finding | None:
    recorded = (folder.manifest.quantization or {}) if folder.manifest is not None else {}
    trained_on = recorded.get("trained_on")
    trained = trained_on.get("method") if isinstance(trained_on, dict) else None
    stored = base.quantization.method
    if planned is not None and stored not in ("none", planned):
        about = f"stored as {stored}, which cannot be loaded as {planned}"
        return Finding(WARNING, QUANTIZED_DIFFERENTLY, "quantization", planned, about)
    here = planned or (stored if stored != "none" else None)
    if trained is None or here is None or trained == here:
        return None
    hint = f"trained on {trained}: load the base with quantization={trained!r}"
    return Finding(WARNING, QUANTIZED_DIFFERENTLY, "quantization", str(trained), here, hint)


def exit_code(report: Report, *, strict: bool = False) -> int:
    """0 good, 6 does not fit; 3, 5 or 7 when the adapter could not be read."""
    if report.verdict == UNKNOWN:
        return report.failure
    if report.verdict in (INCOMPATIBLE, OTHER_WEIGHTS):
        return MismatchError.exit_code
    doubtful = report.verdict in (FITS, QUANTIZED_DIFFERENTLY)
    return MismatchError.exit_code if strict and doubtful else 0


def _read(base: str | Path) -> Base:
    from adapterkit.hub.bases.folder import find_base, read_base

    return read_base(base if isinstance(base, Path) else find_base(base))


def _values(adapter: Adapter) -> list[Finding]:
    from adapterkit.hub.values import check_values

    return check_values(adapter)


def _unreadable(source: str, base: str, error: AdapterError) -> Report:
    finding = Finding(ERROR, "unreadable", str(error), hint=error.hint or "")
    report = Report(UNKNOWN, (finding,), "none", source, base)
    return replace(report, failure=error.exit_code)


__all__ = ["Compare", "check", "exit_code", "judge"]

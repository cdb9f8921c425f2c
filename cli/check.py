"""adapter check"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli import hints as hinted
from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import count, emit, finding_record, say
from adapterkit.hub.findings import ERROR, INFO, UNKNOWN, Finding, Report
from adapterkit.registry.errors import AdapterError, NotFoundError

if TYPE_CHECKING:
    from adapterkit.hub.bases.base import Base
    from adapterkit.hub.locate import Source

# Findings of one adapter that are printed; a wrong base has one for each of its tensors.
MOST = 40
# A verdict, in words.
MEANINGS = {
    "identical": "fits: the weights it was trained on, byte for byte",
    "same-weights-cast": "fits: the weights it was trained on",
    "quantized-differently": "fits, but the base is quantized otherwise than in training",
    "fits": "fits in shape; whether these are the weights it was trained on is not known",
    "other-weights": "does not fit: same shapes, other weights",
    "incompatible": "does not fit",
    "unknown": "cannot be read",
}


@click.command()
@click.argument("sources", metavar="SRC...", nargs=-1, required=True)
@click.option("--base", metavar="BASE", help="A folder or ORG/NAME.  [default: what SRC names]")
@click.option(
    "--quantization", type=click.Choice(["nf4", "fp4", "int8", "none"]),
    help="How the base will be loaded.  [default: as it is stored]",
)  # fmt: skip
@click.option("--deep", is_flag=True, help="Read all values: NaN, Inf, every touched weight.")
@click.option("--strict", is_flag=True, help="Let doubts count as not fitting.")
@click.option(
    "--allow-field", "allow_fields", metavar="NAME", multiple=True,
    help="Accept this config field although its meaning is unknown. Repeatable.",
)  # fmt: skip
@hinted.option
@click.option(
    "--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@pass_app
def command(
    app: App, sources: tuple[str, ...], base: str | None, quantization: str | None, deep: bool,
    strict: bool, allow_fields: tuple[str, ...], hints: dict[str, Any], form: str, as_json: bool,
) -> None:  # fmt: skip
    """Say whether adapters fit their base model.

    SRC is a folder (./tone) or a reference (team/sql@1.2). Everything that is wrong is said at
    once. Exit code 0: all fit. Otherwise the largest code of any: 6 does not fit, 5 damaged,
    3 not found.
    """
    from adapterkit.hub.check import check, exit_code
    from adapterkit.hub.locate import with_hints

    given = read(base) if base is not None else None
    reports = []
    for name in sources:
        try:
            source = with_hints(name, hints)
        except AdapterError as error:
            reports.append(failed(name, "unreadable", error))
            continue
        against = given or named_base(app, source, name)
        if isinstance(against, Report):
            reports.append(against)
            continue
        found = check(
            source, base=against, quantization=quantization, deep=deep, allow_fields=allow_fields,
            registry=lambda: app.registry,
        )  # fmt: skip
        reports.append(found)
    codes = [exit_code(report, strict=strict) for report in reports]
    if as_json or form == "json":
        pairs = zip(reports, codes, strict=True)
        emit({"exit_code": max(codes), "reports": [record(*pair) for pair in pairs]})
    else:
        for report in reports:
            tell(app, report)
    click.get_current_context().exit(max(codes))


def read(base: str | Path) -> Base:
    from adapterkit.hub.bases.folder import find_base, read_base

    return read_base(base if isinstance(base, Path) else find_base(base))


def named_base(app: App, source: Source, shown: str) -> Base | Report:
    """The base that the adapter names, or the report that says why there is none."""
    from adapterkit.hub.bases.folder import is_folder
    from adapterkit.hub.locate import locate
    from adapterkit.hub.read import read_adapter

    try:
        folder = locate(source, lambda: app.registry)
        recorded = (folder.manifest.base or {}).get("id") if folder.manifest else None
        name = str(recorded or read_adapter(folder).base_name or "")
    except AdapterError as error:
        return failed(shown, "unreadable", error)
    if not name:
        nameless = NotFoundError("it names no base", hint="give --base BASE")
        return failed(shown, "no-base", nameless)
    try:
        return read(Path(name) if is_folder(Path(name)) else name)
    except AdapterError as error:
        text = f"the base it names, {name!r}, is not here ({error})"
        return failed(shown, "no-base", NotFoundError(text, hint="give --base BASE"))


def failed(source: str, code: str, error: AdapterError) -> Report:
    finding = Finding(ERROR, code, str(error), hint=error.hint or "")
    return Report(UNKNOWN, (finding,), "none", source, failure=error.exit_code)


def record(report: Report, code: int) -> dict[str, Any]:
    return {
        "source": report.source,
        "base": report.base,
        "verdict": report.verdict,
        "level": report.level,
        "exit_code": code,
        "findings": [finding_record(finding) for finding in report.findings],
    }


def tell(app: App, report: Report) -> None:
    place = f" on {report.base}" if report.base else ""
    say(f"{report.source}{place}: {report.verdict}")
    say(f"  {MEANINGS[report.verdict]} (compared: {report.level})")
    shown = [f for f in report.findings if f.severity != INFO or app.detailed]
    rows = sorted(shown, key=lambda f: (f.severity != ERROR, f))
    most = len(rows) if app.detailed else MOST
    for finding in rows[:most]:
        say(f"  {finding.severity}: {finding}")
        if finding.hint:
            say(f"    hint: {finding.hint}")
    if rows[most:]:
        say(f"  ... and {len(rows) - most} more, shown by adapter -v check")
    if report.errors:
        say(f"  {count(len(report.errors), 'error')}")

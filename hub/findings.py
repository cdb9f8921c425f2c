"""What a check saw: findings, and the verdict over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ERROR, WARNING, INFO = "error", "warning", "info"

# Code of a finding about a feature this program does not have: nothing is damaged.
UNSUPPORTED = "unsupported"

IDENTICAL = "identical"
SAME_CAST = "same-weights-cast"
QUANTIZED_DIFFERENTLY = "quantized-differently"
FITS = "fits"
OTHER_WEIGHTS = "other-weights"
INCOMPATIBLE = "incompatible"
UNKNOWN = "unknown"

# Characters of the longest sentence that is shown whole.
SENTENCE = 8000


@dataclass(frozen=True, order=True)
class Finding:
    """One thing that is not as it should be.

    tensor: the tensor, module, config field or file it is about.
    expected, found: both sides of the comparison, ready to print.
    """

    severity: str
    code: str
    tensor: str
    expected: str = ""
    found: str = ""
    hint: str = ""

    def __str__(self) -> str:
        facts = [f"expected {clean(self.expected)}"] if self.expected else []
        facts += [f"found {clean(self.found)}"] if self.found else []
        if not facts:  # a sentence, such as an error with every fault of a file
            return f"{clean(self.tensor, SENTENCE)} [{self.code}]"
        return f"{clean(self.tensor)}: {', '.join(facts)} [{self.code}]"


@dataclass(frozen=True)
class Report:
    """The answer of `check`. level: the strongest comparison that was possible
    (`files`, `tensors`, `touched`, `sketch`, `layout` or `none`). failure: exit code when the
    verdict is unknown."""

    verdict: str
    findings: tuple[Finding, ...]
    level: str
    source: str = ""
    base: str = ""
    failure: int = 0

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == ERROR)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == WARNING)


def clean(text: str, limit: int = 200) -> str:
    """`text` safe to print: control and invisible characters escaped, the middle cut when long."""
    if len(text) > 2 * limit:  # of a text of megabytes only the ends are looked at
        text = text[:limit] + text[-limit:]
    shown = text
    if not text.isprintable():
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if len(shown) <= limit:
        return shown
    half = limit // 2 - 3
    return f"{shown[:half]} ... {shown[-half:]}"


def several(faults: Sequence[str], limit: int = 20) -> str:
    """Faults as one sentence; those past the limit are counted."""
    rest = [f"{len(faults) - limit} more"] if len(faults) > limit else []
    return "; ".join([*faults[:limit], *rest])


def listing(findings: Iterable[Finding], limit: int = 40) -> str:
    """The findings, one a line, sorted, errors first; the rest is counted."""
    rank = {ERROR: 0, WARNING: 1, INFO: 2}
    rows = sorted(set(findings), key=lambda f: (rank[f.severity], f))
    lines = [f"  {row.severity}: {row}{_hint(row)}" for row in rows[:limit]]
    lines += [f"  ... and {len(rows) - limit} more"] if len(rows) > limit else []
    return "\n".join(lines)


def _hint(row: Finding) -> str:
    return f"\n    hint: {clean(row.hint)}" if row.hint else ""

"""What an adapter has to pass before anything of it is copied onto a live model."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import Base
from adapterkit.hub.check import judge
from adapterkit.hub.compose.alike import Alike
from adapterkit.hub.compose.live import compare_live
from adapterkit.hub.findings import ERROR, FITS, Finding, clean, listing
from adapterkit.hub.fit import fit
from adapterkit.hub.identity import Identity, identify
from adapterkit.hub.read import read_adapter
from adapterkit.hub.settings import refined as settings_of
from adapterkit.hub.sources import Folder
from adapterkit.registry.errors import AdapterWarning, InvalidError, MismatchError

if TYPE_CHECKING:
    from adapterkit.registry import Registry

Dialect = Literal["exact", "peft"]
DIALECTS = get_args(Dialect)


@dataclass(frozen=True)
class Options:
    """How adapters are read and applied.

    dtype: of the factors; None is each module's compute dtype. strict: doubts raise too.
    allow_fields: unknown config fields that change nothing. dialect: "exact" adds the deltas;
    "peft" lets a DoRA rescale what was activated before it, as PEFT does. virtual_outputs: outputs
    have the positions of virtual tokens in front, as PEFT's have. slots, max_rank: adapters, and
    ranks of each, that memory is reserved for. budget: of memory, such as "2GiB": adapters that
    are named and not attached are loaded from the registry, and evicted when others need the room.
    """

    registry: Registry | None = None
    dtype: torch.dtype | None = None
    strict: bool = False
    allow_fields: Collection[str] = ()
    dialect: Dialect = "exact"
    virtual_outputs: bool = False
    slots: int | None = None
    max_rank: int | None = None
    budget: str | int | None = None

    def __post_init__(self) -> None:
        if self.dialect not in DIALECTS:
            known = ", ".join(DIALECTS)
            raise InvalidError(f"dialect is {self.dialect!r}, expected one of {known}")
        for name in ("slots", "max_rank"):
            size = getattr(self, name)
            if size is not None and (type(size) is not int or size < 1):
                raise InvalidError(f"{name} is {size!r}, expected a whole number from 1")

    def __deepcopy__(self, memo: dict[int, Any]) -> Options:
        """Itself: a copy of a model reads from the same registry."""
        return self


def refined(options: Options | None, settings: Mapping[str, Any]) -> Options:
    """The options with some fields set anew. Raises InvalidError naming those that do not exist."""
    return settings_of(options or Options(), settings)


def admit(
    folder: Folder,
    base: Base,
    modules: Mapping[str, nn.Module],
    options: Options,
    alike: Alike,
) -> Adapter:
    """The adapter, once nothing speaks against binding it to the model; doubts warn.

    Raises MismatchError with every finding, MismatchError too for a doubt when strict.
    """
    adapter, findings = _read(folder, base, options, alike)
    identity = Identity(FITS, "none", ())
    if not any(finding.severity == ERROR for finding in findings):
        compare = partial(compare_live, modules, base)
        identity = identify(folder, base, deep=False, compare=compare)
    report = judge(folder, base, findings, identity, None)
    about = f"{clean(report.source)} on {clean(base.name)}: {report.verdict}"
    if report.errors or (options.strict and report.warnings):
        raise MismatchError(f"{about}\n{listing(report.findings)}")
    if report.warnings:
        warnings.warn(f"{about}\n{listing(report.warnings)}", AdapterWarning, stacklevel=6)
    return adapter


def _read(
    folder: Folder, base: Base, options: Options, alike: Alike
) -> tuple[Adapter, Sequence[Finding]]:
    """A sound adapter, and how it fits the base; raises if it is not sound."""
    key = alike.key(folder)
    found = alike.found(key, folder)
    if found is not None:
        return found
    adapter = read_adapter(folder, options.allow_fields)
    adapter.require_sound()
    findings = fit(adapter, base)
    alike.hold(key, adapter, findings)
    return adapter, findings

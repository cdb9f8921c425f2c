"""One module of a live model, with its forward swapped and nothing else touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adapterkit.hub.compose import experts, gains, replacing
from adapterkit.hub.compose.here import Current
from adapterkit.hub.compose.offload import is_offloaded
from adapterkit.hub.compose.plan import Plan, Replacement, Sums, Weighted, added, fold, split
from adapterkit.hub.compose.products import is_product
from adapterkit.hub.conv1d import is_conv1d
from adapterkit.hub.primitives import Replace, RowScale
from adapterkit.hub.quant import format_of
from adapterkit.registry.errors import MismatchError

PENDING: Any = object()


class Runner(Protocol):
    """What runs on one module while something is active."""

    def run(self, module: Any, original: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """The module's output; original: the forward it has without adapters."""
        ...


class Patch:
    """Swaps `module.forward` for one that adds what is active; `remove` puts it back."""

    def __init__(self, path: str, module: nn.Module, current: Current[Any]) -> None:
        self.path, self.module, self._current = path, module, current
        self.original = module.forward
        self.fixed: Runner | None = None  # what is recorded instead, where memory is reserved
        self._is_offloaded = is_offloaded(module)
        self._had_own = "forward" in vars(module)  # accelerate's wrapper, for one
        setattr(module, "forward", self.forward)  # noqa: B010 (a method cannot be assigned to)

    @cached_property
    def _twin(self) -> nn.Module | None:
        """Another of its class that may hold other parameters; the classes of quantized layers
        hold no dense weight: theirs is multiplied directly."""
        if replacing.is_quantized(self.module):
            return None
        return replacing.shadow(self.module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.fixed is not None and _is_recorded():
            return self.fixed.run(self.module, self.original, args, kwargs)
        state = self._current.now
        if state is None:
            return self.original(*args, **kwargs)
        runner = state.ready.get(self.path, PENDING)
        if runner is PENDING:
            runner = state.make(self)
        if runner is None:
            return self.original(*args, **kwargs)
        return runner.run(self.module, self.original, args, kwargs)

    def remove(self) -> None:
        if vars(self.module).get("forward") != self.forward:
            return  # somebody wrapped it since: theirs stays, and ours adds nothing any more
        if self._had_own:
            setattr(self.module, "forward", self.original)  # noqa: B010
        else:
            del self.module.forward

    def fold(
        self, updates: Sequence[Weighted], *, sequential: bool, sum_gains: bool = False
    ) -> Plan | None:
        """The plan for the updates of all active adapters, None: the base."""
        if not updates:
            return None
        if self._is_offloaded:
            self._require_apart(updates)
        summed, replacements, outside = split(updates)
        by_name: dict[str, list[Replacement]] = {}
        for weight, new in replacements:
            by_name.setdefault(new.name, []).append((weight, new))
        plan = self._plan(fold(summed, sequential=sequential), by_name)
        return replace(plan, gains=gains.fold(outside, summed=sum_gains))

    def _require_apart(self, updates: Sequence[Weighted]) -> None:
        """Raises MismatchError for what needs the module's own parameters in a forward: those of
        an offloaded one are there for the product of the base alone."""
        has_bias = getattr(self.module, "bias", None) is not None
        needs = Replace | RowScale if has_bias else Replace
        every = [each.primitive for each in updates]
        held = {type(each).__name__ for each in every if isinstance(each, needs)}
        if held or not is_product(self.module):
            what = ", ".join(sorted(held)) or "changes of what is no product"
            raise MismatchError(
                f"{self.path} is offloaded, and takes no {what}", hint="keep it on a device"
            )

    def _plan(self, sums: Sums, replaced: dict[str, list[Replacement]]) -> Plan:
        plan = Plan(sums)
        whole: dict[str, Tensor] = {}
        for name, replacements in replaced.items():
            if name == "bias" and (isinstance(self.module, nn.Linear) or is_conv1d(self.module)):
                shift = replacing.bias_shift(self.module, replacements)
                total = shift if sums.d is None else sums.d + shift
                plan = replace(plan, sums=replace(sums, d=total))
            elif all(new.rows is not None for _, new in replacements):
                plan = replace(plan, rows=replacing.rows(self.module, replacements))
            elif self._twin is None:
                weight = format_of(self.module).read_weight(self.module)
                plan = replace(plan, dense=replacing.whole(weight, replacements))
            else:
                whole[name] = replacing.whole(self._parameter(name), replacements)
        if not is_product(self.module) and not sums.is_empty:
            return self._with_sum(sums, whole)
        return replace(plan, shadow=self._with_parameters(whole))

    def _with_sum(self, sums: Sums, whole: dict[str, Tensor]) -> Plan:
        """For a module that is more than a product, such as a router: its new weight as a whole."""
        base = self._parameter("weight")
        start = whole.get("weight", base)
        total = start.float() + added(replace(sums, d=None), base.float())
        shadow = self._with_parameters({**whole, "weight": total.to(base.dtype)})
        return Plan(Sums(d=sums.d), shadow=shadow)

    def fold_parameters(self, updates: Mapping[str, Sequence[Weighted]], sequential: bool) -> Plan:
        """The plan for updates of parameters other than a weight, by their names."""
        if self._is_offloaded:
            raise MismatchError(
                f"{self.path} is offloaded, and takes no change of its {', '.join(updates)}",
                hint="keep it on a device",
            )
        sums: dict[str, Sums] = {}
        whole: dict[str, Tensor] = {}
        for name, made in updates.items():
            summed, replacements, _ = split(made)
            if summed:
                sums[name or "weight"] = fold(summed, sequential=sequential)
            by_name: dict[str, list[Replacement]] = {}
            for weight, new in replacements:
                by_name.setdefault(name or new.name, []).append((weight, new))
            whole |= {n: replacing.whole(self._parameter(n), each) for n, each in by_name.items()}
        return Plan(Sums(), shadow=experts.twin_forward(self.module, sums, whole))

    def _parameter(self, name: str) -> Tensor:
        parameter: Tensor = getattr(self.module, name)
        return parameter.detach()

    def _with_parameters(self, parameters: dict[str, Tensor]) -> Callable[..., Any] | None:
        """The forward of the module with these parameters instead of its own."""
        if not parameters or self._twin is None:
            return None
        twin = replacing.shadow(self._twin)
        for name, value in parameters.items():
            setattr(twin, name, nn.Parameter(value, requires_grad=False))
        return twin.forward


def _is_recorded() -> bool:
    """Whether this forward runs again without Python, by torch.compile or as a CUDA graph."""
    if torch.compiler.is_compiling():
        return True
    has_begun: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return has_begun and torch.cuda.is_current_stream_capturing()

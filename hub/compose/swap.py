"""A module's forward, swapped for a while and put back bit for bit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

Forward = Callable[..., Any]
# (the forward that was there, its arguments by name) -> what it returns
Run = Callable[[Forward, dict[str, Any]], Any]


class Swap:
    """The new forward of a module; callers see the signature of the old one, and `extra`."""

    def __init__(self, module: nn.Module, run: Run, extra: tuple[str, ...] = ()) -> None:
        self._module, self._run = module, run
        self._original: Forward = module.forward
        self._had_own = "forward" in vars(module)  # accelerate's wrapper, for one
        signature = inspect.signature(self._original)
        parameters = list(signature.parameters.values())
        self._names = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
        more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
        rest = [p for p in parameters if p.kind == p.VAR_KEYWORD]
        first = [p for p in parameters if p.kind != p.VAR_KEYWORD]
        self.__signature__ = signature.replace(parameters=[*first, *more, *rest])
        setattr(module, "forward", self)  # noqa: B010 (a method cannot be assigned to)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._original, dict(zip(self._names, args, strict=False)) | kwargs)

    @property
    def names(self) -> list[str]:
        """Of the arguments that the old forward names."""
        return self._names

    def remove(self) -> None:
        if vars(self._module).get("forward") is not self:
            return  # somebody wrapped it since: theirs stays, and this one adds nothing any more
        if self._had_own:
            setattr(self._module, "forward", self._original)  # noqa: B010
        else:
            del self._module.forward

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
    """The new forward of a module, or another method; callers see the signature of the old one, and
    `extra`."""

    def __init__(
        self, module: nn.Module, run: Run, extra: tuple[str, ...] = (), name: str = "forward"
    ) -> None:
        self._module, self._run, self._name = module, run, name
        self._original: Forward = getattr(module, name)
        self._had_own = name in vars(module)  # accelerate's wrapper, for one
        signature = inspect.signature(self._original)
        parameters = list(signature.parameters.values())
        self._names = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
        more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
        rest = [p for p in parameters if p.kind == p.VAR_KEYWORD]
        first = [p for p in parameters if p.kind != p.VAR_KEYWORD]
        self.__signature__ = signature.replace(parameters=[*first, *more, *rest])
        setattr(module, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(self._names) or kwargs.keys() & set(self._names[: len(args)]):
            return self._original(*args, **kwargs)  # which says what is wrong with the call
        return self._run(self._original, dict(zip(self._names, args, strict=False)) | kwargs)

    def remove(self) -> None:
        if vars(self._module).get(self._name) is not self:
            return  # somebody wrapped it since: theirs stays, and this one adds nothing any more
        if self._had_own:
            setattr(self._module, self._name, self._original)
        else:
            delattr(self._module, self._name)

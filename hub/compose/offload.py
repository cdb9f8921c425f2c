"""Modules whose weights lie elsewhere, on the CPU's memory or on disk, until their forward runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate fetches its own parameters for each forward."""
    own = [*module.parameters(recurse=False)]
    return any(parameter.device.type == "meta" for parameter in own)


@contextmanager
def fetched(module: nn.Module) -> Iterator[None]:
    """Its parameters are where its forward runs meanwhile."""
    if not is_offloaded(module):
        yield
        return
    from accelerate.utils import align_module_device  # takes long, and few models need it

    with align_module_device(module):
        yield

"""transformers' Conv1D, a linear layer that stores W (in, out): known without the import."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """No module can be one before somebody has imported its class."""
    found = sys.modules.get("transformers.pytorch_utils")
    return found is not None and isinstance(module, found.Conv1D)

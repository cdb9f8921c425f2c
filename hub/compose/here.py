"""What a forward notes for later in the same forward: one model may run in several threads."""

from __future__ import annotations

import threading
from typing import Any


class Here(threading.local):
    """Attributes of one thread each; a copy of a model begins with none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

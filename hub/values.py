"""The values of an adapter's tensors: not-a-number, infinity, factors that do nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.findings import ERROR, WARNING, Finding
from adapterkit.hub.headers import FLOATS, Stored

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUMPY = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
# Values looked at together: bounds the memory whatever a header claims.
CHUNK = 1 << 22


def check_values(adapter: Adapter) -> list[Finding]:
    """Findings about the values. Reads every byte of the adapter, in pieces."""
    findings = []
    zero, factors = [], 0
    for (module, role), stored in adapter.tensors.items():
        if stored.dtype not in FLOATS:
            continue
        n_bad, largest = _scan(stored)
        if n_bad:
            found = f"{n_bad} that are NaN or Inf"
            findings.append(Finding(ERROR, "not-finite", stored.key, "finite values", found))
        if role in ("B", "embedding_B"):
            factors += 1
            zero += [module] if largest == 0 else []
    if factors and len(zero) == factors and not _does_more(adapter):
        about = "every lora_B is zero: it has no effect"
        findings.append(
            Finding(WARNING, "no-effect", adapter.name, "an adapter that does something", about)
        )
    return findings


def _does_more(adapter: Adapter) -> bool:
    return any(role not in ("A", "B", "embedding_A", "embedding_B") for _, role in adapter.tensors)


def _scan(stored: Stored) -> tuple[int, float]:
    """(values that are not finite, largest magnitude among the finite)."""
    import numpy as np

    width = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}[stored.dtype]
    n_bad, largest = 0, 0.0
    for start in range(stored.start, stored.stop, CHUNK * width):
        size = min(CHUNK * width, stored.stop - start)
        values = decode(stored.source.read(start, size), stored.dtype)
        finite = np.isfinite(values)
        n_bad += int(values.size - np.count_nonzero(finite))
        largest = max(largest, float(np.max(np.abs(values), where=finite, initial=0.0)))
    return n_bad, largest


def decode(data: bytes, dtype: str) -> NDArray[Any]:
    import numpy as np

    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, NUMPY[dtype])

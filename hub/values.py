"""The values of an adapter's tensors: not-a-number, infinity, factors that do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.findings import ERROR, WARNING, Finding
from adapterkit.hub.headers import FLOATS, Stored

if TYPE_CHECKING:
    from numpy.typing import NDArray

# bytes of a value, and the bits of infinity
BITS = {"F16": (2, 0x7C00), "BF16": (2, 0x7F80), "F32": (4, 0x7F80 << 16), "F64": (8, 0x7FF0 << 48)}
NUMPY = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
# Values read together: bounds the memory whatever a header claims.
CHUNK = 1 << 22
# Bytes looked at together: so few that what is made of them stays in the cache, in memory that is
# used again. With fresh pages for each half mebibyte it takes four times as long.
BLOCK = 1 << 16


def check_values(adapter: Adapter) -> list[Finding]:
    """Findings about the values. Reads every byte of the adapter, in pieces."""
    findings = []
    zero, factors = [], 0
    for (module, role), stored in adapter.tensors.items():
        if stored.dtype not in FLOATS:
            continue
        n_bad, nonzero = _scan(stored)
        if n_bad:
            found = f"{n_bad} that are NaN or Inf"
            findings.append(Finding(ERROR, "not-finite", stored.key, "finite values", found))
        if role in ("B", "embedding_B"):
            factors += 1
            zero += [] if nonzero else [module]
    if factors and len(zero) == factors and not _does_more(adapter):
        about = "every lora_B is zero: it has no effect"
        findings.append(
            Finding(WARNING, "no-effect", adapter.name, "an adapter that does something", about)
        )
    return findings


def _does_more(adapter: Adapter) -> bool:
    return any(role not in ("A", "B", "embedding_A", "embedding_B") for _, role in adapter.tensors)


def _scan(stored: Stored) -> tuple[int, bool]:
    """(how many values are not finite, whether a finite one is not zero).

    Told by the bits, several times faster than by the values: without the sign, infinity and NaN
    are the largest numbers.
    """
    import numpy as np

    width, infinity = BITS[stored.dtype]
    n_bad, nonzero = 0, False
    for bits in _blocks(stored, width):
        magnitudes = bits & ((1 << (8 * width - 1)) - 1)
        if magnitudes.max(initial=0) >= infinity:
            n_bad += int(np.count_nonzero(magnitudes >= infinity))
            magnitudes = magnitudes[magnitudes < infinity]
        nonzero = nonzero or bool(magnitudes.any())
    return n_bad, nonzero


def _blocks(stored: Stored, width: int) -> Iterator[NDArray[Any]]:
    import numpy as np

    for start in range(stored.start, stored.stop, CHUNK * width):
        size = min(CHUNK * width, stored.stop - start)
        bits = np.frombuffer(stored.source.read(start, size), f"<u{width}")
        step = BLOCK // width
        for first in range(0, len(bits), step):
            yield bits[first : first + step]


def decode(data: bytes, dtype: str) -> NDArray[Any]:
    import numpy as np

    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, NUMPY[dtype])

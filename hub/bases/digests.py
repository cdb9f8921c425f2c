"""Digests of a base's weights: of its files, its layout and its tensors.

A tensor's leaf is sha256 over the canonical JSON of [name, dtype, shape], a newline, and its bytes.
A root is sha256 over the sorted leaves, one a line, so it depends neither on the order of tensors
nor on the files they lie in.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.hashcache import HashCache, Hashes, stamp
from adapterkit.hub.bases.packed import constants_of
from adapterkit.hub.findings import clean
from adapterkit.hub.headers import Stored
from adapterkit.hub.sources import ByteSource
from adapterkit.registry.errors import DamagedError, NotFoundError
from adapterkit.registry.strictjson import canonical, digest_of

# Called with the number of bytes hashed since the last call, never from two threads at once.
Progress = Callable[[int], None]
CHUNK = 4 << 20


def layout_digest(tensors: Mapping[str, Stored]) -> str:
    """Names, dtypes and shapes as stored; from headers alone."""
    rows = [[name, stored.dtype, list(stored.shape)] for name, stored in sorted(tensors.items())]
    return digest_of(canonical(rows))


def root(lines: Iterable[str]) -> str:
    return digest_of("".join(f"{line}\n" for line in sorted(lines)).encode())


def files_digest(base: Base, cache: Path | None = None, progress: Progress | None = None) -> str:
    """Root over (sha256, size) of the weight files; a hub knows these without sending the files."""
    found = hash_files(base, {name: [] for name in base.weight_files}, True, cache, progress)
    return root(f"{found[n].whole} {source.size}" for n, source in base.weight_files.items())


def tensors_digest(base: Base, cache: Path | None = None, progress: Progress | None = None) -> str:
    """Root over all tensors: equal however they are sharded and the files are named."""
    return touched_digest(base, base.tensors, cache, progress)


def touched_digest(
    base: Base, names: Iterable[str], cache: Path | None = None, progress: Progress | None = None
) -> str:
    """Root over some tensors, the constants of quantized ones included.

    Raises NotFoundError if the base has no such tensor.
    """
    wanted = with_constants(base, names)
    found = hash_files(base, by_file(base, wanted), False, cache, progress)
    leaves = {name: leaf for hashes in found.values() for name, leaf in hashes.leaves.items()}
    return root(leaves[name] for name in wanted)


def with_constants(base: Base, names: Iterable[str]) -> set[str]:
    wanted = set(names)
    absent = sorted(wanted - base.tensors.keys())
    if absent:
        raise NotFoundError(f"{clean(base.name)} has no tensor {clean(', '.join(absent[:5]))}")
    return wanted | {key for name in wanted for key in constants_of(base.tensors, name)}


def by_file(base: Base, names: Iterable[str]) -> dict[str, list[str]]:
    files = {id(source): name for name, source in base.weight_files.items()}
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(files[id(base.tensors[name].source)], []).append(name)
    return found


def hash_files(
    base: Base,
    wanted: Mapping[str, list[str]],
    whole: bool,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Hashes]:
    """Hashes of the named weight files and of the named tensors in each, every byte read once."""
    store = HashCache(cache) if cache is not None else None
    lock = threading.Lock()

    def report(size: int) -> None:
        if progress is not None:
            with lock:
                progress(size)

    def one(name: str) -> Hashes:
        source = base.weight_files[name]
        tensors = [base.tensors[key] for key in wanted[name]]
        known = store.get(source) if store else Hashes()
        missing = [tensor for tensor in tensors if tensor.key not in known.leaves]
        if not missing and (known.whole or not whole):
            report(source.size if whole else sum(tensor.size for tensor in tensors))
            return known
        before = stamp(source)
        found = _whole(source, missing, report) if whole else _leaves(missing, report)
        if before != stamp(source):
            raise DamagedError(f"{clean(source.name)} changed while it was read")
        if store:
            store.put(source, before, found)
        return Hashes(found.whole or known.whole, {**known.leaves, **found.leaves})

    # hashlib lets other threads run, so a thread a processor keeps them busy.
    with ThreadPoolExecutor(max(1, min(len(wanted), os.cpu_count() or 1))) as pool:
        return dict(zip(wanted, pool.map(one, wanted), strict=True))


def _start(tensor: Stored) -> hashlib._Hash:
    return hashlib.sha256(canonical([tensor.key, tensor.dtype, list(tensor.shape)]) + b"\n")


def _leaves(tensors: Iterable[Stored], report: Progress) -> Hashes:
    leaves = {}
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        digest = _start(tensor)
        for start in range(tensor.start, tensor.stop, CHUNK):
            data = tensor.source.read(start, min(CHUNK, tensor.stop - start))
            digest.update(data)
            report(len(data))
        leaves[tensor.key] = digest.hexdigest()
    return Hashes(None, leaves)


def _whole(source: ByteSource, tensors: Iterable[Stored], report: Progress) -> Hashes:
    """The file's hash and its tensors' in one pass; a valid header means they do not overlap."""
    digest = hashlib.sha256()
    waiting = sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop), reverse=True)
    running = {tensor.key: _start(tensor) for tensor in waiting}
    with ThreadPoolExecutor(1) as beside:  # the same bytes are hashed twice, at the same time
        for start in range(0, source.size, CHUNK):
            data = memoryview(source.read(start, min(CHUNK, source.size - start)))
            done = beside.submit(digest.update, data)
            stop = start + len(data)
            while waiting and waiting[-1].start < stop:
                tensor = waiting[-1]
                inside = data[max(tensor.start - start, 0) : tensor.stop - start]
                running[tensor.key].update(inside)
                if tensor.stop > stop:
                    break
                waiting.pop()
            done.result()
            report(len(data))
    return Hashes(digest.hexdigest(), {key: leaf.hexdigest() for key, leaf in running.items()})

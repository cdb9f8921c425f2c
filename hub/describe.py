"""What an adapter is, from its files alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adapterkit.hub.adapter import Adapter, AdapterInfo, count_dtypes
from adapterkit.hub.headers import Stored
from adapterkit.hub.kinds import kind
from adapterkit.hub.locate import Source, locate
from adapterkit.hub.read import read_adapter
from adapterkit.hub.recipe_versions import info_of
from adapterkit.hub.recipes import is_recipe
from adapterkit.registry.strictjson import canonical, digest_of

if TYPE_CHECKING:
    from adapterkit.registry import Registry

CHUNK = 1 << 22


def describe(
    source: Source, registry: Registry | None = None, *, allow_fields: Collection[str] = ()
) -> AdapterInfo:
    """Kind, ranks, targets, tensors, base and quantization of an adapter; needs no torch.

    Reads the config, the header, and the tensors once for their digest. `findings` says what is
    wrong or odd. Raises NotFoundError, DamagedError if it cannot be read at all.
    """
    folder = locate(source, registry)
    if is_recipe(folder):
        return info_of(folder)
    info = summarize(read_adapter(folder, allow_fields), digest=True)
    if folder.manifest is None:
        return info
    from dataclasses import replace

    trained = (folder.manifest.quantization or {}).get("trained_on")
    return replace(info, trained_on=trained, base_record=folder.manifest.base)


def summarize(adapter: Adapter, *, digest: bool) -> AdapterInfo:
    """The description of an adapter that is read already. digest: hash its tensors too."""
    summary = kind(adapter.kind).summary(adapter)
    tensors = adapter.tensors
    return AdapterInfo(
        name=adapter.name,
        kind=adapter.kind,
        variant=summary.variant,
        format=adapter.format,
        ranks=Counter(summary.ranks),
        alphas=summary.alphas,
        targets=tuple(sorted({module.rpartition(".")[2] for module, _ in tensors if module})),
        n_modules=len({module for module, _ in tensors if module}),
        n_tensors=len(tensors),
        n_parameters=sum(map(_count, tensors.values())),
        size=sum(stored.size for stored in tensors.values()),
        dtypes=count_dtypes(tensors),
        base=adapter.base_name,
        revision=adapter.revision,
        task=adapter.task,
        writer=adapter.writer,
        unknown_fields={name: plain(adapter.config[name]) for name in adapter.unknown_fields},
        root=tensors_root(tensors) if digest else "",
        hints=adapter.hints,
        findings=adapter.findings,
    )


def tensors_root(tensors: Mapping[tuple[str, str], Stored]) -> str:
    """sha256 over the sorted leaves (module, role, dtype, shape, sha256 of the bytes)."""
    leaves = [
        [module, role, stored.dtype, list(stored.shape), _hash(stored)]
        for (module, role), stored in sorted(tensors.items(), key=lambda item: item[0])
    ]
    return digest_of(canonical(leaves))


def _hash(stored: Stored) -> str:
    found = hashlib.sha256()
    for piece in _pieces(stored):
        found.update(piece)
    return found.hexdigest()


def _pieces(stored: Stored) -> Iterator[bytes]:
    for start in range(stored.start, stored.stop, CHUNK):
        yield stored.source.read(start, min(CHUNK, stored.stop - start))


def _count(stored: Stored) -> int:
    count = 1
    for size in stored.shape:
        count *= size
    return count


def plain(value: Any) -> Any:
    """The value if canonical JSON can hold it, else how it looks (huge integers, NaN)."""
    try:
        canonical(value)
    except ValueError:
        return repr(value)
    return value

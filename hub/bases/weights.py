"""The header table of a model folder: one safetensors file, shards with an index, or without."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from adapterkit.hub.findings import clean
from adapterkit.hub.headers import Stored, read_header
from adapterkit.hub.sources import ByteSource, Folder, read_object
from adapterkit.registry.errors import DamagedError, NotFoundError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "model.ckpt.index")
# Header reads wait for the disk or the network, not for the processor.
THREADS = 8


def read_weights(folder: Folder) -> tuple[dict[str, Stored], dict[str, ByteSource]]:
    """Tensors by checkpoint name, and the files that hold them.

    As transformers chooses: `model.safetensors`, else the index. Without either, every
    safetensors file beside the config belongs to the model.
    """
    expected: dict[str, str] = {}
    if SINGLE in folder.files:
        names = [SINGLE]
    elif INDEX in folder.files:
        expected = _index(folder)
        names = sorted(set(expected.values()))
    else:
        names = sorted(n for n in folder.files if n.endswith(".safetensors") and "/" not in n)
    if not names:
        raise _nothing(folder)
    sources = {name: folder.file(name) for name in names}
    with ThreadPoolExecutor(min(THREADS, len(names))) as pool:
        headers = dict(zip(names, pool.map(read_header, sources.values()), strict=True))
    tensors = _joined({name: header.tensors for name, header in headers.items()})
    if expected:
        _compare(expected, {key: stored.source.name for key, stored in tensors.items()}, sources)
    return tensors, sources


def _nothing(folder: Folder) -> Exception:
    pickles = sorted(
        name for name in folder.files if name in PICKLES or name.endswith((".bin", ".pt", ".pth"))
    )
    if pickles:
        shown = clean(", ".join(pickles[:5]))
        return DamagedError(
            f"{clean(folder.name)} holds its weights as a pickle ({shown}), no safetensors file",
            hint="pickles can run code and are never opened: load the model once where you trust"
            " it and save it again with save_pretrained",
        )
    return NotFoundError(f"{clean(folder.name)} has no {SINGLE} and no {INDEX}")


def _index(folder: Folder) -> dict[str, str]:
    """Tensor -> shard, as the index says; every shard must be a file of the folder."""
    source = folder.file(INDEX)
    mapped = read_object(source, INDEX).get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise DamagedError(f"{INDEX} has no weight_map that names the shard of each tensor")
    faults = set()
    for key, shard in mapped.items():
        if not isinstance(shard, str):
            faults.add(f"{clean(key)} is mapped to {clean(repr(shard))}, not a file name")
        elif _leaves(shard):
            faults.add(f"the shard {clean(repr(shard))} is a path that leaves the folder")
        elif shard not in folder.files:
            faults.add(f"the shard {clean(shard)} is missing")
        elif not shard.endswith(".safetensors"):
            faults.add(f"the shard {clean(shard)} is not a safetensors file")
    _raise(INDEX, faults)
    return {str(key): str(shard) for key, shard in mapped.items()}


def _leaves(name: str) -> bool:
    plain = name.replace("\\", "/")
    return posixpath.normpath(plain).startswith("..") or plain.startswith("/") or ":" in name


def _joined(shards: Mapping[str, Mapping[str, Stored]]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    faults = set()
    for shard, found in shards.items():
        for key, stored in found.items():
            if key in tensors:
                first = clean(tensors[key].source.name)
                faults.add(f"{clean(key)} is in {first} and again in {clean(shard)}")
            tensors[key] = stored
    _raise("the weights", faults)
    return tensors


def _compare(
    expected: Mapping[str, str], found: Mapping[str, str], sources: Mapping[str, ByteSource]
) -> None:
    names = {source.name: shard for shard, source in sources.items()}
    faults = set()
    for key in expected.keys() | found.keys():
        said, actual = expected.get(key), names.get(found.get(key, ""))
        if said is None:
            faults.add(f"{clean(key)} in {clean(str(actual))} is not in the index")
        elif actual is None:
            faults.add(f"{clean(key)} is not in {clean(said)}, nor in any other shard")
        elif said != actual:
            faults.add(f"{clean(key)} is in {clean(actual)}, the index says {clean(said)}")
    _raise(INDEX, faults)


def _raise(name: str, faults: set[str]) -> None:
    if faults:
        listed = sorted(faults)
        shown = "; ".join(listed[:20]) + (f"; {len(listed) - 20} more" if len(listed) > 20 else "")
        raise DamagedError(f"{name} does not match the files: {shown}")

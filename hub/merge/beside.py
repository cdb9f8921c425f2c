"""The correction of a merged model: a PEFT folder in it, put together of what each file needs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.blend.factors import Factors
from adapterkit.hub.factored import stored
from adapterkit.hub.fields import PlainFields
from adapterkit.hub.formats import peft_write
from adapterkit.hub.formats.peft_write import Part
from adapterkit.hub.formats.safetensors_write import dump
from adapterkit.hub.headers import read_header
from adapterkit.hub.matching import Targets
from adapterkit.hub.merge import carried
from adapterkit.hub.sources import FileSource
from adapterkit.registry.files import Files
from adapterkit.registry.strictjson import digest_of

if TYPE_CHECKING:
    from adapterkit.hub.merge.planning import Plan

# Of the merged folder.
FOLDER = "correction"
DTYPE = "F32"


def keep(files: Files, path: Path, factors: Mapping[str, Factors], rank: int) -> str:
    """What belongs to one file of the model, for `write`; its sha256."""
    parts: dict[str, Part] = {}
    for row, found in factors.items():
        made = stored(found, rank, DTYPE)
        parts[f"{row}.A"], parts[f"{row}.B"] = made.a, made.b
    data = dump(parts)
    files.mkdir(path.parent)
    files.unlink(path)  # of a merge that was interrupted
    carried.write(files, path, data)
    return digest_of(data)


def is_kept(files: Files, path: Path, digest: str) -> bool:
    return path.is_file() and digest_of(files.read(path)) == digest


def write(
    files: Files, made: Plan, kept: Collection[Path], folder: Path, base: Path
) -> dict[str, str]:
    """Path -> digest of what is written. base: where the merged model will be."""
    parts: dict[tuple[str, str], Part] = {}
    for path in kept:
        for key, held in read_header(FileSource.open(path)).tensors.items():
            row, _, role = key.rpartition(".")
            parts[row, role] = Part.of(held)
    rank = made.options.correction_rank or 0
    rows = {row for row, _ in parts}
    config = peft_write.lora_config(_shell(made, base), rank, rows, lora_bias=False)
    files.mkdir(folder / FOLDER)
    written = peft_write.files(config, parts)
    for name, data in written.items():
        carried.write(files, folder / FOLDER / name, data)
    files.fsync_folder(folder / FOLDER)
    return {f"{FOLDER}/{name}": f"sha256:{digest_of(data)}" for name, data in written.items()}


def _shell(made: Plan, base: Path) -> Adapter:
    """All that a config says beside factors."""
    tasks = {one.ground.adapter.task for one in made.output.lowering.inputs}
    nothing: Mapping[Any, Any] = {}
    return Adapter(
        name=FOLDER, kind="lora", format="peft", fields=PlainFields(), targets=Targets(),
        tensors=nothing, config=nothing, base_name=str(base),
        task=tasks.pop() if len(tasks) == 1 else None,
    )  # fmt: skip

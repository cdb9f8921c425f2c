"""A base model in a local folder, or in the local cache of the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.modules import module_table
from adapterkit.hub.bases.packed import quantization
from adapterkit.hub.bases.weights import read_weights
from adapterkit.hub.findings import clean
from adapterkit.hub.sources import FileSource, Folder, read_object
from adapterkit.registry.errors import DamagedError, InvalidError, NotFoundError

CONFIG = "config.json"
# What turns text into ids. tokenizer.json alone says all of it; the older files count only without
# it, as savers drop or rewrite them. tokenizer_config.json and special_tokens_map.json do not
# count: chat templates, lengths and class names change there while every id stays.
TOKENIZER = "tokenizer.json"
OLD_TOKENIZER = (
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt",
    "vocab.txt", "added_tokens.json",
)  # fmt: skip
CHUNK = 1 << 20
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def read_base(folder: Folder | Path | str, architecture: str | None = None) -> Base:
    """The base in a model folder: headers only, whatever its size.

    architecture: the class to describe it as, where it is not the config's.
    Raises NotFoundError if there is no config or no weights, DamagedError if they contradict each
    other, MismatchError if the model family is not known.
    """
    if not isinstance(folder, Folder):
        folder = open_base(Path(folder))
    if CONFIG not in folder.files:
        raise NotFoundError(
            f"{clean(folder.name)} has no {CONFIG}, so it is not a base model",
            hint="give the folder of the model the adapter was trained on",
        )
    source = folder.file(CONFIG)
    config = read_object(source, CONFIG)
    tensors, files = read_weights(folder)
    return Base(
        name=folder.name,
        config=config,
        modules=module_table(config, tensors, architecture),
        tensors=tensors,
        quantization=quantization(config, tensors),
        weight_files=files,
        tokenizer=tokenizer_digest(folder),
    )


def open_base(path: Path) -> Folder:
    """The files directly in `path`, links followed, as hub caches are made of links.

    Subfolders (`original/`, `onnx/`, runs) are not a part of the model and are not visited.
    """
    if not path.exists():
        raise NotFoundError(f"{clean(str(path))} does not exist")
    if not path.is_dir():
        raise DamagedError(f"{clean(str(path))} is a file, expected the folder of a base model")
    names = sorted(entry.name for entry in path.iterdir() if _is_model_file(entry))
    return Folder(str(path), {name: FileSource.open(path / name, name) for name in names}, path)


def _is_model_file(entry: Path) -> bool:
    return not entry.name.startswith(".") and entry.is_file()


def find_base(text: str) -> Path:
    """The folder a user means by BASE: a path, or `org/name[@revision]` from the local Hub cache.

    Nothing is downloaded. Raises NotFoundError if it is not there, InvalidError if `text` is
    neither a path nor a Hub id.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # ~nobody
        raise NotFoundError(f"{clean(text)} is not the folder of a base model: {error}") from error
    if re.match(r"[.~/]|[A-Za-z]:[\\/]|\.\.?\\", text) or path.is_absolute():
        if not is_folder(path):
            raise NotFoundError(f"{clean(text)} is not the folder of a base model")
        return path
    name, _, revision = text.partition("@")
    if not HUB_ID.fullmatch(name):
        hint = f"a folder is given as ./{text}" if is_folder(path) else "give org/name or a path"
        raise InvalidError(f"{clean(text)} is neither a path nor a Hub id org/name", hint=hint)
    return _cached(name, revision or None)


def is_folder(path: Path) -> bool:
    """False also for a name no file system takes, which pathlib may raise for."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _cached(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        hint = f"hf download {name}"
        if is_folder(Path(name)):
            hint = f"for the folder give ./{name}"
        raise NotFoundError(
            f"the base {clean(name)} is not in the local Hugging Face cache", hint=hint
        ) from error


def tokenizer_digest(folder: Folder) -> str | None:
    """Identity of the tokenizer: sha256 over the digests of the files that decide token ids.

    Bytes, not meaning: two savers may write the same tokenizer differently, so a difference is a
    reason to look, not a proof. None without a tokenizer.
    """
    wanted = (TOKENIZER,) if TOKENIZER in folder.files else OLD_TOKENIZER
    lines = [f"{name} {_digest(folder, name)}\n" for name in sorted(wanted) if name in folder.files]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None


def _digest(folder: Folder, name: str) -> str:
    source = folder.file(name)
    digest = hashlib.sha256()
    for start in range(0, source.size, CHUNK):
        digest.update(source.read(start, min(CHUNK, source.size - start)))
    return digest.hexdigest()



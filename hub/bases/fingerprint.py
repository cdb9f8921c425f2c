"""Who a base is: five digests from cheap to sure, and what an adapter's manifest keeps of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterkit.hub.bases.base import Base, Quantization
from adapterkit.hub.bases.digests import (
    Progress,
    by_file,
    hash_files,
    layout_digest,
    root,
    with_constants,
)
from adapterkit.hub.bases.sketch import sketch
from adapterkit.hub.findings import clean
from adapterkit.registry.errors import DamagedError
from adapterkit.registry.strictjson import canonical, digest_of

# They change when a model is saved again or loaded otherwise, not when it becomes another model;
# how weights are stored is recorded beside the config.
VOLATILE = frozenset(
    {"transformers_version", "_name_or_path", "_commit_hash", "torch_dtype", "dtype",
     "_attn_implementation", "attn_implementation", "quantization_config", "use_cache"}
)  # fmt: skip
ROOTS = ("layout", "files", "tensors", "touched")
DIGESTS = ("tokenizer", "config")
TEXTS = ("id", "revision", "architecture", "model_type")
DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True)
class Fingerprint:
    """None where not computed or not known.

    sketch: digest and size of the sketch's bytes; sketch_data: those bytes, when just made.
    others: fields of a later version, kept as they are.
    """

    id: str | None = None
    revision: str | None = None
    architecture: str | None = None
    model_type: str | None = None
    layout: str | None = None
    files: str | None = None
    tensors: str | None = None
    touched: str | None = None
    sketch: tuple[str, int] | None = None
    tokenizer: str | None = None
    config: str | None = None
    quantization: Quantization | None = None
    vocabulary: int | None = None
    others: Mapping[str, Any] = field(default_factory=dict)
    sketch_data: bytes | None = field(default=None, repr=False, compare=False)

    def record(self) -> dict[str, Any]:
        """The `base` entry of a manifest."""
        found: dict[str, Any] = dict(self.others)
        values = {name: getattr(self, name) for name in (*TEXTS, "vocabulary")}
        values |= {name: _written(getattr(self, name)) for name in DIGESTS}
        found |= {name: value for name, value in values.items() if value is not None}
        roots = {name: _written(getattr(self, name)) for name in ROOTS}
        found |= {name: {"root": value} for name, value in roots.items() if value is not None}
        if self.sketch is not None:
            found["sketch"] = {"digest": _written(self.sketch[0]), "size": self.sketch[1]}
        if self.quantization is not None:
            found["quantization"] = self.quantization.record()
        return found

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> Fingerprint:
        """The inverse of `record`. Raises DamagedError naming the field that is malformed."""
        known = {*TEXTS, *ROOTS, "tokenizer", "config", "vocabulary", "sketch", "quantization"}
        return cls(
            id=_text(entry, "id"),
            revision=_text(entry, "revision"),
            architecture=_text(entry, "architecture"),
            model_type=_text(entry, "model_type"),
            layout=_root(entry, "layout"),
            files=_root(entry, "files"),
            tensors=_root(entry, "tensors"),
            touched=_root(entry, "touched"),
            sketch=_blob(entry),
            tokenizer=_digest(entry, "tokenizer"),
            config=_digest(entry, "config"),
            quantization=_quantization(entry),
            vocabulary=_count(entry, "vocabulary"),
            others={name: value for name, value in entry.items() if name not in known},
        )


def fingerprint(
    base: Base,
    *,
    weights: bool = False,
    touched: Iterable[str] | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Fingerprint:
    """Layout and sketch from headers and a few short reads; with `weights` all digests.

    touched: checkpoint tensors that an adapter modifies (see `tensors_of`): what the sketch and
    the touched digest are of. None sketches every weight.
    cache: folder that remembers hashes of files. progress: told of bytes hashed, of
    `weights_size(base)` in all.
    """
    names = None if touched is None else sorted(set(touched))
    # A model in memory has no tensors here: a digest of nothing would equal that of any other.
    blob = sketch(base, names) if base.tensors else None
    files = tensors = part = None
    if weights and base.tensors:
        keys = by_file(base, base.tensors)
        wanted = {name: keys.get(name, []) for name in base.weight_files}
        found = hash_files(base, wanted, True, cache, progress)
        files = root(f"{found[name].whole} {s.size}" for name, s in base.weight_files.items())
        leaves = {key: leaf for hashes in found.values() for key, leaf in hashes.leaves.items()}
        tensors = root(leaves[key] for key in base.tensors)
        if names is not None:
            part = root(leaves[key] for key in with_constants(base, names))
    origin, revision = origin_of(base)
    return Fingerprint(
        id=origin,
        revision=revision,
        architecture=base.architecture or None,
        model_type=base.model_type or None,
        layout=layout_digest(base.tensors) if base.tensors else None,
        files=files,
        tensors=tensors,
        touched=part,
        sketch=None if blob is None else (digest_of(blob), len(blob)),
        tokenizer=base.tokenizer,
        config=config_digest(base.config),
        quantization=base.quantization,
        vocabulary=base.vocabulary,
        sketch_data=blob,
    )


def weights_size(base: Base) -> int:
    return sum(source.size for source in base.weight_files.values())


def tensors_of(base: Base, modules: Iterable[str]) -> list[str]:
    """Checkpoint tensors that hold the weights and biases of modules, ties followed."""
    found: set[str] = set()
    for name in modules:
        row = base.modules[name]
        source = base.modules[row.tied_to] if row.tied_to and not row.weight else row
        found.update((*row.weight, *source.weight, *([row.bias] if row.bias else [])))
    return sorted(found)


def config_digest(config: Mapping[str, Any]) -> str:
    """Of the config without what changes when the same model is saved again."""
    import rfc8785

    try:
        return digest_of(canonical(_stable(config)))
    except rfc8785.CanonicalizationError as error:
        raise DamagedError(f"config.json holds a number that JSON cannot: {error}") from error


def _stable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _stable(v) for k, v in value.items() if k not in VOLATILE}
    return [_stable(item) for item in value] if isinstance(value, list) else value


def origin_of(base: Base) -> tuple[str | None, str | None]:
    """Hub id and commit of a base that lies in the Hub's local cache."""
    found = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]?$", base.name)
    return (found[1].replace("--", "/", 1), found[2]) if found else (None, None)


def _fault(name: str, value: object, expected: str) -> DamagedError:
    return DamagedError(f"the base's {name} is {clean(repr(value))}, expected {expected}")


def _text(entry: Mapping[str, Any], name: str) -> str | None:
    value = entry.get(name)
    if value is not None and not isinstance(value, str):
        raise _fault(name, value, "a string")
    return value


def _digest(entry: Mapping[str, Any], name: str, shown: str = "") -> str | None:
    """64 hex digits, as digests are kept in memory; records write them with their algorithm."""
    value = entry.get(name)
    if value is None:
        return None
    match = DIGEST.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise _fault(shown or name, value, "sha256: and 64 hex digits")
    return match[1]


def _written(digest: str | None) -> str | None:
    return None if digest is None else f"sha256:{digest}"


def _count(entry: Mapping[str, Any], name: str, shown: str = "") -> int | None:
    value = entry.get(name)
    if value is not None and (type(value) is not int or value < 0):
        raise _fault(shown or name, value, "a count")
    return value


def _object(entry: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = entry.get(name, {})
    if not isinstance(value, Mapping):
        raise _fault(name, value, "an object")
    return value


def _root(entry: Mapping[str, Any], name: str) -> str | None:
    return _digest(_object(entry, name), "root", f"{name} root")


def _blob(entry: Mapping[str, Any]) -> tuple[str, int] | None:
    found = _object(entry, "sketch")
    digest, size = _digest(found, "digest", "sketch digest"), _count(found, "size", "sketch size")
    return None if digest is None or size is None else (digest, size)


def _quantization(entry: Mapping[str, Any]) -> Quantization | None:
    if "quantization" not in entry:
        return None
    found = _object(entry, "quantization")
    double = found.get("double_quant")
    method = _text(found, "method")
    if method is None or not (double is None or isinstance(double, bool)):
        raise _fault("quantization", dict(found), "a method, and double_quant true or false")
    compute = _text(found, "compute_dtype")
    return Quantization(method, double, compute, _count(found, "block_size"))

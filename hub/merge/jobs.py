"""The tensors of the merged checkpoint, one job each, file by file as the base has them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from adapterkit.hub.bases.base import Base, Module
from adapterkit.hub.bases.packed import auxiliary, constants_of, scales_of, state_of
from adapterkit.hub.headers import DTYPE_BITS, FLOATS, Stored
from adapterkit.hub.merge.lowering import Lowering
from adapterkit.hub.merge.onto import Ground, stored_dtype
from adapterkit.hub.merge.places import Added, Place
from adapterkit.hub.merge.shard import Spec
from adapterkit.hub.quant.packing import NAMES, Scheme, sizes
from adapterkit.hub.tensors import DTYPES

COPY, DENSE, PACK = "copy", "dense", "pack"


@dataclass(frozen=True)
class Job:
    """key: the tensor's name in the merged file. source: the base's tensor it is made from, None
    for one that only an adapter has. place: None for what belongs to no module."""

    key: str
    form: str
    source: str | None
    place: Place | None = None


@dataclass(frozen=True, eq=False)
class Output:
    """What is written. dtype: of dense tensors, None for each its own. scheme: of those in
    `packed`, which are modules; None where nothing is quantized. correction_rank: of the LoRA that
    holds what that loses; None for none."""

    base: Base
    lowering: Lowering
    ground: Ground
    places: Mapping[str, Place]
    dtype: torch.dtype | None = None
    scheme: Scheme | None = None
    packed: frozenset[str] = frozenset()
    added: tuple[Added, ...] = ()
    correction_rank: int | None = None
    hidden: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", frozenset(auxiliary(self.base.tensors)))

    def row(self, place: Place) -> Module:
        return self.base.modules[place.row]

    def dtype_of(self, key: str) -> torch.dtype:
        """Of a dense tensor, or what a quantized one is dequantized to."""
        return self.dtype or stored_dtype(self.base, key)

    def is_packed(self, place: Place | None) -> bool:
        return place is not None and place.parameter == "weight" and place.row in self.packed

    def is_requantized(self, place: Place | None) -> bool:
        """Whether the base's weight goes through quantization before it is merged onto."""
        named = place is not None and place.row in self.ground.quantized
        return named and self.ground.scheme is not None and (place or Place("")).parameter != "bias"

    def is_touched(self, place: Place | None) -> bool:
        return place is not None and place.row in self.lowering.rows

    def shards(self) -> dict[str, list[Job]]:
        """File -> its jobs, in the order of the base; what is added comes into the last file."""
        files = {source.name: name for name, source in self.base.weight_files.items()}
        found: dict[str, list[Job]] = {name: [] for name in self.base.weight_files}
        dropped: set[str] = set()
        jobs = {key: self._job(key) for key in self.base.tensors if key not in self.hidden}
        for key, job in jobs.items():
            if job.form != COPY and is_stored_packed(self.base.tensors, key):
                dropped.update(constants_of(self.base.tensors, key))
                dropped.add(key.removesuffix("weight") + "weight_format")
        for key, stored in self.base.tensors.items():
            if key not in dropped:
                job = jobs.get(key) or Job(key, COPY, key)
                found[files[stored.source.name]].append(job)
        last = found[max(found)]
        last += [Job(one.key, DENSE, one.source, one.place) for one in self.added]
        return found

    def _job(self, key: str) -> Job:
        place, stored = self.places.get(key), self.base.tensors[key]
        was_packed = is_stored_packed(self.base.tensors, key)
        if self.is_packed(place):
            same = was_packed and self.scheme == _scheme(self.base)
            form = COPY if same and not self.is_touched(place) else PACK
        elif was_packed or self.is_touched(place) or self.is_requantized(place):
            form = DENSE
        else:
            cast = stored.dtype in FLOATS and self.dtype not in (None, DTYPES[stored.dtype])
            form = DENSE if cast else COPY
        return Job(key, form, key, place)

    def specs(self, job: Job) -> Iterator[Spec]:
        """The tensors of a job, with the most bytes that each can have."""
        stored = self.base.tensors.get(job.source or "")
        if job.form == COPY and stored is not None:
            yield Spec(job.key, stored.dtype, stored.shape, stored.size)
        elif job.form == PACK and job.place is not None and self.scheme is not None:
            row = self.row(job.place)
            count = math.prod(row.shape)
            for name, size in sizes(job.key, count, row.n_out, self.scheme).items():
                yield Spec(name, "F32", row.shape, size)
        else:
            shape = self.shape(job)
            dtype = NAMES[self.dtype_of(job.source or self._any_dense)]
            yield Spec(job.key, dtype, shape, math.prod(shape) * DTYPE_BITS[dtype] // 8)

    @property
    def _any_dense(self) -> str:
        """A tensor of the dtype that a new one gets."""
        return next(k for k, s in self.base.tensors.items() if k not in self.hidden and s.shape)

    def shape(self, job: Job) -> tuple[int, ...]:
        """As the file has it, unpacked."""
        if job.source is not None:
            state = state_of(self.base.tensors, job.source)
            return state.shape if state is not None else self.base.tensors[job.source].shape
        place = job.place or Place("")
        return self.new_shape(place)

    def new_shape(self, place: Place) -> tuple[int, ...]:
        """Of a tensor that only an adapter has: it brings its own number of labels."""
        for each in self.lowering.inputs:
            role = f"replace.{place.parameter}"
            if (place.row, role) in each.tensors:
                return tuple(each.tensors[place.row, role].shape)
        row = self.row(place)
        return row.shape if place.parameter == "weight" else (row.n_out,)


def is_stored_packed(tensors: Mapping[str, Stored], key: str) -> bool:
    return state_of(tensors, key) is not None or scales_of(tensors, key) is not None


def _scheme(base: Base) -> Scheme | None:
    return Scheme.of(base.quantization)

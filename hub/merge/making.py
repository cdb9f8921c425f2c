"""One job done: a tensor read by blocks, changed, rounded once, measured and written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.hub.bases.base import EXPERTS, Module
from adapterkit.hub.compose.plan import Weighted
from adapterkit.hub.findings import clean
from adapterkit.hub.headers import Stored
from adapterkit.hub.merge.fidelity import Fidelity, Measure
from adapterkit.hub.merge.jobs import COPY, PACK, Job, Output
from adapterkit.hub.merge.places import Place
from adapterkit.hub.merge.shard import ShardWriter, as_bytes
from adapterkit.hub.merge.update import (
    TRANSPOSED,
    Update,
    moves_bias,
    new_bias,
    of_expert,
    of_weight,
    on_bias,
)
from adapterkit.hub.primitives import BiasShift, Gain, Replace
from adapterkit.hub.quant.packing import Scheme, pack
from adapterkit.hub.quant.stored import DTYPES as NAMED
from adapterkit.hub.quant.stored import read_stored
from adapterkit.hub.tensors import DTYPES
from adapterkit.registry.errors import InvalidError, MismatchError

# Values seen at a time.
ENTRIES = 1 << 18
COPIED = 1 << 23
WORDS = {dtype: name for name, dtype in NAMED.items()} | {torch.float64: "float64"}


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of a tensor from `start`, and what happens to them; rows: None for all."""

    start: int
    rows: int | None
    update: Update


class Maker:
    """writer: None to measure only."""

    def __init__(self, output: Output, *, peft: bool = False) -> None:
        self.output, self._peft = output, peft

    def run(self, job: Job, writer: ShardWriter | None) -> Fidelity | None:
        """Writes the tensors of the job; what became of the adapters in it, None for nothing."""
        place = job.place
        if job.form == COPY or place is None:
            self._copy(job, writer)
            return None
        if job.source is None:
            return self._new(job, place, writer)
        updates = self.output.lowering.updates(place.row)
        if place.parameter == "bias":
            return self._bias(job, place, updates, writer)
        self._require_bias(place, updates)
        pieces = self._pieces(place, updates)
        if job.form == PACK:
            return self._pack(job, place, pieces[0].update, writer)
        if self.output.is_requantized(place) or self._is_packed(job):
            return self._dequantized(job, place, pieces[0].update, writer)
        return self._stream(job, place, pieces, writer)

    def _require_bias(self, place: Place, updates: list[Weighted]) -> None:
        if self.output.row(place).bias is None and any(
            isinstance(update.primitive, BiasShift) for update in updates
        ):
            raise MismatchError(f"{clean(place.row)} has no bias, and the adapters add one")

    def _is_packed(self, job: Job) -> bool:
        return not self._stored(job).dtype.startswith(("F", "B"))

    def _stored(self, job: Job) -> Stored:
        return self.output.base.tensors[job.source or ""]

    def _copy(self, job: Job, writer: ShardWriter | None) -> None:
        if writer is None:
            return
        (spec,) = self.output.specs(job)
        stored = self._stored(job)
        if job.form == COPY:
            writer.add(spec, _raw(stored))
            return
        writer.add(spec, (as_bytes(b.to(DTYPES[spec.dtype])) for _, b in _blocks(stored)))

    def _new(self, job: Job, place: Place, writer: ShardWriter | None) -> Fidelity:
        """A parameter that only an adapter has."""
        updates = self.output.lowering.updates(place.row)
        is_bias = place.parameter == "bias"
        acting = [
            u for u in updates if on_bias(u.primitive) == is_bias or isinstance(u.primitive, Gain)
        ]
        found = [u.primitive for u in acting if isinstance(u.primitive, Replace) and u.weight == 1]
        if len(found) != 1 or len(acting) != 1:
            raise InvalidError(
                f"{clean(place.row)} is not in the base's checkpoint: it takes weight 1 from one"
                f" adapter that brings its {place.parameter}"
            )
        (only,) = found
        (spec,) = self.output.specs(job)
        made = only.T.to(DTYPES[spec.dtype])
        self._require_finite(place, made)
        if writer is not None:
            writer.add(spec, [as_bytes(made)])
        row = self.output.row(place)
        measure = Measure(place.name(row), WORDS[made.dtype])
        wanted = only.T.double()
        measure.add(torch.zeros_like(wanted), wanted, made.double())
        return measure.result()

    def _pieces(self, place: Place, updates: list[Weighted]) -> list[Piece]:
        row = self.output.row(place)
        if row.type != EXPERTS:
            return [Piece(0, None, of_weight(row, updates, peft=self._peft))]
        count, height, _ = row.shape
        if place.expert is not None:
            part = slice(place.start, place.stop)
            return [Piece(0, None, self._of_expert(row, updates, place.expert, part))]
        every = slice(0, height)
        return [
            Piece(e * height, height, self._of_expert(row, updates, e, every)) for e in range(count)
        ]

    def _of_expert(self, row: Module, updates: list[Weighted], expert: int, part: slice) -> Update:
        own = [Weighted(u.weight, of_expert(u.primitive, expert, part)) for u in updates]
        return of_weight(row, own, peft=self._peft)

    def _bias(
        self, job: Job, place: Place, updates: list[Weighted], writer: ShardWriter | None
    ) -> Fidelity | None:
        (spec,) = self.output.specs(job)
        stored, dtype = self._stored(job), DTYPES[spec.dtype]
        bias = read_stored(self.output.base.tensors, stored.key)
        moved = moves_bias(updates)
        row = self.output.row(place)
        wanted = new_bias(row, bias.double(), updates, peft=self._peft) if moved else bias.double()
        made = wanted.to(dtype)
        self._require_finite(place, made)
        if writer is not None:
            writer.add(spec, [as_bytes(made)])
        if not moved:
            return None
        measure = Measure(place.name(row), WORDS[dtype])
        measure.add(bias.double(), wanted, made.double())
        return measure.result()

    def _stream(
        self, job: Job, place: Place, pieces: list[Piece], writer: ShardWriter | None
    ) -> Fidelity | None:
        """A dense tensor, block by block."""
        (spec,) = self.output.specs(job)
        stored, dtype = self._stored(job), DTYPES[spec.dtype]
        changed = not all(piece.update.is_empty for piece in pieces)
        measure = Measure(place.name(self.output.row(place)), WORDS[dtype])
        made = (
            as_bytes(block)
            for piece in pieces
            for block in self._changed(stored, piece, place, dtype, measure)
        )
        if writer is not None:
            writer.add(spec, made)
        elif changed:
            for _ in made:
                pass
        return measure.result() if changed else None

    def _changed(
        self, stored: Stored, piece: Piece, place: Place, dtype: torch.dtype, measure: Measure
    ) -> Iterator[Tensor]:
        update, cast = piece.update, DTYPES[stored.dtype] != dtype
        for start, block in _blocks(stored, piece.start, piece.rows, whole=update.is_whole):
            if update.is_empty:
                yield block.to(dtype)
                continue
            w = block.float() if block.dtype != torch.float64 else block
            target = update.applied(w, start)
            found = target.to(dtype)
            own = w.to(dtype).to(w.dtype) if cast else None
            if not measure.add(w, target, found.to(w.dtype), own):
                self._require_finite(place, found)
            yield found

    def _base(self, job: Job, place: Place) -> Tensor:
        """What is merged onto, as the file lies, float32."""
        row = self.output.row(place)
        w = read_stored(self.output.base.tensors, self._stored(job).key).float()
        if not self.output.is_requantized(place):
            return w
        turned = row.type in TRANSPOSED
        found = self.output.ground.requantized(row.name, w.mT if turned else w)
        return found.mT if turned else found

    def _dequantized(
        self, job: Job, place: Place, update: Update, writer: ShardWriter | None
    ) -> Fidelity | None:
        """A quantized weight, or one that is to be as if it were, made dense."""
        (spec,) = self.output.specs(job)
        w = self._base(job, place)
        dtype = DTYPES[spec.dtype]
        target = w if update.is_empty else update.applied(w)
        found = target.to(dtype)
        self._require_finite(place, found)
        if writer is not None:
            writer.add(spec, [as_bytes(found)])
        if update.is_empty:
            return None
        measure = Measure(place.name(self.output.row(place)), WORDS[dtype])
        measure.add(w, target, found.float(), w.to(dtype).float())
        return measure.result()

    def _pack(
        self, job: Job, place: Place, update: Update, writer: ShardWriter | None
    ) -> Fidelity | None:
        """A weight, quantized. One that no adapter changes is quantized from what is stored."""
        scheme, row = self.output.scheme or Scheme("nf4"), self.output.row(place)
        turned, dtype = row.type in TRANSPOSED, self.output.dtype_of(job.source or "")
        if update.is_empty:
            if writer is not None:
                stored = read_stored(self.output.base.tensors, job.source or "").to(dtype)
                stored = stored.mT if turned else stored
                self._emit(writer, pack(job.key, stored, scheme, dtype).tensors)
            return None
        w = self._base(job, place)
        target = update.applied(w)
        self._require_finite(place, target)
        w, target = (w.mT, target.mT) if turned else (w, target)
        packed = pack(job.key, target, scheme, dtype)
        if writer is not None:
            self._emit(writer, packed.tensors)
        base = pack(job.key, w.to(dtype), scheme, dtype).values
        measure = Measure(place.name(row), scheme.method)
        measure.add(w, target, packed.values, base)
        return measure.result()

    def _emit(self, writer: ShardWriter, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)

    def _require_finite(self, place: Place, made: Tensor) -> None:
        if not torch.isfinite(made).all():
            raise MismatchError(
                f"{clean(place.name(self.output.row(place)))} would hold NaN or Inf:"
                f" the merged values are not finite as {WORDS.get(made.dtype, made.dtype)}"
            )


def _raw(stored: Stored) -> Iterator[memoryview]:
    for start in range(stored.start, stored.stop, COPIED):
        yield memoryview(stored.source.read(start, min(COPIED, stored.stop - start)))


def _blocks(
    stored: Stored, first: int = 0, count: int | None = None, *, whole: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """(row within these rows, block (n, columns)) of the rows [first, first + count) of a tensor.

    A tensor of one dimension has one column; with a count its rows are those of its matrices."""
    dtype = DTYPES[stored.dtype]
    rows = stored.shape[0] if stored.shape else 1
    if count is None:
        count, columns = rows, math.prod(stored.shape[1:])
    else:  # of fused experts, each a matrix
        columns = stored.shape[-1]
    width = columns * dtype.itemsize
    step = count if whole else max(1, ENTRIES // max(columns, 1))
    for start in range(0, count, step):
        n = min(step, count - start)
        data = stored.source.read(stored.start + (first + start) * width, n * width)
        if data:
            yield start, torch.frombuffer(bytearray(data), dtype=dtype).reshape(n, columns)

"""One job done: a tensor read by blocks, changed, rounded once, measured and written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from adapterkit.hub.bases.base import EXPERTS, Module
from adapterkit.hub.compose.plan import Weighted
from adapterkit.hub.findings import clean
from adapterkit.hub.headers import Stored
from adapterkit.hub.merge.correction import corrected, rival, squared
from adapterkit.hub.merge.fidelity import Correction, Fidelity, Measure, is_finite, measured
from adapterkit.hub.merge.jobs import COPY, PACK, Job, Output
from adapterkit.hub.merge.places import Place
from adapterkit.hub.merge.shard import Sink, as_bytes
from adapterkit.hub.merge.streaming import Piece, changed, raw
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

WORDS = {dtype: name for name, dtype in NAMED.items()} | {torch.float64: "float64"}


class Maker:
    """writer: None to measure only."""

    def __init__(self, output: Output, *, peft: bool = False) -> None:
        self.output, self._peft = output, peft

    def run(self, job: Job, writer: Sink | None) -> Fidelity | None:
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

    def _copy(self, job: Job, writer: Sink | None) -> None:
        if writer is None:
            return
        (spec,) = self.output.specs(job)
        stored = self._stored(job)
        if job.form == COPY:
            writer.add(spec, raw(stored))
            return
        cast = changed(stored, [Piece(0, None, Update(False))], DTYPES[spec.dtype])
        writer.add(spec, (as_bytes(made.values) for made in cast))

    def _new(self, job: Job, place: Place, writer: Sink | None) -> Fidelity:
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
        wanted = only.T.double()
        nothing = torch.zeros_like(wanted)
        return measured(place.name(row), WORDS[made.dtype], nothing, wanted, made.double())

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
        self, job: Job, place: Place, updates: list[Weighted], writer: Sink | None
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
        name = place.name(row)
        return measured(name, WORDS[dtype], bias.double(), wanted, made.double())

    def _stream(
        self, job: Job, place: Place, pieces: list[Piece], writer: Sink | None
    ) -> Fidelity | None:
        """A dense tensor, chunk by chunk."""
        (spec,) = self.output.specs(job)
        dtype = DTYPES[spec.dtype]
        is_changed = not all(piece.update.is_empty for piece in pieces)
        measure = Measure(place.name(self.output.row(place)), WORDS[dtype])
        if writer is not None:
            writer.add(spec, self._chunks(job, place, pieces, dtype, measure))
        elif is_changed:
            for _ in self._chunks(job, place, pieces, dtype, measure):
                pass
        return measure.result() if is_changed else None

    def _chunks(
        self, job: Job, place: Place, pieces: list[Piece], dtype: torch.dtype, measure: Measure
    ) -> Iterator[memoryview]:
        for made in changed(self._stored(job), pieces, dtype):
            if made.found is not None:
                measure.add(made.found)
                if not is_finite(made.found):
                    self._require_finite(place, made.values)
            yield as_bytes(made.values)

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
        self, job: Job, place: Place, update: Update, writer: Sink | None
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
        name = place.name(self.output.row(place))
        return measured(name, WORDS[dtype], w, target, found.float(), base=w.to(dtype).float())

    def _pack(
        self, job: Job, place: Place, update: Update, writer: Sink | None
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
        again = partial(pack, job.key, scheme=scheme, dtype=dtype)
        packed = again(target)
        is_so_already = self._is_packed(job) and scheme == Scheme.of(self.output.base.quantization)
        base = w if is_so_already else again(w.to(dtype)).values
        found = partial(measured, place.name(row), scheme.method, w, target, base=base)
        rank = self.output.correction_rank
        if rank is None:
            if writer is not None:
                self._emit(writer, packed.tensors)
            return found(packed.values)
        best = corrected(target, packed, rank, again)
        factors = None if turned else update.factors
        other = rival(base, factors or target - w, rank)
        if writer is not None:
            self._emit(writer, best.packed.tensors)
            writer.add_factors(place.row, best.factors)
        left = squared(other - target)
        correction = Correction(found(packed.values), found(other), best.left, left)
        return replace(found(best.values), correction=correction)

    def _emit(self, writer: Sink, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)

    def _require_finite(self, place: Place, made: Tensor) -> None:
        if not torch.isfinite(made).all():
            raise MismatchError(
                f"{clean(place.name(self.output.row(place)))} would hold NaN or Inf:"
                f" the merged values are not finite as {WORDS.get(made.dtype, made.dtype)}"
            )

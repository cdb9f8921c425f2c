"""A setup, for one place: which networks run there, in what order, on which rows and tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterkit.hub.compose import networks
from adapterkit.hub.compose.blocks import Average, BatchSplit, Block, Fuse, Parallel, Split, Stack
from adapterkit.hub.compose.networks import State
from adapterkit.hub.fields import Wiring
from adapterkit.hub.primitives import Bottleneck, Coupling, Fusion
from adapterkit.registry.errors import InvalidError

Run = Callable[[State], State]
Network = Bottleneck | Coupling


@dataclass(frozen=True)
class Site:
    """What is at one place. name: of the place. networks: of each adapter that has one here, with
    its weight. fusion: the matrices of a Fuse here, None if it has none."""

    name: str
    networks: Mapping[str, tuple[Network, float]]
    fusion: Callable[[Fuse], Fusion | None]


def build(child: str | Block, site: Site) -> Run | None:
    """What a setup does at a place; None where it does nothing."""
    if isinstance(child, str):
        return _leaf(child, site)
    if not any(name in site.networks for name in child):
        return None
    return BUILDERS[type(child)](child, site)


def _leaf(name: str, site: Site) -> Run | None:
    if name not in site.networks:
        return None
    network, weight = site.networks[name]
    if isinstance(network, Coupling):
        return lambda state: replace(state, h=networks.coupled(state.h, network))
    return lambda state: networks.single(state, network, weight)


def _children(block: Block, site: Site) -> list[Run]:
    """Of each child, what it does; a child without a network here changes nothing."""
    return [build(child, site) or _nothing for child in block.children]


def _nothing(state: State) -> State:
    return state


def _stack(block: Stack, site: Site) -> Run:
    runs = [run for run in (build(child, site) for child in block.children) if run is not None]

    def run(state: State) -> State:
        for each in runs:
            state = each(state)
        return state

    return run


def _parallel(block: Parallel, site: Site) -> Run:
    """The batch is repeated where the model is entered (`compose/entry.py`)."""
    runs = _children(block, site)

    def run(state: State) -> State:
        rows = len(state.h) // len(runs)
        return _on_parts(state, runs, [rows] * len(runs), dim=0)

    return run


def _batch_split(block: BatchSplit, site: Site) -> Run:
    runs = _children(block, site)
    return lambda state: _on_parts(state, runs, block.batch_sizes, dim=0)


def _split(block: Split, site: Site) -> Run:
    runs = _children(block, site)
    return lambda state: _on_parts(state, runs, block.splits, dim=1)


def _on_parts(state: State, runs: Sequence[Run], sizes: Sequence[int], dim: int) -> State:
    if sum(sizes) != state.h.shape[dim]:
        what = "rows" if dim == 0 else "tokens"
        raise InvalidError(
            f"the setup splits {sum(sizes)} {what} into {list(sizes)}, found {state.h.shape[dim]}"
        )
    hs, x0s = (torch.split(t, list(sizes), dim) for t in (state.h, state.x0))
    parts = [
        run(replace(state, h=h, x0=x0, up=None)) for run, h, x0 in zip(runs, hs, x0s, strict=True)
    ]
    ups = [part.up for part in parts if part.up is not None]
    return replace(
        state,
        h=torch.cat([part.h for part in parts], dim),
        up=torch.cat(ups, dim) if len(ups) == len(parts) else None,
        last=_last(parts),
    )


def _average(block: Average, site: Site) -> Run:
    runs = _children(block, site)

    def run(state: State) -> State:
        parts = [each(state) for each in runs]
        weighted = [weight * part.h for weight, part in zip(block.weights, parts, strict=True)]
        return replace(state, h=torch.stack(weighted).sum(0), up=None, last=_last(parts))

    return run


def _last(parts: Sequence[State]) -> Wiring | None:
    return next((part.last for part in reversed(parts) if part.last is not None), None)


def _fuse(block: Fuse, site: Site) -> Run:
    """z is that of the last adapter; the children make what they make of z itself, as they did when
    the fusion was trained."""
    present = [child for child in block.children if build(child, site) is not None]
    joined = [site.networks[name][0] for name in block if name in site.networks]
    bottlenecks = [net for net in joined if isinstance(net, Bottleneck)]
    if len(bottlenecks) < len(joined):
        raise InvalidError(f"{block!r} joins bottlenecks, found an invertible one at {site.name}")
    fusion = site.fusion(block)
    if fusion is None or len(present) < len(block.children):
        missing = "its matrices" if fusion is None else "one of its adapters"
        raise InvalidError(f"{block!r} lacks {missing} at {site.name}")
    made = [_maker(child, site) for child in present]
    last = bottlenecks[-1]

    def run(state: State) -> State:
        z, residual = networks.enter(state, last.wiring)
        query = state.h if fusion.mixing.query_before and not last.wiring.parallel else z
        ups = [make(replace(state, h=z)) for make in made]
        if last.wiring.parallel:  # there the library adds x0 as well
            residual = residual + z
        h = networks.fused(ups, fusion, query, residual)
        return replace(state, h=h, up=None, last=last.wiring)

    return run


def _maker(child: str | Block, site: Site) -> Callable[[State], Tensor]:
    """What a joined child makes before anything is added to it."""
    if isinstance(child, str):
        network = site.networks[child][0]
        if not isinstance(network, Bottleneck):
            raise InvalidError(f"{child} has no bottleneck at {site.name}")
        return lambda state: networks.made(network, state.h)
    run = build(child, site) or _nothing

    def make(state: State) -> Tensor:
        up = run(state).up
        if up is None:
            raise InvalidError(f"{child!r} makes nothing that can be fused at {site.name}")
        return up

    return make


BUILDERS: dict[type[Block], Callable[..., Run]] = {
    Stack: _stack,
    Fuse: _fuse,
    Parallel: _parallel,
    Split: _split,
    BatchSplit: _batch_split,
    Average: _average,
}

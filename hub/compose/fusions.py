"""Fusions among what is attached: they act only in a Fuse that names what they join."""

from __future__ import annotations

from collections.abc import Mapping

from adapterkit.hub.compose.blocks import Fuse, Setup, Stack
from adapterkit.hub.compose.lowering import Lowered
from adapterkit.hub.findings import clean
from adapterkit.hub.primitives import Context, Fusion
from adapterkit.registry.errors import ConflictError, InvalidError, NotFoundError


def joined_by(lowered: Lowered) -> tuple[str, ...]:
    """Names of the adapters that a fusion joins, () for any other kind."""
    if not lowered.holds(Fusion):
        return ()
    made = (primitive for each in lowered.updates.values() for primitive in each)
    return next((p.names for p in made if isinstance(p, Fusion)), ())


def fusion_for(block: Fuse, lowered: Mapping[str, Lowered]) -> str:
    """The attached fusion that a Fuse means. Raises NotFoundError, InvalidError."""
    if block.name is not None:
        if block.name not in lowered:
            raise NotFoundError(f"no fusion is attached as {clean(block.name)}, for {block!r}")
        if not joined_by(lowered[block.name]):
            raise InvalidError(f"{clean(block.name)}, which {block!r} names, is no fusion")
        return block.name
    found = [name for name, one in lowered.items() if joined_by(one) == block.joined]
    if not found:
        raise NotFoundError(
            f"no fusion of {', '.join(map(clean, block.joined))} is attached",
            hint="attach the folder with adapter_fusion_config.json, and name it: Fuse(..., name=)",
        )
    if len(found) > 1:
        shown = ", ".join(map(clean, found))
        raise InvalidError(f"several fusions join {block.joined}: {shown}", hint="Fuse(..., name=)")
    return found[0]


def require_composed(active: Setup, lowered: Mapping[str, Lowered]) -> None:
    """Raises InvalidError for a fusion that is given a weight: alone it means nothing; and for one
    whose number of adapters is another."""
    for name in active:
        if names := joined_by(lowered[name]):
            shown = ", ".join(repr(each) for each in names)
            raise InvalidError(f"{clean(name)} joins {', '.join(names)}", hint=f"Fuse({shown})")
    for block in active.block.blocks() if active.block else ():
        if isinstance(block, Fuse):
            names = joined_by(lowered[fusion_for(block, lowered)])
            if len(names) != len(block.children):
                raise InvalidError(f"{block!r}: its fusion joins {len(names)} adapters")
    _require_placeable(active, lowered)


def _require_placeable(active: Setup, lowered: Mapping[str, Lowered]) -> None:
    """Raises InvalidError for an adapter of the context, which is one for the whole batch and every
    token, inside a block that takes the batch or its tokens apart."""
    for block in active.block.blocks() if active.block else ():
        for name in () if isinstance(block, Stack) else block:
            made = (primitive for each in lowered[name].updates.values() for primitive in each)
            if any(isinstance(primitive, Context) for primitive in made):
                raise InvalidError(
                    f"{clean(name)} adds to the context, so it stands in a Stack, not in {block!r}"
                )


def require_unused(name: str, active: Setup, lowered: Mapping[str, Lowered]) -> None:
    """Raises ConflictError if what is active names an adapter, or a fusion by what it joins."""
    block = active.block
    if block is None:
        return
    fusions = [fusion_for(each, lowered) for each in block.blocks() if isinstance(each, Fuse)]
    if name in (*active, *fusions):
        raise ConflictError(f"{clean(name)} is part of {block!r}, which is active")

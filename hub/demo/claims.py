"""What the demo claims. A demo that cannot fail shows nothing, so every claim is tested."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from adapterkit.hub.demo.corpus import PLAIN, TASKS
from adapterkit.registry.errors import AdapterError

# Loss in nats a character by row (what is active) and column (whose held-out sentences).
Losses = Mapping[str, Mapping[str, float]]

BASE, DETACHED = "base", "detached"
A, B, _ = TASKS
MIX, UNDONE = f"0.7 {A} + 0.3 {B}", f"{A} + {B} - {B}"
# Guessing among 32 characters costs 3.47; half of that needs words.
LEARNT = 1.73
TOLERANCE = 1e-4


class DemoError(AdapterError):
    """Something that the demo shows is not so."""


def require(holds: bool, claim: str, found: str) -> None:
    if not holds:
        raise DemoError(
            f"the demo shows that {claim}, but found {found}",
            hint="this is a defect of adapterkit or of a library below it, please report it",
        )


def require_losses(losses: Losses, trained: Mapping[str, float]) -> None:
    """trained: the loss of each adapter on its own text when it was trained."""
    _learnt(losses)
    _returned(losses, trained)
    _composed(losses)


def require_same(row: str, same: str, apart: float, limit: float = TOLERANCE) -> None:
    require(apart <= limit, f"{row} is {same} within {limit:g}", f"a difference of {apart:.1e}")


def require_equal(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    changed = [name for name in before if not after[name].equal(before[name])]
    require(not changed, f"{DETACHED} is {BASE}, bit for bit", f"changes in {', '.join(changed)}")


def _learnt(losses: Losses) -> None:
    """The base knows its own world, each adapter its own and no other."""
    found = losses[BASE][PLAIN]
    require(found < LEARNT, f"the base has learnt {PLAIN}, a loss below {LEARNT}", f"{found:.3f}")
    for task in TASKS:
        own = losses[task][task]
        others = {row: losses[row][task] for row in (BASE, *TASKS) if row != task}
        row, least = min(others.items(), key=lambda item: item[1])
        claim = f"the adapter {task} has less than half the loss of anything else on its own text"
        require(2 * own < least, claim, f"{own:.3f} against {least:.3f} of {row}")


def _returned(losses: Losses, trained: Mapping[str, float]) -> None:
    """What comes back from the remote computes what was trained, by another implementation."""
    for task, loss in trained.items():
        apart = abs(losses[task][task] - loss)
        require_same(f"{task}, pulled and attached,", "what was trained", apart)


def _composed(losses: Losses) -> None:
    """A weighted sum lies between its parts; what is subtracted or detached is gone."""
    for task in (A, B):
        low, mixed, high = (losses[row][task] for row in (task, MIX, BASE))
        claim = f"{MIX} lies between {task} and {BASE} on the text of {task}"
        require(low < mixed < high, claim, f"{mixed:.3f}, not between {low:.3f} and {high:.3f}")
    for row, same, limit in ((UNDONE, A, TOLERANCE), (DETACHED, BASE, 0.0)):
        for world, loss in losses[row].items():
            require_same(f"{row} on {world}", same, abs(loss - losses[same][world]), limit)

"""What kinds have in common whose tensors belong to places in layers: form, faults, schema."""

from __future__ import annotations

from collections.abc import Mapping

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.places import PAGE, PLACES
from adapterkit.hub.findings import ERROR, UNSUPPORTED, Finding
from adapterkit.hub.headers import Stored
from adapterkit.hub.kinds import replaced
from adapterkit.hub.kinds.base import Expected
from adapterkit.hub.kinds.targeted import form_faults

REPLACED = ("replace.", "wrapper.")
# One that no base was asked for is None.
Size = int | None
Form = Mapping[str, tuple[Size, ...]]


def own(adapter: Adapter) -> dict[str, dict[str, Stored]]:
    """path -> role -> tensor, of those that belong to places: not what a head replaces."""
    held = {
        path: {role: t for role, t in tensors.items() if not role.startswith(REPLACED)}
        for path, tensors in adapter.modules.items()
    }
    return {path: tensors for path, tensors in held.items() if tensors}


def faults(tensors: Mapping[str, Stored], path: str, form: Form) -> list[Finding]:
    """What is missing, too much or of another shape among the tensors of one place."""
    found: list[Finding] = []
    for role, stored in tensors.items():
        if role not in form:
            about = f"a tensor {role}, for which the config leaves no place"
            found.append(Finding(ERROR, "unexpected-tensor", stored.key, f"no {role}", about))
        found += form_faults(stored, form.get(role))
    about = "none, though the config asks for it"
    found += [
        Finding(ERROR, "missing-tensor", path or "all layers", f"a tensor {role}", about)
        for role in form
        if role not in tensors
    ]
    return found


def problems(adapter: Adapter) -> list[Finding]:
    """Of what a head replaces, which has no form that is known without a base, and of the rest that
    any kind may replace."""
    parts = (t for (_, role), t in adapter.tensors.items() if role.startswith(REPLACED))
    found = [fault for stored in parts for fault in form_faults(stored, None)]
    return found + replaced.problems(adapter, adapter.fields.replaced)


def expected(path: str, form: Form) -> dict[tuple[str, str], Expected]:
    return {(path, role): Expected(tuple(n or 0 for n in shape)) for role, shape in form.items()}


def unplaced(base: Base) -> list[Finding]:
    """That the family has no row; then no tensor of the adapter has a place."""
    if base.model_type in PLACES:
        return []
    about = f"no places are known in the layers of {base.model_type or 'this model'}"
    known = f"one of {', '.join(PLACES)}"
    return [Finding(ERROR, UNSUPPORTED, "model_type", known, about, f"see {PAGE}")]

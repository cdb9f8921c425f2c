"""What kinds have in common whose tensors follow from their config: form, faults, schema."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import Module
from adapterkit.hub.findings import ERROR, UNSUPPORTED, WARNING, Finding, clean
from adapterkit.hub.headers import FLOATS, Stored
from adapterkit.hub.kinds import replaced
from adapterkit.hub.kinds.base import Expected, Schema

IN, OUT = "in", "out"
# role -> shape: a number, IN or OUT of the module, or None for whatever the file says
Form = Mapping[str, tuple[int | str | None, ...]]
Tensors = Mapping[str, Stored]


@dataclass(frozen=True)
class Rules:
    """roles: all that are the kind's own. types: of modules it can change. form: the tensors of one
    module, by its name and the tensors that the file has for it."""

    roles: frozenset[str]
    types: Collection[str]
    form: Callable[[str, Tensors], Form]


def problems(adapter: Adapter, rules: Rules) -> list[Finding]:
    """What is wrong in itself: tensors missing or too many in a module, shapes, dtypes."""
    found: list[Finding] = []
    modules = adapter.modules
    for module, tensors in modules.items():
        own = rules.roles & tensors.keys()
        form = rules.form(module, tensors) if own else {}
        for role, stored in tensors.items():
            sizes = form.get(role)
            if role in own and sizes is None:
                about = f"a tensor {role}, for which the config leaves no place"
                found.append(
                    Finding(ERROR, "unexpected-tensor", stored.key, f"no {role}", about)
                )
            found += form_faults(stored, sizes)
        found += _incomplete(module, form, tensors)
    if not any(rules.roles & tensors.keys() for tensors in modules.values()):
        found.append(Finding(ERROR, "no-factors", "the weights", f"{adapter.kind} tensors", "none"))
    else:
        found += untargeted(adapter)
    return found + replaced.problems(adapter, adapter.fields.replaced)


def schema(adapter: Adapter, modules: Mapping[str, Module], rules: Rules) -> Schema:
    """The kind's tensors on the targeted modules of a base, and whatever the config replaces."""
    tensors: dict[tuple[str, str], Expected] = {}
    findings = []
    selected, held = adapter.targets.select(modules), adapter.modules
    for name in selected:
        module = modules[name]
        if module.type not in rules.types:
            findings.append(unsupported(module, rules.types))
            continue
        sizes = {IN: module.n_in, OUT: module.n_out}
        for role, shape in rules.form(name, held.get(name, {})).items():
            full = tuple(sizes.get(n, 0) if isinstance(n, str) else n or 0 for n in shape)
            tensors[name, role] = Expected(full)
    findings += unmatched(adapter, modules, selected)
    rest = replaced.schema(adapter, adapter.fields.replaced, modules, selected)
    return Schema(rest.tensors | tensors, (*findings, *rest.findings))


def unsupported(module: Module, types: Collection[str]) -> Finding:
    about = f"a {module.type} module"
    return Finding(ERROR, UNSUPPORTED, module.name, f"one of {', '.join(types)}", about)


def untargeted(adapter: Adapter) -> list[Finding]:
    """Tensors of a kind that needs targets, and a config that names none."""
    if adapter.targets.modules or adapter.targets.parameters:
        return []
    shown = repr(adapter.config.get("target_modules"))
    return [Finding(ERROR, "no-targets", "target_modules", "names or a pattern", shown)]


def unmatched(
    adapter: Adapter, modules: Mapping[str, Module], selected: Collection[object]
) -> list[Finding]:
    """Targets that mean nothing on this base. One of several names is a doubt, as lists are often
    shared between model families; a tensor that belongs to it would be an error of its own."""
    targets = adapter.targets
    if not selected and (named := targets.modules or targets.parameters):
        shown = f"no match for {clean(str(named))}"
        return [Finding(ERROR, "target-absent", "target_modules", "modules of the base", shown)]
    absent = {
        ("target_modules", "modules of the base"): targets.unmatched(modules),
        ("target_parameters", "parameters of the base"): targets.unmatched_parameters(modules),
    }
    return [
        Finding(WARNING, "target-absent", field, want, f"no match for {clean(entry)}")
        for (field, want), entries in absent.items()
        for entry in entries
    ]


def form_faults(stored: Stored, sizes: tuple[int | str | None, ...] | None) -> Iterator[Finding]:
    """Faults of one tensor in itself; sizes: its form, None if it is not the kind's own."""
    shape = f"shape {list(stored.shape)}"
    if stored.dtype not in FLOATS:
        about = f"dtype {stored.dtype}"
        yield Finding(ERROR, "wrong-dtype", stored.key, "a floating-point dtype", about)
    elif 0 in stored.shape and 0 not in (sizes or ()):
        found = f"empty {shape} with a zero size"
        yield Finding(ERROR, "empty-tensor", stored.key, "values", found)
    elif sizes is not None and len(sizes) != len(stored.shape):
        yield Finding(ERROR, "shape-mismatch", stored.key, f"{len(sizes)} dimensions", shape)
    elif sizes is not None and any(
        isinstance(want, int) and want != size
        for want, size in zip(sizes, stored.shape, strict=True)
    ):
        want = ", ".join("any" if size is None else str(size) for size in sizes)
        yield Finding(ERROR, "shape-mismatch", stored.key, f"shape [{want}]", shape)


def _incomplete(module: str, form: Form, tensors: Tensors) -> list[Finding]:
    about = "none, though the file has others of the module"
    return [
        Finding(ERROR, "missing-tensor", module, f"a tensor {role}", about)
        for role in form
        if role not in tensors
    ]

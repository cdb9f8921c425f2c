"""Does an adapter bind to a base, tensor by tensor?  A pure function of two descriptions."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import EMBEDDING, Base, Module
from adapterkit.hub.bases.modules import WIDTH_KEYS
from adapterkit.hub.bases.spelling import spelled
from adapterkit.hub.fields import HEAD, LoraFields
from adapterkit.hub.findings import ERROR, UNSUPPORTED, WARNING, Finding, clean
from adapterkit.hub.frozen import frozen
from adapterkit.hub.headers import Stored
from adapterkit.hub.kinds import schema_of
from adapterkit.hub.kinds.base import Expected
from adapterkit.hub.rooting import rooted
from adapterkit.hub.task import doubt, serves

# role -> the axis of its tensor that counts tokens, for a module with a row for each token
VOCABULARY = {
    "table": 0,
    "replace.weight": 0,
    "replace.bias": 0,
    "wrapper.modules_to_save.weight": 0,
    "wrapper.original_module.weight": 0,
    "B": 0,
    "embedding_A": 1,
}

# role -> the axis of its tensor that is the rank
RANK = {
    "A": 0, "B": 1, "embedding_A": 0, "embedding_B": 1, "experts_A": 0, "experts_B": 1,
}  # fmt: skip

# Roles of a head's own weight.
OWN_HEAD = ("replace.weight", HEAD)

# Code of the doubt that the adapter names another base than the one it is held against.
OTHER_NAME = "other-base-name"


def fit(adapter: Adapter, base: Base) -> list[Finding]:
    """All that keeps the adapter from binding to the base, and what is odd about the pair."""
    adapter = rooted(adapter, base)
    base = spelled(base, adapter.modules).base
    schema = schema_of(adapter, base)
    findings = [*adapter.findings, *schema.findings]
    incomplete = {f.tensor for f in adapter.findings if f.code == "missing-tensor"}
    findings += _missing(adapter, schema.tensors, incomplete)
    last, named = _last_layers(base), defaultdict[str, set[str]](set)
    for finding in adapter.findings:
        if finding.severity == ERROR:
            named[finding.tensor].add(finding.code)
    for (module, role), stored in adapter.tensors.items():
        expected = schema.tensors.get((module, role))
        if expected is None:
            if "unexpected-tensor" not in named[stored.key]:
                findings.append(_unexpected(adapter, base, (module, role), stored, last))
        elif module not in base.modules and expected.shape != stored.shape:
            findings += [] if named[stored.key] else [_misshaped(stored, expected)]
        elif expected.shape != stored.shape and not (
            _is_said(named[stored.key], role, stored, expected)
            or _own_head(base, module, role, stored, expected)
        ):
            findings.append(_misshapen(base, base.modules[module], role, stored, expected))
    findings += [*frozen(adapter, base), *_misplaced_head(adapter, base)]
    return findings + _untrained_heads(adapter, base) + _made_for(adapter, base)


def _is_created(base: Base, module: Module) -> bool:
    """Whether the checkpoint has nothing for it, so that it starts with random values."""
    return bool(base.tensors) and not module.weight and module.tied_to is None


def _own_head(base: Base, module: str, role: str, stored: Stored, expected: Expected) -> bool:
    """Whether this is the weight or bias of a head that only the adapter has: it brings its own
    number of labels."""
    return (
        _is_created(base, base.modules[module])
        and role.startswith("replace.")
        and len(stored.shape) == len(expected.shape)
        and stored.shape[1:] == expected.shape[1:]
    )


def _untrained_heads(adapter: Adapter, base: Base) -> list[Finding]:
    return [
        Finding(
            WARNING, "untrained-head", name, "weights in the base or the adapter", "neither has any"
        )
        for name, module in base.modules.items()
        if _is_created(base, module)
        and not any(m == name and role.startswith(OWN_HEAD) for m, role in adapter.tensors)
    ]


def _misplaced_head(adapter: Adapter, base: Base) -> list[Finding]:
    """A head of several layers stands where that of its task does, in a class that has one."""
    replaced = getattr(adapter.fields, "replaced", None)  # a fusion has no head
    if replaced is None or replaced.head is None or serves(base.architecture, adapter.task):
        return []
    want = f"a model for {adapter.task}"
    return [Finding(ERROR, "no-place-for-head", "the head", want, base.architecture)]


def _missing(
    adapter: Adapter, expected: Mapping[tuple[str, str], Expected], incomplete: set[str]
) -> list[Finding]:
    """Tensors the config implies and the file lacks; those of a broken pair are named already."""
    return [
        Finding(
            ERROR,
            "missing-tensor",
            module,
            f"a tensor {role} {list(want.shape)}",
            "none, it is missing",
        )
        for (module, role), want in expected.items()
        if want.required and (module, role) not in adapter.tensors and module not in incomplete
    ]


def _unexpected(
    adapter: Adapter,
    base: Base,
    place: tuple[str, str],
    stored: Stored,
    last: Mapping[tuple[str, str], int],
) -> Finding:
    module, role = place
    if module in base.modules:
        about = f"{module}, which the config does not target"
        if module in adapter.targets.select({module: base.modules[module]}):
            about = f"a tensor {role} for the {base.modules[module].type} module {module}"
        return Finding(ERROR, "not-targeted", stored.key, "a module the config targets", about)
    number, rest = _split(module)
    if number is not None and number > last.get(rest, number):
        expected = f"layers 0 to {last[rest]} of the base"
        return Finding(ERROR, "layer-out-of-range", stored.key, expected, f"layer {number}")
    hint = "is the adapter made for another architecture, or another task?"
    return Finding(
        ERROR,
        "no-such-module",
        stored.key,
        "a module of the base",
        f"unexpected, no match for {module}",
        hint,
    )


def _split(module: str) -> tuple[int | None, tuple[str, str]]:
    """The number of the layer, and what stands around it."""
    match = re.match(r"(.*?\.)(\d{1,9})(\..+)", module)
    return (int(match[2]), (match[1], match[3])) if match else (None, ("", ""))


def _last_layers(base: Base) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for name in base.modules:
        number, rest = _split(name)
        if number is not None:
            found[rest] = max(number, found.get(rest, 0))
    return found


def _misshapen(
    base: Base, module: Module, role: str, stored: Stored, expected: Expected
) -> Finding:
    want = f"shape {list(expected.shape)}"
    found = f"shape {list(stored.shape)}"
    axis = VOCABULARY.get(role) if _is_table(base, module) else None
    if axis is not None and _differ_only_in(axis, stored.shape, expected.shape):
        rows, here = stored.shape[axis], expected.shape[axis]
        want += f", the vocabulary size of the base ({here} rows)"
        hint = f"resize the base to {rows} rows: load(..., resize=True)"
        return Finding(ERROR, "vocabulary-resized", stored.key, want, found, hint)
    return _misshaped(stored, expected)


def _misshaped(stored: Stored, expected: Expected) -> Finding:
    want, found = f"shape {list(expected.shape)}", f"shape {list(stored.shape)}"
    return Finding(ERROR, "shape-mismatch", stored.key, want, found)


def _differ_only_in(axis: int, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return len(a) == len(b) and a[:axis] + a[axis + 1 :] == b[:axis] + b[axis + 1 :]


def _is_table(base: Base, module: Module) -> bool:
    """Whether it has a row for each token: the input embedding or the head of a language model."""
    tables = [m for m in base.modules.values() if m.type == EMBEDDING]
    largest = max(tables, key=lambda m: m.shape[0]).name if tables else ""
    return module.name in (largest, "lm_head") or module.tied_to == largest


def _is_said(named: set[str], role: str, stored: Stored, expected: Expected) -> bool:
    """Whether faults that needed no base to be seen say all that is wrong with the shape."""
    if named & {"shape-mismatch", "empty-tensor"}:
        return True
    part, _, inner = role.partition(".")  # of a union, the number of the part is in front
    axis = RANK.get(inner if part.isdecimal() else role)
    return "rank-mismatch" in named and (
        axis is not None and _differ_only_in(axis, stored.shape, expected.shape)
    )


def _made_for(adapter: Adapter, base: Base) -> list[Finding]:
    """What the adapter says about its base, compared with this one: doubts, not proof."""
    findings = [*_other_model(adapter, base), *_start(adapter, base)]
    if adapter.base_name and not _same_name(adapter.base_name, base.name):
        made, here = clean(adapter.base_name), clean(base.name)
        findings.append(Finding(WARNING, OTHER_NAME, "base_model_name_or_path", made, here))
    return findings + doubt(adapter, base)


def _start(adapter: Adapter, base: Base) -> list[Finding]:
    """Whether the base is one that the adapter took its start out of."""
    start = adapter.fields.start if isinstance(adapter.fields, LoraFields) else ""
    method = base.quantization.method
    if start in ("", "given") or method == "none":
        return []
    want, about = "a base that is not quantized", f"{method}, whose weights are other ones"
    return [Finding(ERROR, UNSUPPORTED, "init_lora_weights", want, about)]


def _other_model(adapter: Adapter, base: Base) -> Iterator[Finding]:
    """Where the base is not what the adapter says it has to be; widths go by several names."""
    for field, want in adapter.requires.items():
        names = WIDTH_KEYS if field == WIDTH_KEYS[0] else (field,)
        here = next((base.config[name] for name in names if name in base.config), None)
        if None not in (want, here) and want != here:
            about = f"{clean(str(here))}, the base's"
            yield Finding(ERROR, "other-model", field, clean(str(want)), about)


def _same_name(made_for: str, base: str) -> bool:
    """Whether two spellings may mean one base: a Hub id, a path, or the tail of a path."""
    a, b = (_tail(name) for name in (made_for, base))
    return a == b


def _tail(name: str) -> str:
    """The last name, lower case; of a snapshot in the Hub's cache, that of its model."""
    parts = name.lower().replace("\\", "/").strip("/").split("/")
    cached = len(parts) > 2 and parts[-2] == "snapshots"
    return parts[-3].rpartition("--")[2] if cached else parts[-1]

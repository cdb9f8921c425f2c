"""The plain values in a pickle that torch.save wrote, read by an interpreter that calls nothing.

It knows the opcodes and the names that state dicts need; anything else is refused by its name.
No name is imported and no object made but dict, list, tuple, str, numbers and `View`.
Opcodes: `pickletools` of the standard library.
"""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Callable
from typing import Any

from adapterkit.hub.findings import clean
from adapterkit.hub.torchnames import (
    DTYPES,
    EMPTY,
    NAMES,
    PARAMETER,
    TENSOR,
    UNTYPED_TENSOR,
    Name,
    Storage,
    View,
)
from adapterkit.registry.errors import DamagedError
from adapterkit.registry.strictjson import is_text

# A state dict of 60,000 tensors; a file that asks for more work is not an adapter.
MAX_OPS = 2_000_000
MAX_INT = 1 << 128


class MalformedError(Exception):
    """Opcodes that no pickle of plain values has; translated where the file's name is known."""


def read_pickle(file: io.BytesIO, name: str, storages: dict[str, Storage]) -> Any:
    """The value of one pickle, `file` left behind it; the storages it names are added.

    Raises DamagedError that says what else than tensors the pickle holds."""
    try:
        return _Reader(name, storages).run(file)
    except (MalformedError, ValueError, IndexError, KeyError, TypeError, struct.error) as error:
        raise DamagedError(
            f"{name} is a damaged pickle: {clean(str(error) or type(error).__name__)}"
        ) from error


_MARK = object()
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING",
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT",
}  # fmt: skip
MAKE: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "MARK": lambda: _MARK,
}  # fmt: skip
SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
IGNORED = {"PROTO", "FRAME", "STOP"}


class _Reader:
    """The stack machine. Every method but `run` is the opcode of its name."""

    def __init__(self, name: str, storages: dict[str, Storage]) -> None:
        self.name, self.storages = name, storages
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: io.BytesIO) -> Any:
        for count, (op, argument, _) in enumerate(pickletools.genops(file)):
            if count > MAX_OPS:
                raise MalformedError(f"more than {MAX_OPS} operations")
            self.step(op.name, argument)
        if len(self.stack) != 1 or self.stack[0] is _MARK:
            raise MalformedError("it does not end in one value")
        return self.stack[0]

    def step(self, op: str, argument: Any) -> None:
        if op in LITERALS:
            self.stack.append(_literal(argument))
        elif op in CONSTANTS:
            self.stack.append(CONSTANTS[op])
        elif op in MAKE:
            self.stack.append(MAKE[op]())
        elif op in SHORT_TUPLES:
            self.stack.append(tuple(reversed([self.pop() for _ in range(SHORT_TUPLES[op])])))
        elif op in OPERATIONS:
            OPERATIONS[op](self, argument)
        elif op not in IGNORED:
            raise self.refuse(f"the opcode {op}")

    def refuse(self, what: str) -> DamagedError:
        return DamagedError(
            f"{self.name} is a pickle that holds {clean(what)}, which is not a tensor: opening it"
            " is unsafe, it may run code",
            hint="load it where it was made and save the tensors alone, with safetensors",
        )

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise MalformedError("a mark where a value is needed")
        return value

    def since_mark(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def top(self, type_: type) -> Any:
        if not isinstance(self.stack[-1], type_):
            raise MalformedError(f"no {type_.__name__} to add to")
        return self.stack[-1]

    def make_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.since_mark()))

    def append(self, _: Any) -> None:
        value = self.pop()
        self.top(list).append(value)

    def appends(self, _: Any) -> None:
        values = self.since_mark()
        self.top(list).extend(values)

    def setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.set([key, value])

    def setitems(self, _: Any) -> None:
        self.set(self.since_mark())

    def set(self, pairs: list[Any]) -> None:
        target = self.top(dict)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int):
                raise self.refuse(f"a dictionary key of type {type(key).__name__}")
            target[key] = value

    def put(self, index: Any) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.put(len(self.memo))

    def get(self, index: Any) -> None:
        if index not in self.memo:
            raise MalformedError(f"no value was kept as number {index}")
        self.stack.append(self.memo[index])

    def named(self, argument: Any) -> None:
        self.stack.append(self.known(argument.replace(" ", ".", 1)))

    def stack_global(self, _: Any) -> None:
        attribute, module = self.pop(), self.pop()
        self.stack.append(self.known(f"{module}.{attribute}"))

    def known(self, name: str) -> Name:
        if name not in NAMES:
            raise self.refuse(name)
        return Name(name)

    def build(self, _: Any) -> None:
        """`state_dict()` has an attribute with the versions of its modules; nothing else has."""
        state = self.pop()
        self.top(dict)
        if not isinstance(state, dict) or state.keys() - {"_metadata"}:
            raise self.refuse("a dictionary with attributes")

    def persistent(self, _: Any) -> None:
        value = self.pop()
        if not isinstance(value, tuple) or len(value) not in (5, 6) or value[0] != "storage":
            raise self.refuse("a reference to something else than a storage")
        type_, key, _, numel = value[1:5]
        view = value[5:] not in ((), (None,))
        if not isinstance(type_, Name) or type_.name not in DTYPES or view:
            raise self.refuse("a storage of an unknown type")
        if not isinstance(key, str) or not _is_size(numel):
            raise MalformedError("a storage without key or size")
        storage = Storage(key, DTYPES[type_.name], numel)
        if self.storages.setdefault(key, storage) != storage:
            raise MalformedError(f"storage {clean(key)} is described in two ways")
        self.stack.append(storage)

    def reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        name = function.name if isinstance(function, Name) else type(function).__name__
        if not isinstance(arguments, tuple):
            raise MalformedError(f"arguments of {clean(name)} that are no tuple")
        if name == EMPTY and arguments == ():
            self.stack.append({})
        elif name == PARAMETER and len(arguments) == 3 and isinstance(arguments[0], View):
            self.stack.append(arguments[0])
        elif name in (TENSOR, UNTYPED_TENSOR):
            self.stack.append(self.view(name, arguments))
        else:
            raise self.refuse(f"a call of {name}")

    def view(self, name: str, arguments: tuple[Any, ...]) -> View:
        storage, offset, shape, stride, _, hooks, *rest = arguments
        if not isinstance(storage, Storage) or hooks != {}:
            raise MalformedError("a tensor without storage, or with hooks")
        dtype = storage.dtype
        if name == UNTYPED_TENSOR:
            type_, *rest = rest
            if not isinstance(type_, Name) or type_.name not in DTYPES:
                raise MalformedError("a tensor without dtype")
            dtype = DTYPES[type_.name]
        if rest not in ([], [None], [{}]):
            raise self.refuse("a tensor with pending operations (conj, neg)")
        _check_sizes(offset, shape, stride)
        return View(storage, dtype, offset, shape, stride)


def _literal(value: Any) -> Any:
    if isinstance(value, int) and abs(value) >= MAX_INT:
        raise MalformedError("an integer of more than 128 bits")
    if isinstance(value, str) and not is_text(value):
        raise MalformedError("half of a surrogate pair, not text")
    return value


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _check_sizes(offset: object, shape: object, stride: object) -> None:
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) > 64:
        raise MalformedError("a tensor whose shape is no tuple of at most 64 sizes")
    if len(shape) != len(stride) or not all(map(_is_size, (offset, *shape, *stride))):
        shown = f"shape {clean(str(shape))} and stride {clean(str(stride))}"
        raise MalformedError(f"a tensor of {shown}")


OPERATIONS: dict[str, Callable[[_Reader, Any], None]] = {
    "TUPLE": _Reader.make_tuple, "APPEND": _Reader.append, "APPENDS": _Reader.appends,
    "SETITEM": _Reader.setitem, "SETITEMS": _Reader.setitems, "GLOBAL": _Reader.named,
    "STACK_GLOBAL": _Reader.stack_global, "BUILD": _Reader.build, "REDUCE": _Reader.reduce,
    "BINPERSID": _Reader.persistent, "MEMOIZE": _Reader.memoize, "BINPUT": _Reader.put,
    "LONG_BINPUT": _Reader.put, "BINGET": _Reader.get, "LONG_BINGET": _Reader.get,
}  # fmt: skip

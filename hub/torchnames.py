"""What the pickle of a state dict names.  torch 2.13 `torch/_utils.py`, `torch/storage.py`."""

from __future__ import annotations

from dataclasses import dataclass

# torch's name of a storage's class or of a dtype -> the name safetensors has for it
DTYPES = {
    "torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16", "torch.LongStorage": "I64", "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16", "torch.CharStorage": "I8", "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL", "torch.ComplexFloatStorage": "C64",
    "torch.storage.UntypedStorage": "U8",
    "torch.uint16": "U16", "torch.uint32": "U32", "torch.uint64": "U64",
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
EMPTY, TENSOR, UNTYPED_TENSOR, PARAMETER = (
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
)
NAMES = {EMPTY, TENSOR, UNTYPED_TENSOR, PARAMETER, *DTYPES}


@dataclass(frozen=True)
class Name:
    """A global by its name, never looked up."""

    name: str


@dataclass(frozen=True)
class Storage:
    """key: of its bytes in the file. numel: elements of its dtype."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True)
class View:
    """A tensor: elements of a storage. offset and stride count elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

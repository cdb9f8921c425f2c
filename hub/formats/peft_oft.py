"""`peft_type: OFT`.  peft 0.21 `tuners/oft/config.py`, and 0.16 on; before that, refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from packaging.version import Version

from adapterkit.hub.fields import OftFields
from adapterkit.hub.findings import ERROR, UNSUPPORTED, Finding
from adapterkit.hub.formats.config import ConfigReader
from adapterkit.hub.formats.peft_config import MAX_RANK, replaced, size_or_zero, written_before
from adapterkit.hub.formats.peft_type import PeftType

# Each term is a product of small matrices; the series has long converged.
MAX_TERMS = 1000
# The first that writes its version, and the first that counts the last term of the series once.
LAST_TERM_ONCE = Version("0.18.0")


def read(reader: ConfigReader, names: Collection[str]) -> OftFields:
    is_old = "oft_block_size" not in reader.config  # refused below, whatever else it says
    count = size_or_zero(reader, "r", 0, MAX_RANK)
    size = 0 if is_old and count else size_or_zero(reader, "oft_block_size", 32, MAX_RANK)
    if bool(count) == bool(size):
        reader.fault("oft_block_size", f"0 or not, as r is {'not ' if count else ''}0")
    terms = reader.count("num_cayley_neumann_terms", 5, MAX_TERMS)
    limit = reader.number("eps", 6e-5)
    if limit < 0:
        reader.fault("eps", "a number of 0 or more")
    series = reader.flag("use_cayley_neumann") or "use_cayley_neumann" not in reader.config
    reader.flag("fan_in_fan_out")  # checked only: the base's module type decides, as in PEFT
    fields = OftFields(
        size=size,
        count=count,
        shared=reader.flag("block_share"),
        terms=terms if series else None,
        last_twice=written_before(reader, LAST_TERM_ONCE),
        limit=limit if reader.flag("coft") else None,
        replaced=replaced(reader, only="oft_only"),
    )
    reader.done()
    return fields


def refusals(config: Mapping[str, Any]) -> list[Finding]:
    if "oft_block_size" in config:
        return []
    why = "none: PEFT up to 0.15 stored rotations in another form (oft_r)"
    hint = "train it again, or merge it with the PEFT that wrote it"
    return [Finding(ERROR, UNSUPPORTED, "oft_block_size", "a block size", why, hint)]


OFT = PeftType(
    kind="oft",
    endings={
        ".oft_R.weight": "rotation",
        ".oft_r": "old_rotation",
        ".oft_embedding_R.weight": "embedding_rotation",
    },
    fields=read,
    known=frozenset(
        [
            "r",
            "oft_block_size",
            "block_share",
            "coft",
            "eps",
            "use_cayley_neumann",
            "num_cayley_neumann_terms",
            "bias",
            "fan_in_fan_out",
        ]
    ),
    inert=frozenset({"module_dropout", "init_weights"}),
    refusals=refusals,
)

"""Select tests/data from the full fixture set:  python tests/select_fixtures.py SRC [DESTINATION]

Taken are every base, input and expected base result, the broken inputs, the smallest case of every
(kind, operation), and of the LoRA family plain forwards of each feature, as far as LIMIT allows.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

LIMIT = 11_780_000
ALWAYS = (  # the main path, and what the tests of attach need: larger than others of their kind
    "llama.lora_qv",
    "llama.lora_embedding",
    "llama.lora_modules_to_save",
    "llama.lora_all_linear",
    "bert.lora_cls",
    "gpt2.lora_wte",
    "t5.lora",
    "llama.dora",
    "qwen2.lora_bias_param",
    "gpt2.lora_c_attn",
    "llama.active_lora_dora",
    "llama.lora_bin",
    "bert.ah_double_seq_bn",
    "bert.ah_bn_gating",
    "bert.ah_compacter",
    "bert.ah_compacter_pp",
    "bert.ah_seq_bn_inv",
    "gpt2.ah_par_bn",
    "llama.ah_par_bn",
    "llama.bottleneck_llm_adapters",
    "llama.bottleneck_llm_adapters_parallel",
    "llama.ia3",
    "bert.ah_avg_bottleneck",
    "bert.ah_avg_lora_negate_b",
    "bert.ah_avg_lora_svd",
    "bert.ah_avg_prefix",
    "bert.ah_stack",
    "bert.ah_fuse",
    "bert.ah_stack_lora",
    "gpt2.prefix_li_liang_deep",
    "bert.ah_prefix",
    "bert.ah_prompt_after_bos",
    "llama.prefix",
    "mixtral.lora_experts",
    "bert.bitfit_opendelta",
    "llama.lora_pissa",
    "llama.other_boft",
    "llama.batch_mixed_heads",
    "llama.batch_mixed_three",
)
WHOLE = ("bases", "inputs", "expected_base", "bad.tar.gz")
FAMILY = {
    "lora", "rslora", "dora", "qlora", "qdora", "lora_embedding", "lora_trainable_tokens",
    "trainable_tokens", "multi_lora",
}  # fmt: skip
Case = dict[str, Any]


def strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from strings(child)


def files(source: Path, value: object) -> set[Path]:
    """Every file that an entry of the index names, folders in full, without their READMEs."""
    found: set[Path] = set()
    for text in strings(value):
        if text.split("/")[0] not in (*WHOLE, "cases", "adapters"):
            continue
        path = source / text
        inside = path.rglob("*") if path.is_dir() else [path]
        found.update(p for p in inside if p.is_file() and p.name != "README.md")
    return found


@lru_cache(None)
def digest(path: Path) -> bytes:
    return sha256(path.read_bytes()).digest()


def size(paths: set[Path]) -> int:
    """The same content counts once: of two bases with the same weights, one has a link."""
    return sum({digest(path): path.stat().st_size for path in paths}.values())


def is_family(case: Case) -> bool:
    return case["kind"] in FAMILY and case["operation"]["op"] in ("forward", "set_adapter")


def feature(case: Case) -> object:
    return (case["kind"], json.dumps(case["base_load"]), *case["tags"])


def firsts(cases: list[Case], key: Callable[[Case], object]) -> list[Case]:
    """The first case of each key."""
    found: dict[object, Case] = {}
    for case in cases:
        found.setdefault(key(case), case)
    return list(found.values())


def select(source: Path, index: dict[str, Any]) -> tuple[list[Case], set[Path]]:
    """The cases to keep, in the order of the index, and all files to copy."""
    taken = files(source, list(WHOLE))
    taken |= files(source, [entry.get("expected") for entry in index["bad"]])
    whole = frozenset(taken)
    own = {case["id"]: size(files(source, case) - whole) for case in index["cases"]}
    cases = sorted(index["cases"], key=lambda case: (own[case["id"]], case["id"]))
    kept: dict[str, Case] = {}
    total = size(taken)

    def keep(case: Case) -> None:
        nonlocal total
        kept[case["id"]] = case
        total += size(files(source, case) - taken) + len(json.dumps(case))
        taken.update(files(source, case))

    first = firsts(cases, lambda case: (case["kind"], case["operation"]["op"]))
    for case in first + [case for case in cases if case["id"] in ALWAYS]:
        keep(case)
    rest = [case for case in cases if case["id"] not in kept and is_family(case)]
    while rest:  # round after round, so that no feature or base crowds out the others
        for case in firsts(rest, feature):
            rest.remove(case)
            extra = size(files(source, case) - taken) + len(json.dumps(case))
            if total + extra <= LIMIT:
                keep(case)
    return [case for case in index["cases"] if case["id"] in kept], taken


def write(source: Path, destination: Path) -> None:
    index = json.loads((source / "index.json").read_text())
    cases, taken = select(source, index)
    for folder in ("adapters", "bases", "cases", "expected_base", "inputs"):
        shutil.rmtree(destination / folder, ignore_errors=True)
    written: dict[bytes, Path] = {}
    for path in sorted(taken):
        target = destination / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        is_base = path.suffix == ".safetensors" and path.parts[-3] == "bases"
        same = written.setdefault(digest(path), target) if is_base else target
        if same is target:
            target.write_bytes(path.read_bytes())  # not copy(): the source may be read-only
        else:
            target.symlink_to(Path("..") / same.parent.name / same.name)
    index["counts"] = {"cases": len(cases), "bad": len(index["bad"]), "bases": len(index["bases"])}
    lists = {name: index.pop(name) for name in ("bases", "bad")} | {"cases": cases}
    del index["cases"]
    rows = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in index.items()]
    for name, entries in lists.items():  # one entry a line: a small diff when one changes
        body = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
        rows.append(f" {json.dumps(name)}: [\n{body}\n ]")
    (destination / "index.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")
    print(f"{len(cases)} cases, {len(taken)} files, {size(taken)} bytes in {destination}")


if __name__ == "__main__":
    here = Path(__file__).parent / "data"
    write(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else here)

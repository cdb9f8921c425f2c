"""Every kind that is applied, against the logits of its reference (index.json, `cases`)."""

from __future__ import annotations

import json
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from adapterkit.hub import attach, folder
from adapterkit.hub.formats.adapterhub_type import ARCHITECTURES, BOTTLENECK
from adapterkit.hub.formats.peft_type import PEFT_TYPES
from adapterkit.hub.sources import Folder
from adapterkit.registry.errors import AdapterError, AdapterWarning

DATA = Path(os.environ.get("ADAPTERKIT_FIXTURES") or Path(__file__).parents[1] / "data").resolve()
CASES: list[dict[str, Any]] = json.loads((DATA / "index.json").read_text())["cases"]
INPUTS = (
    "input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask",
    "block_flag",
)  # fmt: skip
# What the message has to say when an adapter is refused: by its format, by PEFT's name of its type,
# or by the option that changes the result.
BY_FORMAT = {
    "adapters": "AdapterHub",
    "mlx-lm": "MLX-LM",
}
BY_KIND = {
    "lora_alora": "alora_invocation_tokens",
    "lora_layer_replication": "layer_replication",
}


# Formats that are read, beside those of PEFT, of which the type decides.
READ = {
    "loralib",
    "llm-adapters",
    "mlx-lm",
    "prefixtuning-li-liang",
    "thudm-p-tuning-v1",
    "thudm-p-tuning-v2", "bitfit-safetensors", "bitfit-bin", "bitfit-opendelta"}
# The model of transformers on which a head of adapters' own class stands in place of the model's.
CLASSES = {"adapters.AutoAdapterModel": "AutoModelForSequenceClassification"}
PEFTS = {"peft", "moslora-v0.3", "moslora-v0.10"}


def architectures(adapter: dict[str, Any]) -> set[str]:
    """Of an AdapterHub folder, and of the parts of a union."""
    config = json.loads((DATA / adapter["path"] / "adapter_config.json").read_text())["config"]
    every = [config, *config.get("configs", ())]
    return {part.get("architecture") or BOTTLENECK for part in every}


def is_applied(case: dict[str, Any]) -> bool:
    """Whether all its adapters are of a format and of a kind that is applied."""
    return case["kind"] not in BY_KIND and all(
        adapter["format"] in READ
        or (adapter["format"] in PEFTS and adapter.get("peft_type") in PEFT_TYPES)
        or (adapter["format"] == "adapters" and architectures(adapter) <= ARCHITECTURES.keys())
        for adapter in case["adapters"]
    )


OPERATIONS = ("forward", "set_adapter", "concatenate")
# Damaged, and still without doubt: names with one part too many; a config that calls a prefix the
# network that it was made with.
REPAIRED = ("adapter_name_left_in", "prefix_ejected")
FORWARD = [case for case in CASES if case["operation"]["op"] in OPERATIONS]
APPLIED = [case for case in FORWARD if is_applied(case) and "repair_or_refuse" not in case["tags"]]
WILD = [case for case in FORWARD if is_applied(case) and "repair_or_refuse" in case["tags"]]
OTHERS = [
    case for case in CASES if case["operation"]["op"] == "forward" and case not in APPLIED + WILD
]


def refusal(case: dict[str, Any]) -> str:
    """A pattern of the message for the first of its adapters."""
    adapter = case["adapters"][0]
    kind = adapter.get("peft_type")
    if adapter["format"] in BY_FORMAT:
        return BY_FORMAT[adapter["format"]]
    if case["kind"] in BY_KIND:
        return BY_KIND[case["kind"]]
    if kind not in (None, *PEFT_TYPES):
        return str(kind)
    return "adapter_config.json|peft_type"


def sources_of(case: dict[str, Any]) -> dict[str, Folder]:
    """Name -> folder, with what the case says beside its files."""
    return {
        adapter["name"]: folder(DATA / adapter["path"], **hints(case))
        for adapter in case["adapters"]
    }


def hints(case: dict[str, Any]) -> dict[str, Any]:
    said = case["operation"].get("loralib")
    if said:
        names = {"r": "r", "lora_alpha": "alpha", "enable_lora": "enable_lora"}
        return {names[name]: value for name, value in said.items()}
    return {}


@lru_cache(maxsize=4)
def model_of(base: str, load: str) -> Any:
    """One model for all cases with this base: each case also shows that the one before it left
    nothing behind."""
    settings = json.loads(load)
    extra: dict[str, Any] = {}
    if settings.get("quantization"):
        extra["quantization_config"] = transformers.BitsAndBytesConfig(**settings["quantization"])
        extra["device_map"] = settings.get("device_map")
    dtype = getattr(torch, settings["dtype"])
    loader = getattr(transformers, CLASSES.get(settings["class"], settings["class"]))
    return loader.from_pretrained(DATA / base, dtype=dtype, **extra).eval()


def model_for(case: dict[str, Any]) -> Any:
    rows = case["operation"].get("resize_token_embeddings")
    make = model_of.__wrapped__ if rows else model_of
    model = make(case["base_path"], json.dumps(case["base_load"], sort_keys=True))
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def logits(model: Any, case: dict[str, Any]) -> torch.Tensor:
    inputs = load_file(DATA / case["inputs"]["file"])
    with torch.inference_mode():
        return model(**{k: v for k, v in inputs.items() if k in INPUTS}).logits.float()


def distance(found: torch.Tensor, tensor: str, case: dict[str, Any]) -> float:
    """Largest difference over the positions that count."""
    expected = load_file(DATA / case["expected"]["file"])[tensor].float()
    gap = (found - expected).abs()
    mask = case["compare"]["mask"]
    if mask is not None:
        virtual, _, name = mask.rpartition("+")  # "virtual:4+attention_mask", or a name alone
        counts = load_file(DATA / case["inputs"]["file"])[name].bool()
        n = int(virtual.removeprefix("virtual:") or 0)
        gap = gap[torch.cat([counts.new_ones((len(counts), n)), counts], dim=1)]
    return float(gap.max())


def has_virtual_outputs(case: dict[str, Any]) -> bool:
    """Whether the reference has positions for virtual tokens, as PEFT has."""
    return str(case["compare"]["mask"]).startswith("virtual:")


def check_logits(found: torch.Tensor, case: dict[str, Any]) -> None:
    """The reference, or one of the alternatives it names (4-bit products on some CPUs)."""
    compare = case["compare"]
    accepted = [{"tensor": "logits", "atol": compare["atol"]}, *compare.get("alternatives", ())]
    gaps = {row["tensor"]: distance(found, row["tensor"], case) for row in accepted}
    assert any(gaps[row["tensor"]] <= row["atol"] for row in accepted), gaps


@pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
@pytest.mark.parametrize("case", APPLIED, ids=lambda case: case["id"])
def test_every_case_gives_the_logits_of_its_reference(case: dict[str, Any]) -> None:
    """With PEFT's order of activation where the case records that DoRA depends on it."""
    model = model_for(case)
    dialect = "peft" if "order_dependent" in case["tags"] else "exact"
    virtual = has_virtual_outputs(case)
    settings = {"dialect": dialect, "virtual_outputs": virtual}
    with attach(model, sources_of(case), **settings) as adapters:
        if case["operation"]["op"] != "forward":
            adapters.activate(case["operation"]["adapters"])
        check_logits(logits(model, case), case)


@pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
@pytest.mark.parametrize("case", WILD, ids=lambda case: case["id"])
def test_damaged_key_names_are_repaired_or_refused_never_dropped(case: dict[str, Any]) -> None:
    """PEFT warns about all but one of these and runs the base."""
    model = model_for(case)
    source = DATA / case["adapters"][0]["path"]
    if case["id"].endswith(REPAIRED):
        with attach(model, [source]):
            check_logits(logits(model, case), case)
        return
    with pytest.raises(AdapterError, match="wrong-prefix") as caught:
        attach(model, [source])
    assert "layers.0.self_attn.q_proj.lora_A" in str(caught.value)


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case["id"])
def test_what_is_not_applied_is_refused_by_name(case: dict[str, Any]) -> None:
    """Never half: other tools' folders, and options that change the result."""
    model = model_for({**case, "operation": {}})
    own = {id(module) for module in model.modules() if "forward" in vars(module)}
    expected = refusal(case)
    with warnings.catch_warnings(), pytest.raises(AdapterError, match=f"(?s){expected}"):
        warnings.simplefilter("error", AdapterWarning)
        attach(model, {a["name"]: DATA / a["path"] for a in case["adapters"]})
    assert {id(module) for module in model.modules() if "forward" in vars(module)} == own


def test_the_order_of_activation_changes_nothing_but_in_pefts_dialect() -> None:
    """In PEFT a DoRA rescales what was activated before it, so A+dora is not dora+A."""
    cases = {case["id"]: case for case in APPLIED}
    case = cases["llama.active_lora_dora"]
    sources = {adapter["name"]: DATA / adapter["path"] for adapter in case["adapters"]}
    model = model_for(case)
    found = {}
    for dialect in ("exact", "peft"):
        for order in (["A", "dora"], ["dora", "A"]):
            with (
                pytest.warns(AdapterWarning),
                attach(model, sources, dialect=dialect) as adapters,
            ):
                adapters.activate(order)
                found[dialect, *order] = logits(model, case)
    torch.testing.assert_close(
        found["exact", "A", "dora"], found["exact", "dora", "A"], atol=1e-5, rtol=0
    )
    assert (found["peft", "A", "dora"] - found["peft", "dora", "A"]).abs().max() > 0.1

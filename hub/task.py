"""The model class a task asks for: an adapter of another task than its base gets another head."""

from __future__ import annotations

from dataclasses import replace

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.modules import module_table
from adapterkit.hub.bases.names import architectures
from adapterkit.hub.findings import WARNING, Finding
from adapterkit.registry.errors import AdapterError

# PEFT task type -> ends of the architecture names that serve it; the first is built when none does
ENDS = {
    "CAUSAL_LM": ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"),
    "SEQ_CLS": ("ForSequenceClassification",),
    "SEQ_2_SEQ_LM": ("ForConditionalGeneration",),
    "TOKEN_CLS": ("ForTokenClassification",),
    "QUESTION_ANS": ("ForQuestionAnswering",),
    "FEATURE_EXTRACTION": ("Model", "EncoderModel"),
}


def serves(architecture: str, task: str | None) -> bool:
    """Whether a class of this name does the task; nothing speaks against an unknown task."""
    if task not in ENDS or not architecture:
        return True
    if task == "FEATURE_EXTRACTION":
        return architecture.endswith(ENDS[task]) and not architecture.endswith("LMHeadModel")
    return architecture.endswith(ENDS[task])


def doubt(adapter: Adapter, base: Base) -> list[Finding]:
    """A warning when the base's class does not do the adapter's task."""
    if serves(base.architecture, adapter.task):
        return []
    return [
        Finding(
            WARNING, "other-task", "task_type", f"a model for {adapter.task}", base.architecture
        )
    ]


def for_task(base: Base, adapter: Adapter) -> Base:
    """The base as the class the adapter's task asks for, or as it is if the family has none."""
    if serves(base.architecture, adapter.task):
        return base
    try:
        classes = architectures(base.model_type)
        wanted = next(classes[end] for end in ENDS[adapter.task or ""] if end in classes)
        modules = module_table(base.config, base.tensors, wanted)
    except (StopIteration, AdapterError):  # no such class in this family: `doubt` says so
        return base
    config = {**base.config, "architectures": [wanted]}
    return replace(base, config=config, modules=modules)

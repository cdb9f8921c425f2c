"""What a model is asked, as the tokens it takes: whose tokenizer makes them, in a chat or not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from adapterkit.hub.bases.folder import (
    CHUNK,
    CONFIG,
    OLD_TOKENIZER,
    TOKENIZER,
    open_base,
    tokenizer_digest,
)
from adapterkit.hub.findings import clean
from adapterkit.hub.gather import Found
from adapterkit.hub.sources import Folder
from adapterkit.registry.errors import (
    AdapterError,
    DamagedError,
    InvalidError,
    MismatchError,
    NotFoundError,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# What a tokenizer is loaded from: what decides ids, and what does not.
FILES = (
    TOKENIZER, *OLD_TOKENIZER, "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
CHOOSE = "--tokenizer FOLDER says which"


@dataclass(frozen=True)
class Ask:
    """text: a user's message where the tokenizer has a chat template, unless raw."""

    text: str
    system: str | None = None
    raw: bool = False


@dataclass(frozen=True)
class Chosen:
    """A tokenizer. name: of what brings it. own: whether that is an adapter."""

    tokenizer: PreTrainedTokenizerBase
    name: str
    own: bool = False


@dataclass(frozen=True)
class Prompt:
    """ids, mask (1, n). chat: whether the text became a message of the tokenizer's template."""

    ids: Tensor
    mask: Tensor
    chat: bool

    @property
    def size(self) -> int:
        return self.ids.shape[1]


def choose(found: list[Found], place: Path, given: Path | None) -> Chosen:
    """The tokenizer given, else the adapters' own, else the base's.

    Raises NotFoundError if there is none, MismatchError if adapters bring several that differ,
    DamagedError.
    """
    base = open_base(place)
    if given is not None:
        return Chosen(_load(open_base(given), base), str(given))
    own = [one for one in found if tokenizer_digest(one.folder) is not None]
    if not own:
        return Chosen(_load(base, base), str(place))
    loaded = {one.name: _load(one.folder, base) for one in own}
    for what, values in (
        ("tokenizers", {tokenizer_digest(one.folder) for one in own}),
        ("chat templates", {repr(each.chat_template) for each in loaded.values()}),
    ):
        if len(values) > 1:
            names = ", ".join(map(clean, loaded))
            raise MismatchError(f"{names} bring {what} that differ", hint=CHOOSE)
    return Chosen(loaded[own[0].name], own[0].name, own=True)


def _load(folder: Folder, base: Folder) -> PreTrainedTokenizerBase:
    """From copies, as a version's files lie under other names; no code of the folder is run."""
    from transformers import AutoTokenizer

    name = clean(folder.name)
    if tokenizer_digest(folder) is None:
        raise NotFoundError(f"{name} has no tokenizer", hint="--tokenizer FOLDER names one")
    with TemporaryDirectory(prefix="adapter-tokenizer-") as made:
        for file in FILES:
            if file in folder.files:
                _copy(folder, file, Path(made))
        _copy(base, CONFIG, Path(made))  # its model_type may be all that names the class
        try:
            loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                made, local_files_only=True, trust_remote_code=False
            )
        except ImportError as error:  # sentencepiece, tiktoken
            raise AdapterError(f"the tokenizer of {name} needs a library: {error}") from error
        except Exception as error:  # that is what the library tokenizers raises for a bad file
            about = clean(str(error) or type(error).__name__)
            raise DamagedError(f"the tokenizer of {name} cannot be read: {about}") from error
    return loaded


def _copy(folder: Folder, name: str, place: Path) -> None:
    source = folder.file(name)
    with (place / name).open("wb") as file:
        for start in range(0, source.size, CHUNK):
            file.write(source.read(start, min(CHUNK, source.size - start)))


def encode(chosen: Chosen, ask: Ask) -> Prompt:
    """Raises InvalidError for a text of no tokens, and for a system message that no template
    takes."""
    chat = chosen.tokenizer.chat_template is not None and not ask.raw
    if ask.system is not None and not chat:
        raise InvalidError(
            "a system message is given, but the prompt is raw"
            if ask.raw
            else f"a system message is given, but {clean(chosen.name)} has no chat template"
        )
    made = _chat(chosen, ask) if chat else chosen.tokenizer(ask.text, return_tensors="pt")
    ids, mask = made["input_ids"].long(), made["attention_mask"]
    if not ids.numel():
        raise InvalidError("the prompt has no tokens")
    return Prompt(ids, mask, chat)


def _chat(chosen: Chosen, ask: Ask) -> Any:
    from jinja2 import TemplateError

    messages = [{"role": "system", "content": ask.system}] if ask.system is not None else []
    messages.append({"role": "user", "content": ask.text})
    try:
        return chosen.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except (TemplateError, ValueError, TypeError) as error:
        about = clean(str(error) or type(error).__name__)
        raise InvalidError(
            f"the chat template of {clean(chosen.name)} refuses the prompt: {about}", hint="--raw"
        ) from error

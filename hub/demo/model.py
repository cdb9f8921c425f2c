"""A tiny Llama that spells: its folder, its training, and how well it predicts a text."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel

# Progress(what is being done, steps done, steps in all)
Progress = Callable[[str, int, int], None]

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
ALPHABET = [*SPECIAL, " ", ".", *string.ascii_lowercase]  # 32: bitsandbytes wants multiples of 32
# NF4 keeps one scale for 64 weights, so no row is shorter than that.
HIDDEN, FEED_FORWARD, LAYERS, HEADS = 64, 192, 2, 2
WINDOW, BATCH = 64, 12


@contextmanager
def undisturbed() -> Iterator[None]:
    """One thread, as matrices this small gain nothing from more and lose much on a busy machine;
    and no bars by transformers, which draws them even where there is no terminal."""
    from transformers.utils import logging

    threads, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def tiny_model(seed: int, hidden: int = HIDDEN) -> LlamaForCausalLM:
    """A model that has learnt nothing; the global random state stays as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(ALPHABET), hidden_size=hidden, intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save_model(model: PreTrainedModel, folder: Path) -> Path:
    """Weights, config and tokenizer: a folder that `from_pretrained` reads."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({c: i for i, c in enumerate(ALPHABET)}, SPECIAL[0]))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    unk, bos, eos, pad = SPECIAL
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=letters, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def encode(text: str) -> Tensor:
    """The ids that the tokenizer gives, one a character."""
    ids = {character: i for i, character in enumerate(ALPHABET)}
    return torch.tensor([ids[character] for character in text])


def train(
    model: PreTrainedModel,
    parameters: Iterable[nn.Parameter],
    corpora: Sequence[tuple[Tensor, int]],
    steps: int,
    progress: Callable[[int, int], None],
) -> None:
    """Next-character training; each batch takes so many random windows of every corpus."""
    trained = list(parameters)
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps, pct_start=0.1)
    for step in range(steps):
        rows = torch.cat([_windows(ids, count, draw) for ids, count in corpora])
        _loss(model, rows).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress(step + 1, steps)


def _windows(ids: Tensor, count: int, draw: torch.Generator) -> Tensor:
    starts = torch.randint(0, len(ids) - WINDOW, (count, 1), generator=draw)
    return ids[starts + torch.arange(WINDOW + 1)]


def _loss(model: PreTrainedModel, rows: Tensor) -> Tensor:
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def loss(model: PreTrainedModel, ids: Tensor) -> float:
    """Mean loss a character, in nats, over the whole windows of `ids`."""
    rows = ids[: len(ids) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1)
    return float(_loss(model, rows))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids[None, :WINDOW], use_cache=False).logits
    return found


def continuation(model: PreTrainedModel, prompt: str, sentences: int = 2) -> str:
    """`prompt` and what the model finds most likely after it."""
    ids = encode(prompt)[None]
    ids = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False,
        eos_token_id=None, pad_token_id=ALPHABET.index("<pad>"),
    )  # fmt: skip
    text = "".join(ALPHABET[i] for i in ids[0].tolist())
    return ".".join(text.split(".")[:sentences]) + "."

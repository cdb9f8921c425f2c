"""Text as it comes: whole characters, nothing lost, nothing said twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adapterkit.hub.generate.session import Settings
from adapterkit.hub.generate.stream import Finite, Stream
from adapterkit.registry.errors import AdapterError, InvalidError


def made(vocabulary: list[str], decoder: object) -> PreTrainedTokenizerFast:
    """id -> piece, decoded as a family does; id 0 is special."""
    ids = {piece: i for i, piece in enumerate(["</s>", *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(ids, "</s>"))
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


BYTES = made(sorted(pre_tokenizers.ByteLevel.alphabet()), decoders.ByteLevel())
WORDS = made(["▁the", "▁", "cat", "\n", "▁▁", ".", "▁ s", "東京"], decoders.Metaspace())
FALLBACK = made(
    ["▁a", *(f"<0x{value:02X}>" for value in range(256))],
    decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
)


def streamed(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    pieces: list[str] = []
    stream = Stream(tokenizer, pieces.append)
    stream.put(torch.tensor([[5, 6, 7]]))  # the prompt
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    return pieces


@pytest.mark.parametrize("tokenizer", [BYTES, WORDS], ids=["bytes", "words"])
@given(data=st.data())
def test_pieces_are_the_text_of_all_tokens(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    pieces = streamed(tokenizer, ids)
    wanted = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces) == wanted and "" not in pieces


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
def test_no_piece_ends_inside_a_character(text):
    """UTF-8 is written a token per byte here."""
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = "".join(piece for piece, _ in letters.pre_tokenize_str(text))
    runs = (
        streamed(BYTES, [BYTES.convert_tokens_to_ids(letter) for letter in spelled]),
        streamed(FALLBACK, [value + 2 for value in text.encode()]),
    )
    for pieces in runs:
        assert "".join(pieces) == text
        assert pieces == list(text) or "\ufffd" in text


def test_a_word_behind_a_line_break_keeps_its_space():
    """transformers' own streamers decode it anew there, and lose the space."""
    the, line = (WORDS.convert_tokens_to_ids(piece) for piece in ("▁the", "\n"))
    assert streamed(WORDS, [the, line, the]) == ["the", "\n", " the"]


@pytest.mark.parametrize("scores", [[0.0, float("nan")], [float("inf"), 1.0]])
def test_what_is_no_number_is_no_text(scores):
    with pytest.raises(AdapterError, match="NaN or infinity"):
        Finite()(torch.zeros(1, 1), torch.tensor([scores]))
    forbidden = torch.tensor([[0.0, -float("inf")]])
    assert torch.equal(Finite()(torch.zeros(1, 1), forbidden), forbidden)


def test_all_settings_that_are_wrong_are_named():
    with pytest.raises(InvalidError) as caught:
        Settings(max_new_tokens=0, temperature=-1, top_p=2, top_k=0, seed=-1)
    names = ("max_new_tokens is 0", "temperature is -1", "top_p is 2", "top_k is 0", "seed is -1")
    assert all(name in str(caught.value) for name in names)

"""The tokenizer: a function of the texts, in every process; truncation; padding."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs_corpus import COLOURS, SHAPES, tiny_tokenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from align.tokenizer import Tokenizer

TEXTS = [f"{colour} {shape}, {size}" for colour in COLOURS for shape in SHAPES for size in "xyz"]
TEXTS += ["Ça été là", "naïve", "smiling face with heart-eyes", "1 2 3", "\u4e2d\u6587"]


def vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    return tokenizer.backend.get_vocab()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(40, 200))
def test_a_vocabulary_does_not_depend_on_the_order_of_the_texts(seed, size):
    shuffled = random.Random(seed).sample(TEXTS, len(TEXTS))
    one, other = (
        Tokenizer.train(texts, vocabulary_size=size, context_length=9)
        for texts in (TEXTS, iter(shuffled))
    )
    assert vocabulary(one) == vocabulary(other)


_FRESH = """
import json, sys
from align.tokenizer import Tokenizer
texts = json.load(sys.stdin)
tokenizer = Tokenizer.train(texts, vocabulary_size=150, context_length=9)
json.dump(tokenizer.backend.get_vocab(), sys.stdout)
"""


@pytest.mark.slow
def test_a_vocabulary_is_the_same_in_every_process():
    """A run that goes on trains its vocabulary again and must find the one it stopped with."""
    here = vocabulary(Tokenizer.train(TEXTS, vocabulary_size=150, context_length=9))
    done = subprocess.run(
        [sys.executable, "-c", _FRESH],
        input=json.dumps(TEXTS[::-1]),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert json.loads(done.stdout) == here


def test_a_vocabulary_keeps_its_size_and_is_numbered_without_gaps():
    for size in (60, 100, 150):
        known = vocabulary(Tokenizer.train(TEXTS, vocabulary_size=size, context_length=9))
        assert len(known) <= max(size, 4 + 2 * 60)
        assert sorted(known.values()) == list(range(len(known)))
        assert [known[name] for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")] == [0, 1, 2, 3]


def test_letters_inside_words_are_pieces_and_not_special():
    """They are numbered as if they were special, but must not be cut out of a text."""
    tokenizer = Tokenizer.train(["aab", "b a", "## a"], vocabulary_size=40, context_length=20)
    assert set(tokenizer.backend.all_special_tokens) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]"}
    pieces = tokenizer.backend.convert_ids_to_tokens(tokenizer(["##a"]).ids[0].tolist())
    assert pieces == ["[CLS]", "#", "#", "a", "[SEP]"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=6), st.integers(3, 12))
def test_any_text_is_framed_cut_and_padded_to_the_longest_alone(texts, context):
    tokenizer = tiny_tokenizer(context_length=context)
    batch = tokenizer(texts)
    assert batch.ids.shape == batch.mask.shape
    assert batch.ids.dtype == torch.int64
    assert batch.mask.dtype == torch.bool
    lengths = batch.mask.sum(dim=1)
    assert lengths.max() == batch.ids.shape[1] <= context
    first, last = (tokenizer.backend.convert_tokens_to_ids(name) for name in ("[CLS]", "[SEP]"))
    for row, text in enumerate(texts):
        length = int(lengths[row])
        assert batch.mask[row, :length].all(), "padding stands behind"
        assert batch.ids[row, length:].tolist() == [0] * (batch.ids.shape[1] - length)
        assert batch.ids[row, 0] == first
        assert batch.ids[row, length - 1] == last
        assert torch.equal(tokenizer([text]).ids[0], batch.ids[row, :length])
    assert batch.ids.max() < len(tokenizer)


def test_what_is_cut_is_the_end():
    words = " ".join(["red", "circle"] * 30)
    long = tiny_tokenizer(context_length=100)([words]).ids[0]
    short = tiny_tokenizer(context_length=7)([words]).ids[0]
    assert len(short) == 7
    assert torch.equal(short[:6], long[:6])
    assert short[6] == long[-1]


def test_letters_and_accents_do_not_matter_to_a_trained_vocabulary():
    tokenizer = Tokenizer.train(TEXTS, vocabulary_size=200, context_length=20)
    assert torch.equal(tokenizer(["RED Naïve"]).ids, tokenizer(["red naive"]).ids)


def test_saving_and_loading_keeps_everything(tmp_path):
    tokenizer = tiny_tokenizer(context_length=8)
    tokenizer.save(tmp_path / "tokenizer")
    other = Tokenizer.load(tmp_path / "tokenizer", context_length=8)
    texts = ["red circle", "unheard-of words", "", "a" * 200, "blue " * 30]
    assert torch.equal(other(texts).ids, tokenizer(texts).ids)
    assert torch.equal(other(texts).mask, tokenizer(texts).mask)
    assert vocabulary(other) == vocabulary(tokenizer)
    assert len(other) == len(tokenizer)


def test_a_missing_tokenizer_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = {
        str(tmp_path / "nowhere"): "no such folder",
        "someone/some-tokenizer": "HF_HUB_OFFLINE forbids to ask",
    }
    for name, why in names.items():
        with pytest.raises(ValueError, match=why) as caught:
            Tokenizer.load(name, context_length=8)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_that_cannot_pad_is_refused():
    raw = RawTokenizer(WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
    with pytest.raises(ValueError, match="has no padding token"):
        Tokenizer(backend, context_length=8)

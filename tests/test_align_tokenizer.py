"""The tokenizer: a function of the texts, in every process; truncation; padding."""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import get_clean_fn
from pairs_corpus import COLOURS, SHAPES, TINY_BERT, TINY_RESNET, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import BPE, Unigram, WordPiece
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

import align
from align.model import DualEncoder, DualEncoderConfig, Tower
from align.tokenizer import Tokenizer
from align.tokenizer_source import tokenizer_of
from shards.demo import SPLITS

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


# --- CLIP's own byte pairs ---


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.clip()


@pytest.fixture(scope="module")
def theirs() -> Any:
    return open_clip.SimpleTokenizer()


def same_ids(tokenizer: Tokenizer, theirs: Any, texts: list[str]) -> None:
    """Equal where the mask is true; what OpenCLIP pads with says nothing."""
    found, expected = tokenizer(texts), theirs(texts, tokenizer.context_length)
    width = found.ids.shape[1]
    for row, text in enumerate(texts):
        length = int(found.mask[row].sum())
        assert found.ids[row, :length].tolist() == expected[row, :length].tolist(), text
        assert expected[row, length:].sum() == 0, text
    assert width <= tokenizer.context_length


# What Python knows as letters and numbers is known to all versions of Unicode that matter here.
CHARACTERS = st.characters(exclude_categories=("Cs", "Cn", "Co"))
PIECES = st.sampled_from(
    [
        *("'s", "'T", "'LL", "'ſ", "don't", "K", "ı", "İ", "ß", "ΣΑΣ", "é", "e\u0301", "ﬁ"),
        *(" ", "  ", "\n", "\t", "\x85", "\u3000", "\u200d", "\ufe0f", "\x00", "_", "!!", "?", "<"),
        *("&amp;", "&lt;b&gt;", "&amp;amp;", "â€™", "中文", "１２", "½", "²", "123", "🧑‍🚀", "❤️"),
        *(" <start_of_text>", "a<end_of_text>", " <START_OF_TEXT>", " <ſtart_of_text>"),
        *("<end_of_text><start_of_text>", "smiling face", "ALL CAPS", "a.b,c", "--"),
    ]
)
SPECIAL_BEHIND_PUNCTUATION = re.compile(r"[^\s\w]<(start|end)_of_text>|_<(start|end)_of_text>")


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES | st.text(CHARACTERS, max_size=4), max_size=10).map("".join))
def test_clips_tokens_are_open_clips(clip, theirs, text):
    assume(not SPECIAL_BEHIND_PUNCTUATION.search(get_clean_fn("lower")(text)))
    same_ids(clip, theirs, [text])


def test_clips_tokens_of_captions_are_open_clips(clip, theirs):
    captions = [record.caption or "" for record in SPLITS["vendor"].records()]
    assert len(captions) > 1000
    assert len(clip) == theirs.vocab_size
    assert (clip.pad_id, clip.end_id) == (theirs.eot_token_id, theirs.eot_token_id)
    same_ids(clip, theirs, captions[::7])
    same_ids(clip, theirs, ["", " ", "a " * 75, "a " * 76, "b" * 400])


@settings(max_examples=50, deadline=None)
@given(st.text(CHARACTERS, max_size=40), st.integers(3, 12))
def test_clips_texts_are_cut_as_open_clip_cuts(clip, theirs, text, context):
    tokenizer = Tokenizer(clip.backend, context_length=context, clean=clip.clean)
    assume(not SPECIAL_BEHIND_PUNCTUATION.search(text))
    same_ids(tokenizer, theirs, [text, "red circle " * 6])
    assert tokenizer(["red circle " * 6]).truncated == 1
    assert tokenizer(["red"]).truncated == 0


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_ids_are_open_clips_for_tokenizers_of_hugging_face_too(tmp_path, clean):
    tiny_tokenizer().save(tmp_path)
    ours = Tokenizer.load(tmp_path, context_length=16, clean=clean)
    theirs = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=16, clean=clean)
    texts = ["Red  Circle!", "&lt;b&gt; blue_dot", "a's", "", "x" * 99, "â€™ ring\n frame, red"]
    assert torch.equal(pad(ours(texts).ids, 16, value=ours.pad_id), theirs(texts))


def pad(ids: torch.Tensor, width: int, *, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=value)


def test_clip_goes_by_its_name_and_what_is_saved_of_it_is_the_same(tmp_path, clip):
    texts = ["A Red&amp;Blue  circle", "it's", "", "<end_of_text>", "a " * 99]
    assert torch.equal(Tokenizer.load("clip", context_length=77)(texts).ids, clip(texts).ids)
    as_it_is = Tokenizer.load("clip", context_length=77, clean="none")
    assert as_it_is.clean == "none"
    assert not torch.equal(as_it_is(texts).ids, clip(texts).ids)
    clip.save(tmp_path / "tokenizer")
    other = Tokenizer.load(tmp_path / "tokenizer", context_length=77, clean=clip.clean)
    assert torch.equal(other(texts).ids, clip(texts).ids)
    assert (other.pad_id, other.end_id, len(other)) == (clip.pad_id, clip.end_id, len(clip))


# --- cleaning ---


def test_texts_are_cleaned_before_they_are_trained_on_and_before_they_are_looked_up():
    texts = ["a&amp;b, red", "Red  circle!"]
    tokenizer = Tokenizer.train(texts, vocabulary_size=60, context_length=12, clean="canonicalize")
    known = tokenizer.backend.get_vocab()
    assert not {"&", ",", "!", ";"} & known.keys()
    assert torch.equal(tokenizer(["RED, circle"]).ids, tokenizer(["red   circle!!"]).ids)
    plain = Tokenizer.train(texts, vocabulary_size=60, context_length=12)
    assert {"&", ",", "!", ";"} <= plain.backend.get_vocab().keys()


def test_an_unknown_way_to_clean_is_one_line_with_those_that_are_known(tmp_path):
    tiny_tokenizer().save(tmp_path)
    calls: list[Callable[[], Tokenizer]] = [
        lambda: Tokenizer.load(tmp_path, context_length=8, clean="scrub"),
        lambda: Tokenizer.clip(clean="scrub"),
        lambda: Tokenizer.train(["a"], vocabulary_size=9, context_length=8, clean="scrub"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^unknown way to clean 'scrub'; known: none, white"):
            call()


def test_a_bundle_keeps_how_texts_are_cleaned(tmp_path):
    model = tiny_model()
    model.tokenizer.clean = "canonicalize"
    align.save(model, tmp_path / "bundle")
    again = align.load(tmp_path / "bundle")
    assert again.tokenizer.clean == "canonicalize"
    texts = ["Red, Circle!", "blue_dot"]
    assert torch.equal(again.encode_text(texts), model.encode_text(texts))


# --- what is cut ---


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=6), st.integers(3, 12))
def test_texts_that_are_cut_are_counted(texts, context):
    tokenizer = tiny_tokenizer(context_length=context)
    whole = tokenizer.ids(texts)
    batch = tokenizer(texts)
    assert batch.truncated == sum(len(ids) > context for ids in whole)
    assert batch.to("cpu").truncated == batch.truncated
    for row, ids in enumerate(whole):
        if len(ids) <= context:
            assert batch.ids[row, : len(ids)].tolist() == ids


def test_a_context_that_holds_no_word_is_refused():
    with pytest.raises(ValueError, match=r"context_length of 2 leaves no room: .* adds 2 tokens"):
        tiny_tokenizer(context_length=2)
    assert len(tiny_tokenizer(context_length=3)(["red"]).ids[0]) == 3


# --- tokenizers of every kind ---


def byte_pairs(**special: Any) -> PreTrainedTokenizerFast:
    """As those of causal models: bytes, nothing added to a text, padding on the left."""
    raw = RawTokenizer(BPE())
    raw.pre_tokenizer = ByteLevel(add_prefix_space=False)  # pyright: ignore
    ends = [*special.values()]
    trainer = BpeTrainer(
        vocab_size=300,
        special_tokens=ends,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="left", **special)


def unigrams() -> PreTrainedTokenizerFast:
    """As those of T5: pieces with their likelihood, an end behind each text."""
    raw = RawTokenizer(Unigram())
    raw.pre_tokenizer = Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = UnigramTrainer(
        vocab_size=120,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS, trainer)
    raw.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


BACKENDS: dict[str, Callable[[], Any]] = {
    "bytes, padding left": lambda: byte_pairs(eos_token="<|end|>", pad_token="<|pad|>"),
    "bytes, no padding": lambda: byte_pairs(eos_token="<|end|>"),
    "unigrams": unigrams,
    "word pieces": lambda: tiny_tokenizer().backend,
    "GPT-2's class": lambda: GPT2Tokenizer.from_pretrained(saved(byte_pairs(eos_token="<|end|>"))),
}


def saved(backend: PreTrainedTokenizerFast) -> str:
    folder = tempfile.mkdtemp()
    backend.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_tokenizer_of_any_kind_pads_on_the_right_and_survives_saving(kind, tmp_path):
    tokenizer = Tokenizer(BACKENDS[kind](), context_length=9)
    texts = ["red circle", "blue", "Été là \u4e2d\u6587", "a b c d e f g h i j k l"]
    batch = tokenizer(texts)
    assert batch.ids.shape[1] == 9
    for row in range(len(texts)):
        length = int(batch.mask[row].sum())
        assert batch.mask[row, :length].all()
        assert (batch.ids[row, length:] == tokenizer.pad_id).all()
        assert batch.ids[row, :length].tolist() == tokenizer([texts[row]]).ids[0].tolist()
    assert 1 <= batch.truncated < len(texts)
    tokenizer.save(tmp_path / "tokenizer")
    other = Tokenizer.load(tmp_path / "tokenizer", context_length=9)
    plain = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    for again in (other, Tokenizer(plain, context_length=9)):
        assert torch.equal(again(texts).ids, batch.ids)
        assert torch.equal(again(texts).mask, batch.mask)
        assert (again.pad_id, again.end_id) == (tokenizer.pad_id, tokenizer.end_id)
    with_end = "[SEP]" if kind == "word pieces" else "</s>" if kind == "unigrams" else None
    expected = None if with_end is None else tokenizer.backend.convert_tokens_to_ids(with_end)
    assert tokenizer.end_id == expected


def described(folder: Path, file: str = "tokenizer_config.json", **values: Any) -> Path:
    """A folder with a tokenizer in it, told to be something else."""
    if not folder.exists():
        tiny_tokenizer().save(folder)
    known = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**known, **values}))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        Tokenizer.load(folder, context_length=8)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.mark.parametrize(
    ("file", "asked"),
    [
        ("tokenizer_config.json", {"AutoTokenizer": ["code.Mine", None]}),
        ("tokenizer_config.json", {"AutoTokenizer": ["code.Mine", "code.Mine"]}),
        ("config.json", {"AutoTokenizer": "code.Mine", "AutoModel": "code.Model"}),
    ],
)
def test_a_tokenizer_that_runs_code_is_refused_and_nobody_is_asked(
    file, asked, tmp_path, monkeypatch
):
    def asking(*_: object) -> str:
        raise AssertionError("there is nobody to ask")

    monkeypatch.setattr("builtins.input", asking)
    folder = described(tmp_path / "tokenizer", file, auto_map=asked)
    (folder / "code.py").write_text("raise SystemExit('it ran')\n")
    assert f"runs code of others (auto_map in its {file}), which is refused" in refusal(folder)


def test_code_of_a_model_alone_is_no_matter_to_its_tokenizer(tmp_path):
    folder = described(tmp_path / "tokenizer", "config.json", auto_map={"AutoModel": "code.Model"})
    assert len(Tokenizer.load(folder, context_length=8)) == len(tiny_tokenizer())


def test_a_tokenizer_written_in_python_is_taken_by_its_file_or_refused(tmp_path):
    whole = described(tmp_path / "whole", tokenizer_class="ByT5Tokenizer")
    assert torch.equal(
        Tokenizer.load(whole, context_length=8)(["red circle"]).ids,
        tiny_tokenizer()(["red circle"]).ids,
    )
    (tmp_path / "python").mkdir()
    python = described(tmp_path / "python", tokenizer_class="ByT5Tokenizer")
    (python / "vocab.json").write_text("{}")
    assert "(ByT5Tokenizer) is written in Python; only those with a tokenizer.json" in refusal(
        python
    )


def test_a_tokenizer_that_lacks_sentencepiece_is_taken_by_its_file_or_refused(
    tmp_path, monkeypatch
):
    def missing(*_: object, **__: object) -> None:
        raise ImportError("\nSiglipTokenizer requires the SentencePiece library\nbut it was not")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", missing)
    whole = described(tmp_path / "whole", tokenizer_class="SiglipTokenizer")
    assert len(Tokenizer.load(whole, context_length=8)) == len(tiny_tokenizer())
    (whole / "tokenizer.json").rename(whole / "spiece.model")
    said = refusal(whole)
    assert "it has no tokenizer.json" in said
    assert "SiglipTokenizer requires the SentencePiece library" in said


def test_a_folder_without_a_vocabulary_is_no_empty_tokenizer(tmp_path):
    for kind in ("bert", "gpt2", "clip"):
        (tmp_path / kind).mkdir()
        folder = described(tmp_path / kind, "config.json", model_type=kind)
        assert "has no vocabulary: there is no tokenizer.json" in refusal(folder)
    (tmp_path / "empty").mkdir()
    assert "has no vocabulary" in refusal(tmp_path / "empty")
    (tmp_path / "file").write_text("{}")
    assert "is a file; name the folder that holds it" in refusal(tmp_path / "file")


@pytest.mark.parametrize("content", ["", "{", '{"x": 1}', "[]", "\x00"])
def test_a_damaged_tokenizer_is_one_line(content, tmp_path):
    tiny_tokenizer().save(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(content)
    assert "no tokenizer could be read from" in refusal(tmp_path / "tokenizer")


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch):
    asked = []

    def silent(self: object, name: str, *, timeout: float) -> None:
        asked.append((name, timeout))
        raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", silent)
    with pytest.raises(ValueError, match=r"the hub gave no such tokenizer: it cannot be reached"):
        Tokenizer.load("someone/some-tokenizer", context_length=8)
    assert asked == [("someone/some-tokenizer", 10.0)], "once, and not for long"


def test_what_the_hubs_cache_holds_is_taken_from_there(tmp_path, monkeypatch):
    """Laid out as the hub's own client does; half of a model is not mistaken for its tokenizer."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    home = tmp_path / "models--someone--tokens"
    snapshot = home / "snapshots" / ("a" * 40)
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE forbids to ask"):
        Tokenizer.load("someone/tokens", context_length=8)
    tiny_tokenizer().save(snapshot)
    assert len(Tokenizer.load("someone/tokens", context_length=8)) == len(tiny_tokenizer())


# --- the tokenizer that weights were trained with ---


def test_weights_bring_the_tokenizer_they_were_trained_with(tmp_path):
    assert tokenizer_of("hf:bert", {}) is None
    assert tokenizer_of("open_clip:ViT-B-32", {"width": 3}) is None
    pretrained = {"pretrained": True}
    assert tokenizer_of("hf:someone/bert", pretrained) == ("someone/bert", None)
    assert tokenizer_of("open_clip:ViT-B-32", pretrained) == ("clip", None)
    siglip = tokenizer_of("open_clip:ViT-B-16-SigLIP", {"pretrained": "webli"})
    assert siglip == ("timm/ViT-B-16-SigLIP", "canonicalize")

    model = tiny_model()
    model.tokenizer.clean = "whitespace"
    align.save(model, tmp_path / "bundle")
    found = tokenizer_of(f"local:{tmp_path / 'bundle'}", {})
    assert found == (str(tmp_path / "bundle" / "tokenizer"), "whitespace")
    folder = described(tmp_path / "hf", "config.json", model_type="bert")
    assert tokenizer_of(f"local:{folder}", {}) == (str(folder), None)

    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"hf_tokenizer_name": "someone/other", "context_length": 9, "width": 64},
    }
    described(tmp_path / "hf", "open_clip_config.json", model_cfg=config, preprocess_cfg={})
    assert tokenizer_of(f"local:{folder}", {}) == (str(folder), "whitespace")
    (folder / "tokenizer.json").unlink()
    assert tokenizer_of(f"local:{folder}", {}) == ("someone/other", "whitespace")


# --- tokenizer and text tower ---


def model_with(tokenizer: Tokenizer, text: Tower) -> DualEncoder:
    config = DualEncoderConfig(
        image=Tower("timm:resnet10t", TINY_RESNET),
        text=text,
        dim=8,
        image_size=32,
        context_length=tokenizer.context_length,
    )
    return DualEncoder(config, tokenizer)


CLIP_TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
CLIP_TEXT |= {"num_attention_heads": 2, "pooler": "native"}
MISFITS = {
    "too many entries": (
        Tower("hf:bert", {**TINY_BERT, "vocab_size": 50}),
        r"the tokenizer has \d+ entries, the text tower hf:bert embeds 50",
    ),
    "too long": (
        Tower("hf:bert", {**TINY_BERT, "max_position_embeddings": 8}),
        r"context_length 16 is more than the text tower hf:bert can take \(8 positions\)",
    ),
    "other padding": (
        Tower("hf:roberta", {**TINY_BERT, "pad_token_id": 1}),
        r"the tokenizer pads with id 0, the text tower hf:roberta takes id 1 for padding",
    ),
    "other end": (
        Tower("hf:clip_text_model", {**CLIP_TEXT, "vocab_size": 200, "eos_token_id": 199}),
        r"hf:clip_text_model looks for the end of a text by id 199, the tokenizer ends texts with",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_tokenizer_that_does_not_fit_its_tower_is_one_line(kind):
    tower, says = MISFITS[kind]
    with pytest.raises(ValueError, match=says) as caught:
        model_with(tiny_tokenizer(), tower)
    assert "\n" not in str(caught.value)


def test_padding_with_the_end_token_changes_no_text():
    """Causal models leave padding to the mask: the end of one text is no part of another."""
    tokenizer = Tokenizer(byte_pairs(eos_token="<|end|>"), context_length=12)
    tiny = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "pooler": "last"}
    torch.manual_seed(0)
    model = model_with(tokenizer, Tower("hf:gpt2", tiny)).eval()
    texts = ["red", "a long text about a circle"]
    assert tokenizer.pad_id == tokenizer.backend.eos_token_id
    torch.testing.assert_close(model.encode_text(texts)[:1], model.encode_text(texts[:1]))

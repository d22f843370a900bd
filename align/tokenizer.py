"""Text to token ids: any fast Hugging Face tokenizer, CLIP's own, one trained on the captions."""

import gzip
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from align.preprocess import is_list
from align.tokenizer_source import read_backend


@dataclass(frozen=True)
class TokenBatch:
    """Texts as token ids, padded to the longest of the batch.

    Attributes:
        ids: token ids.
        mask: `True` on real tokens.
        truncated: how many of the texts were longer than the tokenizer's context.
    """

    ids: Int[Tensor, "batch tokens"]
    mask: Bool[Tensor, "batch tokens"]
    truncated: int = 0

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The same batch on another device."""
        return TokenBatch(self.ids.to(device), self.mask.to(device), self.truncated)


class Tokenizer:
    """A Hugging Face tokenizer with a context length.

    Args:
        backend: the tokenizer; it pads on the right, with its end token if it has no padding token.
        context_length: longer texts are cut here, in tokens, special ones included; what is cut is
            counted in `TokenBatch.truncated`.
        clean: what is done to a text first, in OpenCLIP's terms: `none`, `whitespace` (repair
            encodings, resolve HTML entities, single spaces), `lower` (and lower case), or
            `canonicalize` (and no punctuation).

    Raises:
        ValueError: the backend cannot pad, the context is shorter than what it adds to a text, or
            an unknown way to clean.
    """

    def __init__(
        self, backend: PreTrainedTokenizerFast, *, context_length: int, clean: str = "none"
    ) -> None:
        _cleaner(clean)
        if backend.pad_token_id is None:
            if backend.eos_token is None:
                raise ValueError(
                    "the tokenizer has no padding token; give it one before using it here"
                )
            backend.pad_token = backend.eos_token  # causal models leave it to the mask
        if (added := backend.num_special_tokens_to_add()) >= context_length:
            raise ValueError(
                f"a context_length of {context_length} leaves no room: the tokenizer adds {added} "
                "tokens to every text"
            )
        backend.padding_side = backend.truncation_side = "right"
        self.backend = backend
        self.context_length = context_length
        self.clean = clean

    def __len__(self) -> int:
        return len(self.backend)

    def __call__(self, texts: Sequence[str], *, context_length: int | None = None) -> TokenBatch:
        """Tokenise texts; padding reaches to the longest text and no further.

        Args:
            texts: any strings.
            context_length: cut them shorter than usual, in tokens; what every text begins and ends
                with stays.

        Raises:
            ValueError: something is no text: its place and type; or that is no shorter context.
        """
        check_texts(texts)
        clean = _cleaner(self.clean)
        length, added = context_length or self.context_length, self.added
        if not added < length <= self.context_length:
            raise ValueError(
                f"texts are cut to at most {self.context_length} tokens and to more than the "
                f"{added} that every text gets, not to {length}"
            )
        encoded = self.backend(
            [clean(text) for text in texts],
            padding=True,
            truncation=True,
            max_length=length,
            return_attention_mask=True,  # SigLIP's tokenizers leave it out unless asked
            return_tensors="pt",
        )
        return TokenBatch(
            encoded["input_ids"],
            encoded["attention_mask"].bool(),
            sum(
                length + sum(sum(part.attention_mask) - added for part in one.overflowing)
                > self.context_length
                for one in encoded.encodings or ()
                if one.overflowing
            ),
        )

    @property
    def added(self) -> int:
        """How many special tokens every text gets."""
        return self.backend.num_special_tokens_to_add()

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of whole texts, neither cut nor padded; refused as when called."""
        check_texts(texts)
        clean = _cleaner(self.clean)
        cleaned = [clean(text) for text in texts]
        return self.backend(cleaned, truncation=False, verbose=False)["input_ids"]

    @property
    def pad_id(self) -> int:
        """What stands behind the end of shorter texts."""
        return int(self.backend.pad_token_id)  # pyright: ignore[reportArgumentType]

    @cached_property
    def end_id(self) -> int | None:
        """The special token that every text ends with, if there is one."""
        last: int = self.backend("a")["input_ids"][-1]
        return last if last in self.backend.all_special_ids else None

    def save(self, folder: Path | str) -> None:
        """Write the tokenizer in Hugging Face's format, whatever it was last used for."""
        self.backend.backend_tokenizer.no_truncation()
        self.backend.backend_tokenizer.no_padding()
        self.backend.save_pretrained(str(folder))

    @classmethod
    def load(
        cls, name: Path | str, *, context_length: int, clean: str | None = None
    ) -> "Tokenizer":
        """Load from a folder in Hugging Face's format, from the hub by name, or `clip` (`clip()`).

        Args:
            name: `clip`, a folder (`./clip`, should it be called so), or a hub id.
            context_length: longest text, in tokens.
            clean: what is done to a text first; None = as `clip` has it, else nothing.

        Raises:
            ValueError: there is no tokenizer of that name, or one that is refused
                (`align.tokenizer_source`).
        """
        if str(name) == "clip":
            return cls.clip(context_length=context_length, clean=clean or "lower")
        backend = read_backend(str(name))
        return cls(backend, context_length=context_length, clean=clean or "none")

    @classmethod
    def clip(cls, *, context_length: int = 77, clean: str = "lower") -> "Tokenizer":
        """CLIP's own byte pairs (Radford et al. 2021), out of the vocabulary that OpenCLIP ships.

        The same ids as `open_clip.SimpleTokenizer`, without a network; but `<end_of_text>` written
        right behind a punctuation mark is one token here and its letters there.
        """
        from open_clip.tokenizer import bytes_to_unicode, default_bpe

        with gzip.open(default_bpe(), "rt", encoding="utf-8") as lines:
            merges = [tuple(line.split()) for line in lines.read().split("\n")[1:48895]]
        letters = list(bytes_to_unicode().values())
        entries = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
        entries += _CLIP_ENDS
        raw = RawTokenizer(
            BPE(
                {entry: number for number, entry in enumerate(entries)},
                merges,  # pyright: ignore[reportArgumentType]
                end_of_word_suffix="</w>",
            )
        )
        raw.normalizer = normalizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
            [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        raw.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
            [
                pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        raw.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=f"{_CLIP_ENDS[0]} $A {_CLIP_ENDS[1]}",
            special_tokens=[(entry, entries.index(entry)) for entry in _CLIP_ENDS],
        )
        backend = PreTrainedTokenizerFast(
            tokenizer_object=raw,
            bos_token=_CLIP_ENDS[0],
            eos_token=_CLIP_ENDS[1],
            pad_token=_CLIP_ENDS[1],
        )
        return cls(backend, context_length=context_length, clean=clean)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocabulary_size: int,
        context_length: int,
        clean: str = "none",
    ) -> "Tokenizer":
        """Train a WordPiece vocabulary (Wu et al. 2016) on texts; lower case, accents dropped.

        The result depends on the multiset of texts alone, not on their order.
        """
        counted = sorted(map(_cleaner(clean), texts))
        # The trainer numbers the letters inside words ("##a") in the order of a hash table that
        # differs from process to process, and breaks ties by those numbers. A first round finds
        # them, and the second is given them in order, as if they were special.
        found = _trained(counted, vocabulary_size=1, first=_SPECIAL).get_vocab()
        inner = sorted(entry for entry in found if entry.startswith("##") and len(entry) == 3)
        vocabulary = _trained(counted, vocabulary_size=vocabulary_size, first=[*_SPECIAL, *inner])
        raw = _word_pieces(vocabulary.get_vocab())
        raw.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single="[CLS] $A [SEP]",
            special_tokens=[(name, raw.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
        )
        backend = PreTrainedTokenizerFast(
            tokenizer_object=raw,
            pad_token="[PAD]",
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
        )
        return cls(backend, context_length=context_length, clean=clean)


def check_texts(texts: Sequence[str]) -> None:
    """See whether a list holds strings that can be written as Unicode, and nothing else.

    Raises:
        ValueError: it is no list, or something in it is no text: its place and type.
    """
    if isinstance(texts, str):
        raise ValueError("encoding takes a list of strings, not one string")
    if not is_list(texts):
        raise ValueError(f"encoding takes a list of strings, not a {type(texts).__name__}")
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {place} is a {type(text).__name__}, not a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {place} is no text: its character {error.start} is half of a pair "
                f"(a lone surrogate, U+{ord(text[error.start]):04X})"
            ) from error


CLEANING = ("none", "whitespace", "lower", "canonicalize")
_CLIP_ENDS = ["<start_of_text>", "<end_of_text>"]
_CLIP_WORDS = (
    r"(?i)<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|"
    r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def _cleaner(name: str) -> Callable[[str], str]:
    if name not in CLEANING:
        raise ValueError(f"unknown way to clean {name!r}; known: {', '.join(CLEANING)}")
    if name == "none":
        return str
    from open_clip.tokenizer import get_clean_fn

    return get_clean_fn(name)


_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def _word_pieces(vocabulary: dict[str, int] | None = None) -> RawTokenizer:
    raw = RawTokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    raw.normalizer = BertNormalizer(lowercase=True)  # pyright: ignore[reportAttributeAccessIssue]
    raw.pre_tokenizer = BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    return raw


def _trained(texts: Sequence[str], *, vocabulary_size: int, first: Sequence[str]) -> RawTokenizer:
    """Word pieces of a vocabulary that begins with the given entries."""
    raw = _word_pieces()
    trainer = WordPieceTrainer(
        vocab_size=vocabulary_size, special_tokens=list(first), show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    return raw

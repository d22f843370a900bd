"""Text to token ids: any fast Hugging Face tokenizer, or one trained on the captions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from align.folders import damage


@dataclass(frozen=True)
class TokenBatch:
    """Texts as token ids, padded to the longest of the batch; `mask` is `True` on real tokens."""

    ids: Int[Tensor, "batch tokens"]
    mask: Bool[Tensor, "batch tokens"]

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The same batch on another device."""
        return TokenBatch(self.ids.to(device), self.mask.to(device))


class Tokenizer:
    """A Hugging Face tokenizer with a context length.

    Args:
        backend: the tokenizer; it needs a padding token.
        context_length: longer texts are cut here, in tokens, special ones included.

    Raises:
        ValueError: the backend cannot pad.
    """

    def __init__(self, backend: PreTrainedTokenizerFast, *, context_length: int) -> None:
        if backend.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token; give it one before using it here")
        self.backend = backend
        self.context_length = context_length

    def __len__(self) -> int:
        return len(self.backend)

    def __call__(self, texts: Sequence[str]) -> TokenBatch:
        """Tokenise texts; padding reaches to the longest text and no further."""
        encoded = self.backend(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        )
        return TokenBatch(encoded["input_ids"], encoded["attention_mask"].bool())

    def save(self, folder: Path | str) -> None:
        """Write the tokenizer in Hugging Face's format."""
        self.backend.save_pretrained(str(folder))

    @classmethod
    def load(cls, name: Path | str, *, context_length: int) -> "Tokenizer":
        """Load from a folder in Hugging Face's format, or from the hub by name.

        Raises:
            ValueError: there is no tokenizer of that name.
        """
        try:
            backend = AutoTokenizer.from_pretrained(str(name), use_fast=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no tokenizer could be read from {str(name)!r}: {damage(error)}"
            ) from error
        return cls(backend, context_length=context_length)

    @classmethod
    def train(
        cls, texts: Iterable[str], *, vocabulary_size: int, context_length: int
    ) -> "Tokenizer":
        """Train a WordPiece vocabulary (Wu et al. 2016) on texts; lower case, accents dropped.

        The result depends on the multiset of texts alone, not on their order.
        """
        counted = sorted(texts)
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
        return cls(backend, context_length=context_length)


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

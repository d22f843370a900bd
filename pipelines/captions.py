"""Captions in training: how they are written, their vocabulary, which rows are positives."""

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from align.tokenizer import Tokenizer
from pipelines.config import ConfigError
from shards.captions import CaptionRule
from shards.damage import BadSample
from shards.decode import Limits
from shards.loader import Batch
from shards.manifest import CAPTION_FIELD, JSON_FIELD, Manifest
from shards.order import hash64
from shards.read import ShardReader

_DRAW = 0x63617074  # keeps this draw apart from others over the same counters
_VOCABULARY_SAMPLES = 1_000_000


class CaptionWriter:
    """Writes a sample's caption by one of several templates, drawn from (seed, epoch, sample).

    Args:
        templates: each may name `{caption}` and any field of the sample's JSON; a list is joined
            by commas. One that is repeated is drawn more often.
        seed: of the draw.
    """

    def __init__(self, templates: Sequence[str], *, seed: int) -> None:
        self.templates = list(templates)
        self.seed = seed

    def __call__(
        self,
        captions: Sequence[str],
        fields: Sequence[Mapping[str, Any]],
        *,
        ids: Int64[np.ndarray, " batch"],
        epochs: Int64[np.ndarray, " batch"],
    ) -> list[str]:
        """One text a sample."""
        bits = hash64(self.seed, _DRAW, epochs, ids)
        chosen = (bits % np.uint64(len(self.templates))).tolist()
        return [
            self._write(self.templates[index], caption, field)
            for index, caption, field in zip(chosen, captions, fields, strict=True)
        ]

    def every_way(self, caption: str, fields: Mapping[str, Any]) -> list[str]:
        """One caption by each template: what a vocabulary is trained on."""
        return [self._write(template, caption, fields) for template in self.templates]

    @staticmethod
    def _write(template: str, caption: str, fields: Mapping[str, Any]) -> str:
        values = {
            key: ", ".join(map(str, value)) if isinstance(value, list) else value
            for key, value in fields.items()
        }
        values["caption"] = caption
        try:
            return template.format_map(values)
        except (KeyError, ValueError, IndexError, AttributeError) as error:
            raise ConfigError(
                f"captions: template {template!r} does not fit the data ({error!r}); "
                f"fields: {', '.join(sorted(values))}"
            ) from error


def train_tokenizer(
    manifest: Manifest,
    writer: CaptionWriter,
    *,
    vocabulary_size: int,
    context_length: int,
    fields: Sequence[str] = (),
    clean: str = "none",
) -> Tokenizer:
    """Train a vocabulary on the captions of a data set: those of at most a million samples."""
    return Tokenizer.train(
        _all_captions(manifest, writer, CaptionRule(tuple(fields))),
        vocabulary_size=vocabulary_size,
        context_length=context_length,
        clean=clean,
    )


def _all_captions(manifest: Manifest, writer: CaptionWriter, rule: CaptionRule) -> Iterator[str]:
    reader = ShardReader(manifest)
    stride = -(-len(manifest) // _VOCABULARY_SAMPLES)
    wanted = [name for name in (CAPTION_FIELD, JSON_FIELD) if name in manifest.fields]
    try:
        for sample in range(0, len(manifest), stride):
            try:
                captions, fields = rule.read(reader.read(sample, wanted), Limits())
            except BadSample:
                continue  # the loader counts and names it
            for caption in captions:
                yield from writer.every_way(caption, fields)
    finally:
        reader.close()


def positive_labels(batch: Batch, field: str) -> Int[Tensor, " batch"]:
    """Equal values of a field become equal labels; `caption` and `key` stand for themselves.

    Raises:
        ConfigError: a sample lacks the field.
    """
    values: list[str] = []
    for key, caption, fields in zip(batch.keys, batch.captions, batch.fields, strict=True):
        value = {"caption": caption, "key": key}.get(field, fields.get(field))
        if value is None:
            known = ", ".join(["caption", "key", *sorted(fields)])
            raise ConfigError(
                f"loss.positives: sample {key!r} has no field {field!r}; it has {known}"
            )
        values.append(str(value))
    digests = b"".join(blake2b(value.encode(), digest_size=8).digest() for value in values)
    return torch.from_numpy(np.frombuffer(digests, dtype=np.int64).copy())

"""Pairs of a data set through a model in memory, by one process or shared by many."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64

from align.model import DualEncoder
from pipelines.config import ConfigError
from pipelines.together import ALONE, Share
from shards.crop import FITS
from shards.damage import DamageTally, Problem
from shards.loader import Batch, iterate
from shards.manifest import Manifest


@dataclass(frozen=True)
class EmbeddedPairs:
    """Pictures and captions of a data set in the aligned space, a row each.

    Attributes:
        images: unit-length rows.
        texts: unit-length rows.
        captions: what the texts say.
        fields: the JSON member of each.
        ids: stable sample ids.
        keys: sample keys.
        fingerprint: of the data set.
        bad: samples that could not be read and are missing here.
    """

    images: Float32[np.ndarray, "rows dim"]
    texts: Float32[np.ndarray, "rows dim"]
    captions: list[str]
    fields: list[dict[str, Any]]
    ids: Int64[np.ndarray, " rows"]
    keys: list[str]
    fingerprint: str
    bad: int

    def values(self, field: str) -> list[str]:
        """One field of every sample; `caption` stands for the caption.

        Raises:
            ConfigError: a sample lacks it.
        """
        if field == "caption":
            return list(self.captions)
        for key, fields in zip(self.keys, self.fields, strict=True):
            if field not in fields:
                known = ", ".join(["caption", *sorted(fields)])
                raise ConfigError(f"label: sample {key!r} has no field {field!r}; it has {known}")
        return [str(fields[field]) for fields in self.fields]


def chosen(fields: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Whether a sample's fields have the wanted values (`{field: value or [values]}`)."""
    return all(
        fields.get(name) in (wanted if isinstance(wanted, list) else [wanted])
        for name, wanted in where.items()
    )


def select(batch: Batch, where: Mapping[str, Any]) -> np.ndarray:
    """Rows of a batch that are wanted."""
    return np.flatnonzero([chosen(fields, where) for fields in batch.fields])


def embed_pairs(
    model: DualEncoder,
    data: str | Manifest,
    *,
    where: Mapping[str, Any] | None = None,
    batch_size: int = 256,
    image_size: int | None = None,
    context_length: int | None = None,
    caption_fields: Sequence[str] = (),
    max_bad_fraction: float = 0.05,
    strict: bool = False,
    share: Share = ALONE,
) -> EmbeddedPairs:
    """Embed the wanted pairs of a data set in memory, at the model's own sizes or others.

    Several processes embed whole batches each, and all of them get all rows, in the order of the
    data set: each receives about `2 * rows * dim * 4` bytes of rows, and what is said of them.

    Raises:
        ConfigError: nothing is left of the data by `where`.
        ValueError: too many of its samples are bad.
    """
    manifest = data if isinstance(data, Manifest) else Manifest.open(data)
    size = image_size or model.config.image_size
    tally = DamageTally(total=len(manifest), max_fraction=max_bad_fraction, strict=strict)
    # A share cannot judge the whole: what it meets is judged when all have met theirs.
    met = tally if share.alone else DamageTally(len(manifest), list_limit=len(manifest) + 1)
    mine = share.rows(len(manifest), batch_size=batch_size)
    rows, told = [torch.empty(0, model.config.dim)], _Told()

    def embed_mine() -> None:
        stream = iterate(
            manifest,
            batch_size=batch_size,
            image_size=size,
            start=mine.start,
            stop=mine.stop,
            captions=caption_fields,
            crop=FITS[model.config.fit],
            tally=met,
        )
        for batch in stream:
            chosen_rows = select(batch, where or {})
            if len(chosen_rows):
                pixels = batch.images[chosen_rows]
                rows.append(model.encode_image(pixels, batch_size=batch_size, image_size=size))
                told.add(batch, chosen_rows)
        told.seen, told.problems = met.seen, list(met.listed.values())

    share.all_or_none(embed_mine)
    everybody = share.told(told)
    if not share.alone:
        sizes = {shard.name: shard.samples for shard in manifest.shards}
        tally.judge_scan(manifest.damage, sizes)
        for one in everybody:
            tally.add(one.seen, one.problems)
    captions = [caption for one in everybody for caption in one.captions]
    if not captions:
        raise ConfigError(f"{manifest.place}: where={dict(where or {})} leaves no sample")
    distinct = list(dict.fromkeys(captions))
    place = {caption: row for row, caption in enumerate(distinct)}
    texts = encode_shared(
        model, distinct, batch_size=batch_size, context_length=context_length, share=share
    )
    return EmbeddedPairs(
        images=share.gathered(torch.cat(rows)).numpy(),
        texts=texts[[place[caption] for caption in captions]],
        captions=captions,
        fields=[fields for one in everybody for fields in one.fields],
        ids=np.array([number for one in everybody for number in one.ids], np.int64),
        keys=[key for one in everybody for key in one.keys],
        fingerprint=manifest.fingerprint,
        bad=tally.bad,
    )


@dataclass
class _Told:
    """What a process says of the samples that it embedded."""

    captions: list[str] = field(default_factory=list)
    fields: list[dict[str, Any]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    seen: int = 0
    problems: list[Problem] = field(default_factory=list)

    def add(self, batch: Batch, rows: np.ndarray) -> None:
        """Take in the wanted rows of a batch."""
        self.captions += [batch.captions[row] for row in rows]
        self.fields += [batch.fields[row] for row in rows]
        self.ids += batch.ids[rows].tolist()
        self.keys += [batch.keys[row] for row in rows]


def encode_shared(
    model: DualEncoder,
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    context_length: int | None = None,
    share: Share = ALONE,
) -> Float32[np.ndarray, "rows dim"]:
    """Embed texts that all processes have, a share each; all of them get all rows."""
    mine = share.rows(len(texts), batch_size=batch_size)
    own = texts[mine.start : mine.stop]
    rows = share.all_or_none(
        lambda: model.encode_text(own, batch_size=batch_size, context_length=context_length)
    )
    return share.gathered(rows).numpy()


def left_out(manifest: Manifest) -> str:
    """What is known to be bad and is no sample, for the end of a line."""
    problems = manifest.problems
    return f"; {len(problems):,} left out, the first: {problems[0]}" if problems else ""

"""`align embed`: shards through a model into an embedding table; and the same in memory."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from tqdm import tqdm

from align.bundle import fingerprint, load
from align.model import DualEncoder
from eval.embed import EmbeddedRows, write_table
from pipelines import run_folder
from pipelines.config import ConfigError
from pipelines.schemas import EmbedConfig
from shards.crop import FITS
from shards.damage import DamageTally
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
    caption_fields: Sequence[str] = (),
    max_bad_fraction: float = 0.05,
    strict: bool = False,
) -> EmbeddedPairs:
    """Embed the wanted pairs of a data set in memory, at the model's own picture size or another.

    Raises:
        ConfigError: nothing is left of the data by `where`.
        ValueError: too many of its samples are bad.
    """
    manifest = data if isinstance(data, Manifest) else Manifest.open(data)
    images, captions, fields, ids, keys = [], [], [], [], []
    size = image_size or model.config.image_size
    tally = DamageTally(total=len(manifest), max_fraction=max_bad_fraction, strict=strict)
    stream = iterate(
        manifest,
        batch_size=batch_size,
        image_size=size,
        captions=caption_fields,
        crop=FITS[model.config.fit],
        tally=tally,
    )
    for batch in stream:
        rows = select(batch, where or {})
        if not len(rows):
            continue
        pixels = batch.images[rows]
        embedded = model.encode_image(pixels, batch_size=batch_size, image_size=size)
        images.append(embedded.numpy())
        ids.append(batch.ids.numpy()[rows])
        captions += [batch.captions[row] for row in rows]
        fields += [batch.fields[row] for row in rows]
        keys += [batch.keys[row] for row in rows]
    if not images:
        raise ConfigError(f"{manifest.place}: where={dict(where or {})} leaves no sample")
    distinct = list(dict.fromkeys(captions))
    place = {caption: row for row, caption in enumerate(distinct)}
    texts = model.encode_text(distinct, batch_size=batch_size).numpy()
    return EmbeddedPairs(
        images=np.concatenate(images),
        texts=texts[[place[caption] for caption in captions]],
        captions=captions,
        fields=fields,
        ids=np.concatenate(ids),
        keys=keys,
        fingerprint=manifest.fingerprint,
        bad=tally.bad,
    )


def run(config: EmbedConfig) -> int:
    """Embed a data set into a table; one that was cut off is gone on with."""
    with run_folder.locked_beside(config.out):
        return _run(config)


def _run(config: EmbedConfig) -> int:
    model = load(config.model)
    manifest = Manifest.open(config.data)
    tally = DamageTally(
        total=len(manifest), max_fraction=config.max_bad_fraction, strict=config.strict
    )

    def batches(start: int) -> Iterator[EmbeddedRows]:
        stream = iterate(
            manifest,
            batch_size=config.batch_size,
            image_size=model.config.image_size,
            start=start,
            workers=1,
            captions=config.caption_fields,
            crop=FITS[model.config.fit],
            tally=tally,
        )
        yield from _embedded(_with_bar(stream, manifest, start), model, manifest, config)

    table = write_table(
        config.out,
        batches,
        modalities=["image", "text"] if config.texts else ["image"],
        dim=model.config.dim,
        fingerprints={"model": fingerprint(config.model), "data": manifest.fingerprint},
        dtype=config.dtype,
        rows_per_part=config.rows_per_part,
        origin={"model": whereabouts(config.model), "data": whereabouts(config.data)},
    )
    if tally.seen:  # nothing is, where the table was complete before
        run_folder.write_json(config.out / "data_report.json", tally.report())
    bad = tally.bad
    listed = f", {bad} bad samples left out (data_report.json)" if bad else ""
    print(f"{config.out}: {table.rows} rows{listed}{left_out(manifest)}")
    return 0


def left_out(manifest: Manifest) -> str:
    """What is known to be bad and is no sample, for the end of a line."""
    problems = manifest.problems
    return f"; {len(problems):,} left out, the first: {problems[0]}" if problems else ""


def whereabouts(place: str) -> str:
    """A local place, so that it is found from any working directory; ids and URLs stay as they are.

    A pattern of shards is local where its folder is.
    """
    path = Path(place)
    there = path.exists() or ("{" in path.name and path.parent.exists())
    return str(path.resolve()) if there else place


def _with_bar(batches: Iterable[Batch], manifest: Manifest, start: int) -> Iterator[Batch]:
    with tqdm(
        total=len(manifest), initial=start, unit="samples", desc="embed", disable=None
    ) as bar:
        for batch in batches:
            yield batch
            bar.update(batch.consumed - bar.n)


def _embedded(
    batches: Iterable[Batch], model: DualEncoder, manifest: Manifest, config: EmbedConfig
) -> Iterator[EmbeddedRows]:
    names = np.array([shard.name for shard in manifest.shards])
    for batch in batches:
        ids = batch.ids.numpy()
        embeddings = {"image": model.encode_image(batch.images).numpy()}
        if config.texts:
            embeddings["text"] = model.encode_text(batch.captions).numpy()
        yield EmbeddedRows(
            ids=ids,
            keys=batch.keys,
            captions=batch.captions,
            shards=names[manifest.shard_numbers[ids]].tolist(),
            embeddings=embeddings,
            fields=batch.fields,
        )


if __name__ == "__main__":
    from pipelines.cli import main_of

    main_of("embed")

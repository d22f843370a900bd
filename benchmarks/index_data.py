"""Vectors like CLIP's: clusters, a few strong directions, texts away from their pictures."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from eval.embed import EmbeddedRows, write_table
from eval.table import EmbeddingTable

BLOCK = 20_000
_CLUSTERS_BY_ROOT = 9
_WITHIN, _ALONE, _GAP, _TEXT, _DECAY = 0.4, 0.4, 0.8, 0.3, 0.3


def clip_like_table(folder: Path, *, rows: int, dim: int, seed: int = 0) -> EmbeddingTable:
    """Write a table of pictures and texts, or open the one that is there.

    A pair has a meaning: a cluster of Zipf's frequency and a place in it, its coordinates of
    falling variance. Picture and text are the meaning, each with an offset of its modality (the
    gap: texts lie nearer to each other than to any picture) and noise of its own. Blocks are
    generated one at a time, each from the seed and its number.
    """
    return write_table(
        folder,
        lambda start: _batches(start, rows, dim, seed),
        modalities=("image", "text"),
        dim=dim,
        fingerprints={"model": "clip-like", "data": f"{rows}x{dim} seed {seed}"},
    )


def _batches(start: int, rows: int, dim: int, seed: int) -> Iterator[EmbeddedRows]:
    clusters = int(_CLUSTERS_BY_ROOT * rows**0.5)
    shape = np.random.default_rng(seed)
    scale = np.arange(1, dim + 1, dtype=np.float32) ** -_DECAY
    scale /= np.linalg.norm(scale)
    centres = shape.standard_normal((clusters, dim), dtype=np.float32) * scale
    offsets = _unit(shape.standard_normal((2, dim), dtype=np.float32)) * np.float32(_GAP)
    share = 1 / np.arange(1, clusters + 1) ** 0.7
    for number, first in enumerate(range(0, rows, BLOCK)):
        count = min(BLOCK, rows - first)
        if first + count <= start:
            continue
        draw = np.random.default_rng([seed, number])
        cluster = draw.choice(clusters, size=count, p=share / share.sum())
        place = draw.standard_normal((count, dim), dtype=np.float32) * scale
        meaning = _unit(centres[cluster] + np.float32(_WITHIN) * place)
        noise = draw.standard_normal((2, count, dim), dtype=np.float32)
        image = meaning + offsets[0] + noise[0] * np.float32(_ALONE / dim**0.5)
        text = meaning + offsets[1] + noise[1] * scale * np.float32(_TEXT)
        ids = np.arange(first, first + count)
        keep = ids >= start
        names = [f"{number:09d}" for number in ids[keep]]
        yield EmbeddedRows(
            ids=ids[keep],
            keys=names,
            captions=[None] * len(names),
            shards=["generated"] * len(names),
            embeddings={"image": image[keep], "text": text[keep]},
        )


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)

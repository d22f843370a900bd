"""The shards that `benchmarks.train` trains on: pictures of the demo, captions of usual lengths.

Names of emoji are short, so a caption is composed: the name, its keywords, then the names of the
emoji that follow, until it has as many tokens as `benchmarks.encode.caption_lengths` drew for it.
"""

import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
from open_clip.tokenizer import SimpleTokenizer

from benchmarks import loader_data
from benchmarks.encode import caption_lengths
from shards import demo

SHARDS = 4
CONTEXT = 77
"""Tokens of the longest captions; a model of a shorter context cuts them."""


def captions(
    names: Sequence[str], keywords: Sequence[Sequence[str]], count: Callable[[str], int]
) -> list[str]:
    """One caption for each name, the lengths of all of them spread as those of captions do.

    Args:
        names: of what the pictures show.
        keywords: further words of each.
        count: tokens of a word, without start and end.
    """
    lengths = caption_lengths(len(names), CONTEXT)
    return [
        _up_to(int(length) - 2, _words(names, keywords, number), count)
        for number, length in enumerate(lengths)
    ]


def emoji_pairs() -> tuple[list[bytes], list[str]]:
    """The WebP pictures (64 x 64 pixels) of an artist of the demo, and their captions."""
    columns = ["image", "name", "keywords"]
    table = pq.read_table(demo.FOLDER / "noto.parquet", columns=columns).to_pydict()
    tokenizer = SimpleTokenizer()
    texts = captions(table["name"], table["keywords"], lambda word: len(tokenizer.encode(word)))
    return table["image"], texts


def emoji(cache: Path) -> Path:
    """A folder of shards with the emoji of an artist, as they are; made once."""
    with loader_data.made(cache / "train-emoji") as folder:
        if folder is not None:
            pictures, texts = emoji_pairs()
            write_shards(folder, [("webp", *pair) for pair in zip(pictures, texts, strict=True)])
    return cache / "train-emoji"


def photos(cache: Path, *, count: int) -> Path:
    """A folder of shards with synthetic photos (see `loader_data.photos`); made once."""
    source = loader_data.photos(cache, count=count) / "00000.tar"
    with loader_data.made(cache / f"train-photos-{count}") as folder:
        if folder is not None:
            texts = islice(emoji_pairs()[1], count)
            pairs = zip(_pictures(source), texts, strict=True)
            write_shards(folder, [("jpg", *pair) for pair in pairs])
    return cache / f"train-photos-{count}"


def write_shards(folder: Path, samples: list[tuple[str, bytes, str]]) -> None:
    """Writes extension, picture and caption of each sample, dealt out to `SHARDS` tars."""
    for number in range(SHARDS):
        loader_data.write_tar(folder / f"{number:05d}.tar", samples[number::SHARDS])


def _pictures(path: Path) -> Iterator[bytes]:
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.endswith(".jpg") and (content := tar.extractfile(member)):
                yield content.read()


def _words(names: Sequence[str], keywords: Sequence[Sequence[str]], number: int) -> Iterator[str]:
    """All there is to say of a picture, and then of those behind it, without an end."""
    yield from names[number].split()
    for keyword in keywords[number]:
        yield from keyword.split()
    while True:
        number = (number + 1) % len(names)
        yield from names[number].split()


def _up_to(tokens: int, words: Iterable[str], count: Callable[[str], int]) -> str:
    """The first words that have so many tokens together, or just more."""
    chosen, left = [], tokens
    for word in words:
        chosen.append(word)
        left -= count(word)
        if left <= 0:
            break
    return " ".join(chosen)

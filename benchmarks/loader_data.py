"""The data sets that `benchmarks.loader` reads, each made once and kept in a cache folder."""

import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy import ndarray
from PIL import Image

from shards import demo

_HEIGHT, _WIDTH = 375, 500


def photos(cache: Path, *, count: int, tar: Path | None = None) -> Path:
    """A folder with one tar of JPEG photos: those of `tar`, or synthetic ones.

    A synthetic photo is noise with a spectrum like that of natural pictures, most of it common to
    the channels, with five of the demo's emoji drawn large over it; 500 x 375 pixels, quality 90,
    about 50 KB, which is what photos of that size have.
    """
    name = f"photos-{count}"
    if tar is not None:
        state = tar.stat()
        name = f"photos-of-{tar.stem}-{state.st_size}-{state.st_mtime_ns}"
    with made(cache / name) as folder:
        if folder is not None and tar is not None:
            shutil.copyfile(tar, folder / "00000.tar")
        elif folder is not None:
            write_tar(folder / "00000.tar", _synthetic_photos(count))
    return cache / name


def emoji(cache: Path) -> Path:
    """A folder with one tar of an artist of the demo: WebP of 64 x 64 pixels as they are."""
    with made(cache / "emoji") as folder:
        if folder is not None:
            write_tar(folder / "00000.tar", (("webp", *pair) for pair in _emoji()))
    return cache / "emoji"


def tiny(cache: Path, *, shards: int, samples: int) -> Path:
    """A folder of shards with `samples` samples each, of one white pixel and a few letters.

    The shards are one file on disk under as many names: what is measured is how long it takes to
    find a place among many samples, not the disk.
    """
    place = cache / f"tiny-{shards}x{samples}"
    with made(place) as folder:
        if folder is not None:
            sink = io.BytesIO()
            Image.new("RGB", (1, 1), "white").save(sink, "PNG")
            pairs = (("png", sink.getvalue(), f"number {number}") for number in range(samples))
            write_tar(folder / "00000.tar", pairs)
            for number in range(1, shards):
                os.link(folder / "00000.tar", folder / f"{number:05d}.tar")
    return place


@contextmanager
def made(place: Path) -> Iterator[Path | None]:
    """A folder to fill, which becomes `place` when it is whole; None where that exists already."""
    if place.is_dir():
        yield None
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".making-") as scratch:
        part = Path(scratch) / "part"
        part.mkdir()
        yield part
        part.rename(place)


def write_tar(path: Path, samples: Iterable[tuple[str, bytes, str]]) -> None:
    """Writes extension, picture and caption of each sample."""
    with tarfile.open(path, "w") as tar:
        for number, (extension, picture, caption) in enumerate(samples):
            for ending, data in ((extension, picture), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:07d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _emoji() -> list[tuple[bytes, str]]:
    table = pq.read_table(demo.FOLDER / "noto.parquet", columns=["image", "name"])
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def _synthetic_photos(count: int) -> Iterator[tuple[str, bytes, str]]:
    rng = np.random.default_rng(0)
    figures = _emoji()
    for _ in range(count):
        photo = Image.fromarray(_natural_noise(rng))
        chosen = [figures[number] for number in rng.integers(len(figures), size=5)]
        for picture, _ in chosen:
            side = int(rng.integers(60, 260))
            figure = Image.open(io.BytesIO(picture)).convert("RGB")
            figure = figure.resize((side, side), Image.Resampling.BICUBIC)
            # The demo's pictures lie on white, which is left out.
            mask = Image.fromarray(255 * (np.asarray(figure.convert("L")) < 250).astype(np.uint8))
            corner = int(rng.integers(-40, _WIDTH - 40)), int(rng.integers(-40, _HEIGHT - 40))
            photo.paste(figure, corner, mask)
        sink = io.BytesIO()
        photo.save(sink, "JPEG", quality=90)
        yield "jpg", sink.getvalue(), ", ".join(name for _, name in chosen)


def _natural_noise(rng: np.random.Generator) -> ndarray:
    """An RGB picture of noise whose amplitude falls as the frequency to the power of 1.5."""
    down = np.fft.fftfreq(_HEIGHT)[:, None] * _HEIGHT
    across = np.fft.rfftfreq(_WIDTH)[None] * _WIDTH
    fall = np.maximum(np.hypot(down, across), 1) ** -1.5
    noise = rng.standard_normal((4, _HEIGHT, _WIDTH))
    noise = np.fft.irfft2(np.fft.rfft2(noise) * fall, s=(_HEIGHT, _WIDTH))
    noise /= noise.std(axis=(1, 2), keepdims=True)
    mixed = noise[3] + 0.4 * noise[:3]
    return (128 + 52 * mixed).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)

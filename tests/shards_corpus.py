"""Small data sets for the tests of `shards`, whose pictures tell which sample they belong to."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from shards.loader import Batch

SIDE = 8


def picture(number: int, *, side: int = SIDE, form: str = "PNG") -> bytes:
    """A picture of one colour that encodes a number below 65,536."""
    sink = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number // 256, 77)).save(sink, form)
    return sink.getvalue()


def numbers_in(batch: Batch) -> list[int]:
    """The numbers that the pictures of a batch encode."""
    corner = batch.images[:, :, 0, 0].numpy().astype(np.int64)
    assert (corner[:, 2] == 77).all()
    return (corner[:, 0] + 256 * corner[:, 1]).tolist()


def sample(number: int) -> dict[str, bytes]:
    """The members of one sound sample."""
    return {
        f"{number:05d}.json": b'{"number": %d}' % number,
        f"{number:05d}.png": picture(number),
        f"{number:05d}.txt": f"caption {number}".encode(),
    }


def write_tar(path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]]) -> None:
    """Writes a tar as other tools do."""
    pairs = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in pairs:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def write_set(folder: Path, sizes: Sequence[int]) -> Path:
    """A data set of shards of the given sizes, numbered through."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for shard, size in enumerate(sizes):
        members: dict[str, bytes] = {}
        for number in range(first, first + size):
            members |= sample(number)
        write_tar(folder / f"{shard:03d}.tar", members)
        first += size
    return folder

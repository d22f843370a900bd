"""One walk over the headers of every shard, and the table of samples that comes out of it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from shards.damage import BadSample, Problem
from shards.storage import Storage
from shards.tar import TarContent, read_tar

_MAX_FIELDS = 256


def walks(storage: Storage) -> Iterator[TarContent]:
    """One walk over the headers of each shard; a bar tells how far it is where that takes long."""
    tars = storage.tars()
    with tqdm(
        desc=f"scanning {storage.url}",
        total=sum(size for _, size in tars),
        unit="B",
        unit_scale=True,
        delay=1,
        disable=None,
    ) as bar:
        for name, size in tars:
            version = ""
            try:
                version = storage.version(name)
                with storage.open(name) as stream:
                    content = read_tar(stream, name)
            except BadSample as bad:
                content = TarContent(name, problems=[Problem(name, "", bad.reason, bad.detail)])
            content.bytes, content.version = size, version
            bar.update(size)
            yield content


def sample_table(place: str, number: int, content: TarContent) -> pa.Table:
    """The rows of one shard."""
    samples = content.samples
    fields = {name for sample in samples for name in sample.spans}
    if len(fields) > _MAX_FIELDS:
        raise ValueError(f"{place}: {len(fields)} kinds of members; these are not pairs of files")
    columns: dict[str, Any] = {
        "shard": pa.array(np.full(len(samples), number, np.int32)),
        "key": pa.array([sample.key for sample in samples], pa.string()),
    }
    for name in fields:
        spans = [sample.spans.get(name, (None, None)) for sample in samples]
        columns[f"{name}.offset"] = pa.array([span[0] for span in spans], pa.int64())
        columns[f"{name}.size"] = pa.array([span[1] for span in spans], pa.int64())
    return pa.table(columns)

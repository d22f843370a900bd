"""Rows that were exported as Parquet, in a Qdrant collection that answers as the index does."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import dataset

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

BATCH = 1024
"""Rows sent at a time."""


def load(folder: Path | str, client: "QdrantClient | str", collection: str) -> int:
    """Create a collection and fill it; ids, vectors and columns are those of the files.

    Its distance is the inner product, over unit-length vectors the cosine. Every column with text,
    whole numbers or flags gets an index, by which filters are quick; nulls are left out.

    Args:
        folder: What :func:`eval.index.export.export_parquet` wrote.
        client: Of a server or a cluster, or its URL; one of a local folder or `:memory:`, too.
        collection: Its name; it must not exist.

    Returns:
        How many rows there are in it.

    Raises:
        FileNotFoundError: The folder holds no such files.
        ValueError: The collection exists, ids are negative, or rows did not arrive.
    """
    try:
        from qdrant_client import QdrantClient, models
    except ModuleNotFoundError as error:
        raise ValueError("qdrant-client is not installed: pip install qdrant-client") from error
    paths = sorted(Path(folder).glob("rows/*.parquet"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no rows/*.parquet in it; export with export=parquet")
    rows = dataset.dataset(paths, format="parquet")
    if isinstance(client, str):
        client = QdrantClient(client)
    if client.collection_exists(collection):
        raise ValueError(f"{collection}: this collection exists; choose another name")
    width = rows.schema.field("vector").type.list_size
    client.create_collection(
        collection,
        vectors_config=models.VectorParams(size=width, distance=models.Distance.DOT),
    )
    for batch in rows.to_batches(batch_size=BATCH):
        if len(batch):
            client.upsert(collection, points=_points(batch), wait=True)
    for field in rows.schema:
        if field.name not in ("id", "vector") and (kind := _KINDS.get(str(field.type))):
            with warnings.catch_warnings():  # a client without a server says that it has no indexes
                warnings.simplefilter("ignore")
                client.create_payload_index(collection, field.name, field_schema=kind)
    count = client.count(collection, exact=True).count
    if count != rows.count_rows():
        raise ValueError(f"{collection}: {count} rows arrived of {rows.count_rows()}")
    return count


_KINDS: dict[str, Any] = {
    "string": "keyword",
    "int64": "integer",
    "double": "float",
    "bool": "bool",
}


def _points(batch: pa.RecordBatch) -> Any:
    from qdrant_client import models

    values = batch.drop_columns(["id", "vector"]).to_pylist()
    vectors = batch["vector"].values.to_numpy().reshape(len(batch), -1)  # pyright: ignore
    return models.Batch(
        ids=batch["id"].to_pylist(),
        vectors=vectors.tolist(),
        payloads=[{name: one for name, one in row.items() if one is not None} for row in values],
    )

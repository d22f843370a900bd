"""What stands in the folders that are exported: how to load them, line by line."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from eval.index.card import IndexCard


def clip_retrieval_readme(card: IndexCard, out: Path, columns: Sequence[str]) -> str:
    """How clip-retrieval's backend is started on the folder."""
    shown = ", ".join(f'"{name}"' for name in columns)
    mapped = " --enable_faiss_memory_mapping=True" if card.lists_file else ""
    model = card.origin.get("model", "the model")
    return f"""# {out.name}: {card.rows:,} {card.modality} rows for clip-retrieval

The index is `{card.factory}` over vectors of {card.dim} by {model}. Ids there are the places of
rows, from 0.

    cd {out.resolve()}
    clip-retrieval back --indices_paths=indices_paths.json --columns_to_return='[{shown}]' \\
        --enable_mclip_option=False --provide_aesthetic_embeddings=False{mapped} --clip_model=MODEL

MODEL is this model as clip-retrieval names it, such as `open_clip:ViT-B-32/laion2b_s34b_b79k`; it
loads models of OpenAI, OpenCLIP and Hugging Face. With another one texts find nothing sensible.
Knobs kept with the index: `{card.knobs or "none"}`.
"""


def parquet_readme(card: IndexCard, out: Path, rows: int, schema: pa.Schema) -> str:
    """How the files are loaded into databases."""
    columns = "\n".join(f"| {field.name} | {field.type} |" for field in schema)
    scalar = [field for field in schema if field.name not in ("id", "vector")]
    lance = next((field.name for field in scalar), "id")
    return f"""# {out.name}: {rows:,} {card.modality} rows of {card.dim}

`rows/*.parquet` hold one row for each row of the index, without the removed ones. Vectors have unit
length, so the inner product is the cosine. Queries need vectors of the same model:
{card.origin.get("model", "not recorded")}. `columns.json` gives the names in the index.

| column | type |
|---|---|
{columns}

## Qdrant

    pip install qdrant-client

    from eval.index.qdrant import load
    load("{out}", "http://localhost:6333", "{_name(out)}")

A cluster is addressed the same way. Then

    from qdrant_client import QdrantClient
    QdrantClient("http://localhost:6333").query_points("{_name(out)}", query=vector, limit=10)

## LanceDB

    import lancedb, pyarrow.dataset
    rows = pyarrow.dataset.dataset("{out}/rows", format="parquet")
    table = lancedb.connect("DATABASE").create_table(
        "{_name(out)}", data=iter(rows.to_batches()), schema=rows.schema)
    table.search(vector).distance_type("dot").where("{lance} IS NOT NULL").limit(10).to_list()

`_distance` is 1 - cosine.

## Milvus

    import pyarrow.dataset
    from pymilvus import DataType, MilvusClient
    client = MilvusClient("http://localhost:19530")
    schema = client.create_schema(auto_id=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim={card.dim})
{_milvus_fields(scalar)}
    index = client.prepare_index_params()
    index.add_index("vector", index_type="HNSW", metric_type="IP",
                    params={{"M": 32, "efConstruction": 200}})
    client.create_collection("{_name(out)}", schema=schema, index_params=index)
    rows = pyarrow.dataset.dataset("{out}/rows", format="parquet")
    for batch in rows.to_batches(batch_size=1000):
        if len(batch):
            client.insert("{_name(out)}", batch.to_pylist())

## DuckDB

    SELECT * EXCLUDE vector, list_inner_product(vector, $query::FLOAT[]) AS score
    FROM '{out}/rows/*.parquet' ORDER BY score DESC LIMIT 10;
"""


def _milvus_fields(fields: Sequence[pa.Field]) -> str:
    kinds = {"string": "VARCHAR, max_length=65535", "int64": "INT64", "double": "DOUBLE"}
    return "\n".join(
        f'    schema.add_field("{field.name}", '
        f"DataType.{kinds.get(str(field.type), 'BOOL')}, nullable=True)"
        for field in fields
    )


def _name(out: Path) -> str:
    """A name for a collection."""
    return "".join(letter if letter.isalnum() else "_" for letter in out.name) or "align"

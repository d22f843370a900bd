"""An index in the forms that other engines load.

    clip_retrieval    a folder for clip-retrieval's backend: image.index or text.index, metadata/
    parquet           rows as Parquet files: id, vector, and the metadata as plain columns

Removed rows are left out, or refused where a FAISS file would still hold them. What comes from the
metadata is renamed and converted so that every engine takes it: names of letters, digits and _, and
types text, int64, double and bool; anything else becomes JSON text.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from numpy import ndarray
from pyarrow import parquet

from align.folders import whole_folder
from eval.index.export_readme import clip_retrieval_readme, parquet_readme
from eval.index.folder import OpenIndex, link, open_index, write_faiss

FILE_ROWS = 131_072
"""Rows of a Parquet file."""

GROUP_ROWS = 8192
"""Rows of a row group; as many vectors are in memory."""

FAISS_1_8 = (
    "IndexFlat", "IndexFlatIP", "IndexScalarQuantizer", "IndexPQ", "IndexPQFastScan",
    "IndexHNSWFlat", "IndexHNSWSQ", "IndexHNSWPQ", "IndexNSGFlat",
    "IndexIVFFlat", "IndexIVFScalarQuantizer", "IndexIVFPQ", "IndexIVFPQFastScan",
    "IndexPreTransform", "IndexRefine", "IndexRefineFlat",
)  # fmt: skip
"""Kinds of indexes that FAISS 1.8 reads, which clip-retrieval is held to."""


def export_clip_retrieval(folder: Path | str, out: Path | str) -> list[str]:
    """A folder that `clip-retrieval back` opens, mostly of links to the index's own files.

    There a row's id is its place, and names decide the order of files: they are padded.

    Args:
        folder: The index folder.
        out: The new folder.

    Returns:
        What to tell the user, line by line.

    Raises:
        ValueError: The index is of a kind that FAISS 1.8 does not know or that cannot give back
            vectors, has removed rows, or `out` holds other files.
    """
    out = _new(out)
    opened = open_index(folder, check="sizes")
    card = opened.card
    if card.removed:
        raise ValueError(
            f"{folder}: {card.removed} removed rows would be found again; compact it first"
        )
    _refuse_unknown(opened)
    kind = "text" if card.modality == "text" else "image"  # it knows no third kind
    name = f"{kind}.index"
    with whole_folder(out) as beside:
        if card.lists_file:
            link(opened.folder / card.index_file, beside / name / "populated.index")
            link(opened.folder / card.lists_file, beside / name / card.lists_file)
        elif card.knobs:  # there, those in the file count
            write_faiss(opened.index, beside / name)
        else:
            link(opened.folder / card.index_file, beside / name)
        _padded([opened.folder / path for one in card.sources for path in one.vectors], beside)
        _padded([opened.folder / path for one in card.sources for path in one.metadata], beside)
        infos = {
            "index_key": card.factory,
            "index_param": card.knobs,
            "nb vectors": card.rows,
            "vectors dimension": card.dim,
        }
        (beside / f"{kind}.json").write_text(json.dumps(infos))
        paths = {out.name: str(out.resolve())}
        (beside / "indices_paths.json").write_text(json.dumps(paths, indent=1))
        columns = [name for name in opened.rows.table.column_names if name != "id"]
        (beside / "README.md").write_text(clip_retrieval_readme(card, out, columns))
    return [f"{card.rows:,} rows for clip-retrieval; how to start it stands in {out}/README.md"]


def _padded(paths: list[Path], out: Path) -> None:
    """Link files under names whose order as text is their order."""
    digits = len(str(max(len(paths) - 1, 0)))
    for number, path in enumerate(paths):
        stem = path.stem.rstrip("0123456789")
        link(path, out / path.parent.name / f"{stem}{number:0{digits}d}{path.suffix}")


def _refuse_unknown(opened: OpenIndex) -> None:
    """clip-retrieval asks for hits with their decoded vectors, from FAISS 1.8."""
    parts = list(_nested(opened.index))
    for part in parts:
        if (name := type(part).__name__) not in FAISS_1_8:
            raise ValueError(
                f"{opened.folder}: clip-retrieval's FAISS 1.8 does not know {name} (factory "
                f"{opened.card.factory}); build the index with another factory, such as HNSW32 or "
                "IVF1024,SQ8"
            )
    is_refined = any(isinstance(part, faiss.IndexRefine) for part in parts)
    if any(isinstance(part, faiss.IndexIVFPQFastScan) for part in parts) and not is_refined:
        raise ValueError(
            f"{opened.folder}: FAISS 1.8 cannot give back the vectors of {opened.card.factory}, "
            "which clip-retrieval wants; add ,Refine(SQ8) or leave out fs"
        )


def _nested(index: faiss.Index) -> Iterator[faiss.Index]:
    """An index and those inside it."""
    index = faiss.downcast_index(index)
    yield index
    if isinstance(index, faiss.IndexPreTransform):
        yield from _nested(index.index)
    if isinstance(index, faiss.IndexRefine):
        yield from _nested(index.base_index)
        yield from _nested(index.refine_index)


def export_parquet(folder: Path | str, out: Path | str) -> list[str]:
    """Parquet files with the rows of an index: id, unit-length float32 vector, metadata columns.

    They lie in `rows/`. Beside it `columns.json` says which column each was in the index, and
    `README.md` how databases load them. Memory is a row group.

    Args:
        folder: The index folder.
        out: The new folder.

    Returns:
        What to tell the user, line by line.

    Raises:
        ValueError: The index is damaged, or `out` holds other files.
    """
    out = _new(out)
    opened = open_index(folder, check="sizes")
    live = np.setdiff1d(np.arange(opened.card.rows), opened.removed, assume_unique=True)
    source = opened.rows.table.schema
    names = plain_names([name for name in source.names if name != "id"])
    fields = [pa.field(new, plain_type(source.field(old).type)) for old, new in names.items()]
    vector = pa.list_(pa.field("item", pa.float32(), nullable=False), opened.card.dim)
    number = pa.field("id", pa.int64(), nullable=False)
    schema = pa.schema([number, pa.field("vector", vector, nullable=False), *fields])
    with whole_folder(out) as beside:
        for part, first in enumerate(range(0, len(live), FILE_ROWS)):
            path = beside / "rows" / f"rows_{part:05d}.parquet"
            path.parent.mkdir(exist_ok=True)
            with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
                for start in range(first, min(first + FILE_ROWS, len(live)), GROUP_ROWS):
                    rows = live[start : min(start + GROUP_ROWS, first + FILE_ROWS)]
                    writer.write_table(_group(opened, rows, names, schema))
        (beside / "columns.json").write_text(json.dumps(names, indent=1, ensure_ascii=False))
        (beside / "README.md").write_text(parquet_readme(opened.card, out, len(live), schema))
    return [f"{len(live):,} rows as Parquet; how to load them stands in {out}/README.md"]


def _group(
    opened: OpenIndex, rows: Int64[ndarray, " some"], names: Mapping[str, str], schema: pa.Schema
) -> pa.Table:
    vectors = pa.array(opened.rows.vectors(rows).ravel())
    # A window first: taking from the whole table would gather all of its text in memory.
    window = opened.rows.table.slice(int(rows[0]), int(rows[-1] - rows[0]) + 1)
    taken = window.take(pa.array(rows - rows[0]))
    columns = [taken["id"], pa.FixedSizeListArray.from_arrays(vectors, type=schema.field(1).type)]
    for old, new in names.items():
        columns.append(_converted(taken[old], schema.field(new).type))
    return pa.table(columns, schema=schema)


def plain_names(columns: list[str]) -> dict[str, str]:
    """Names that every engine takes, by the names there: letters, digits and _, each once."""
    names: dict[str, str] = {}
    taken = {"id", "vector"}
    for column in columns:
        plain = re.sub(r"\W", "_", column, flags=re.ASCII)
        plain = plain if re.match(r"[A-Za-z]", plain) else f"field_{plain.lstrip('_')}"
        plain = plain[:200]
        name, count = plain, 1
        while name.lower() in taken:
            count += 1
            name = f"{plain}_{count}"
        taken.add(name.lower())
        names[column] = name
    return names


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Text, int64, double or bool: what every engine filters by."""
    if pa.types.is_boolean(kind):
        return pa.bool_()
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return pa.int64()
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind) or kind == pa.uint64():
        return pa.float64()
    return pa.string()


def _converted(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    given = column.type
    if kind != pa.string() or pa.types.is_string(given) or pa.types.is_large_string(given):
        return column.cast(kind, safe=False)
    if pa.types.is_temporal(given) and not pa.types.is_duration(given):
        return pa.chunked_array([[_text(value) for value in column.to_pylist()]], pa.string())
    values = column.to_pylist()
    said = [None if v is None else json.dumps(v, default=_text, ensure_ascii=False) for v in values]
    return pa.chunked_array([said], pa.string())


def _text(value: Any) -> str | None:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return None if value is None else str(value)


def _new(out: Path | str) -> Path:
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: holds other files; choose a new folder")
    return out


EXPORTS: dict[str, Callable[[Path | str, Path | str], list[str]]] = {
    "clip_retrieval": export_clip_retrieval,
    "parquet": export_parquet,
}
"""Forms to export to, by name."""

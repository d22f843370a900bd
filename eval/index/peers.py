"""Folders of clip-retrieval and autofaiss: their embeddings as a table, their indexes as ours.

What they write, and what is read of it:

    img_emb/*.npy, text_emb/*.npy      embeddings of clip-retrieval; autofaiss has *.npy alone
    metadata/*.parquet or *.arrow      one row for each of them
    image.index, text.index, knn.index     a FAISS index over the embeddings, in their order
    image.json, index_infos.json       its factory string and its knobs

There the order of the rows, by file names as text, is all that joins these files. Here counts are
compared, rows get ids, and some of an index's vectors are held against the embeddings.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from faiss.contrib.factory_tools import reverse_index_factory

from align.folders import whole_folder
from eval.index.build import Progress, card_of, finished, refuse_strangers
from eval.index.card import IndexCard
from eval.index.folder import (
    faiss_call,
    link,
    set_knobs,
    take_rows,
    with_checksums,
    write_faiss,
)
from eval.index.peer_files import BLOCK, PeerFiles, Vectors, peer_files, write_peer_table
from eval.table import MODALITIES, EmbeddingTable, TableCard

NAMES = {"image": ("image.index", "knn.index"), "text": ("text.index", "knn.index")}
"""What the peers call an index, by modality."""

_LISTS = "lists.ivfdata"
_PROBES = 64
"""So many vectors of an index are held against the embeddings that are said to be in it."""


def kind_of(folder: Path | str) -> str | None:
    """What a folder of theirs is: `index`, `embeddings`, or None for neither."""
    folder = Path(folder)
    if (folder / "index.json").exists() or (folder / "table.json").exists():
        return None  # ours
    if any(folder.glob("*.index")):
        return "index"
    there = [folder / "img_emb", folder / "text_emb", folder]
    return "embeddings" if any(any(one.glob("*.npy")) for one in there) else None


def adopt_table(
    folder: Path | str,
    out: Path | str,
    *,
    modality: str = "image",
    model_fingerprint: str = "",
    origin: Mapping[str, Any] | None = None,
) -> EmbeddingTable:
    """An embedding table over the files of clip-retrieval's or autofaiss's embedding folder.

    The vectors are linked, or copied where `out` lies on another file system; the metadata are
    written anew with ids, 0 for the first row. Rows need not have unit length.

    Args:
        folder: It holds `img_emb/`, `text_emb/`, or `.npy` files themselves; and `metadata/`, which
            may be missing.
        out: The table's folder: new, empty, or the table of an earlier call for this folder.
        modality: What `.npy` files outside `img_emb/` and `text_emb/` are embeddings of.
        model_fingerprint: Of the model they are from; empty where it is not known.
        origin: Free values for the table's card: where `model` and `data` lie.

    Raises:
        FileNotFoundError: There are no embeddings.
        ValueError: Counts differ, a file is damaged or pickled, or a row has no direction.
    """
    out = Path(out)
    said = {**(origin or {}), "adopted": str(Path(folder).resolve())}
    if out.exists() and any(out.iterdir()) and not _is_again(out, said["adopted"]):
        raise ValueError(f"{out}: holds other files; choose a new folder for the table")
    files = peer_files(Path(folder), modality)
    if not files.vectors:
        raise FileNotFoundError(
            f"{folder}: no embeddings (.npy files) in it, nor in its img_emb/ or text_emb/"
        )
    with whole_folder(out) as beside:
        write_peer_table(files, beside, model_fingerprint=model_fingerprint, origin=said)
    return EmbeddingTable(out, check="sizes")


def _is_again(out: Path, adopted: str) -> bool:
    """Whether a folder holds the table that was made of the same embeddings before."""
    if not (out / "table.json").is_file():
        return False
    return TableCard.load(out).origin.get("adopted") == adopted


def adopt(
    folder: Path | str,
    out: Path | str,
    *,
    modality: str = "image",
    embeddings: Path | str | None = None,
    model_fingerprint: str = "",
    origin: Mapping[str, Any] | None = None,
    queries: str | None = None,
    target_recall: float | None = None,
    query_count: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> IndexCard:
    """An index folder of ours over an index that clip-retrieval or autofaiss built.

    Recall is measured against the embeddings, for texts too where text embeddings are among them.
    Without embeddings it is measured against what the index itself decodes, which for compressed
    vectors says only how well the search finds them; the card's origin then has `decoded`.

    Args:
        folder: It holds `image.index`, `text.index` or one other `.index`, and `metadata/`.
        out: The index folder; an index of ours that is there is replaced.
        modality: Which of the indexes.
        embeddings: Their embedding folder; by default looked for in `folder` itself.
        model_fingerprint: As for :func:`adopt_table`.
        origin: As for :func:`adopt_table`.
        queries: The kind of queries to tune for, where knobs are tuned.
        target_recall: Recall@10 to tune the knobs for; by default those that the peer chose stay.
        query_count: How many queries of each kind measure it.
        seed: Draws them.
        progress: Told of long work.

    Raises:
        FileNotFoundError: There is no index.
        ValueError: Counts differ, the index holds other vectors than the embeddings, its scores
            are no cosines, or a file is damaged.
    """
    folder, out = Path(folder), Path(out)
    refuse_strangers(out)
    path, lists = _index_file(folder, modality)
    flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY if lists else 0
    index = faiss_call(f"{path}", lambda: faiss.read_index(str(path), flags))
    _refuse_metric(path, index)
    files = _files(folder, modality, embeddings)
    _refuse_other_rows(path, index, files)
    factory, knobs = _said(path, index)
    with whole_folder(out) as beside:
        work = beside / "table"  # gone when the folder is whole
        is_decoded = modality not in files.vectors
        if is_decoded:
            decoded = Vectors.of(_decode(path, index, work / "decoded"))
            files = replace(files, vectors={modality: decoded})
        else:
            _refuse_other_vectors(path, index, files.vectors[modality])
        about = {**(origin or {}), "decoded": True} if is_decoded else origin or {}
        table = write_peer_table(files, work, model_fingerprint=model_fingerprint, origin=about)
        source = take_rows(table, modality, beside, number=0, first_id=0, first_part=0)
        facts = finished(
            index, table, modality, knobs="" if target_recall else knobs, queries=queries,
            target_recall=target_recall or 0.95, query_count=query_count, seed=seed,
            progress=progress,
        )  # fmt: skip
        if is_decoded:
            source = replace(source, vectors=())
            shutil.rmtree(beside / MODALITIES[modality])
        if lists is not None:
            link(lists.resolve(), beside / _LISTS)
            _name_lists(index, _LISTS)
        if is_decoded or lists:  # with the direct map, by which rows are decoded by number
            write_faiss(index, beside / "index.faiss")
        else:
            link(path.resolve(), beside / "index.faiss")
        shutil.rmtree(work)
        card = card_of(
            table, source, facts, beside, index, factory=factory, size=_bytes(path, lists),
            seconds=0.0,
        )  # fmt: skip
        card = replace(
            card,
            tuned_for=facts.tuned_for if target_recall else None,
            target_recall=target_recall,
            build_seconds=0.0,
            fingerprints={"model": model_fingerprint},
            lists_file=None if lists is None else _LISTS,
        )
        card = with_checksums(card, beside)
        card.save(beside)
    return card


def _index_file(folder: Path, modality: str) -> tuple[Path, Path | None]:
    """The FAISS file, and the file of its inverted lists where they lie on disk beside it."""
    there = {path.name: path for path in sorted(folder.glob("*.index"))}
    named = [name for name in NAMES.get(modality, ()) if name in there]
    others = [name for name in there if name not in ("image.index", "text.index")]
    if not named and len(others) == 1:
        named = others
    if not named:
        raise FileNotFoundError(
            f"{folder}: no {modality} index of clip-retrieval or autofaiss, only "
            f"{', '.join(there) or 'other files'}"
        )
    path = there[named[0]]
    if not path.is_dir():
        return path, None
    beside = [one for one in path.iterdir() if one.name != "populated.index"]
    if not (path / "populated.index").is_file() or len(beside) != 1:
        raise ValueError(f"{path}: not an index on disk (populated.index and its lists)")
    return path / "populated.index", beside[0]


def _files(folder: Path, modality: str, embeddings: Path | str | None) -> PeerFiles:
    """Vectors from the embedding folder; metadata from beside the index, or else from there."""
    own = peer_files(folder, modality)
    if embeddings is None:
        return own
    there = peer_files(Path(embeddings), modality)
    if modality not in there.vectors:
        raise FileNotFoundError(f"{embeddings}: no {modality} embeddings (.npy files) in it")
    return replace(there, metadata=own.metadata or there.metadata)


def _refuse_metric(path: Path, index: faiss.Index) -> None:
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(
            f"{path}: compares by distance, not by inner product, so its scores are no cosines; "
            "build an index from the embeddings instead"
        )
    if isinstance(index, faiss.IndexIDMap):
        raise ValueError(
            f"{path}: numbers its vectors itself, so no row of metadata belongs to them; build an "
            "index from the embeddings instead"
        )
    if index.ntotal == 0:
        raise ValueError(f"{path}: an empty index")


def _refuse_other_rows(path: Path, index: faiss.Index, files: PeerFiles) -> None:
    """Counts that differ would show the pictures of other rows."""
    for one in (*files.vectors.values(), *([files.metadata] if files.metadata else [])):
        if one.rows != index.ntotal:
            raise ValueError(
                f"{path}: {index.ntotal} vectors, but {one.rows} rows in {one.folder}; hits would "
                "show other rows than were found"
            )
    for vectors in files.vectors.values():
        if vectors.dim != index.d:
            raise ValueError(
                f"{path}: vectors of {index.d}, but {vectors.folder} holds rows of {vectors.dim}"
            )


def _refuse_other_vectors(path: Path, index: faiss.Index, vectors: Vectors) -> None:
    """Decoded vectors must be nearest to their own rows' embeddings, and those of unit length."""
    rows = np.unique(np.linspace(0, vectors.rows - 1, _PROBES).astype(np.int64))
    own = vectors.some(rows)
    lengths = np.linalg.norm(own, axis=1)
    if (np.abs(lengths - 1) > 0.01).any():
        raise ValueError(
            f"{vectors.folder}: rows of length {lengths.min():.2f} to {lengths.max():.2f}, so the "
            f"scores of {path.name} are no cosines; build an index from the embeddings instead"
        )
    _number_rows(path, index)
    decoded = faiss_call(f"{path}", lambda: index.reconstruct_batch(rows))
    likeness = decoded @ own.T
    wrong = likeness.max(axis=1) > np.diag(likeness) + 1e-3
    if wrong.mean() > 0.5:
        raise ValueError(
            f"{path}: holds other vectors than {vectors.folder}, or in another order ({wrong.sum()}"
            f" of {len(rows)} looked at are nearer to other rows)"
        )


def _decode(path: Path, index: faiss.Index, folder: Path) -> list[Path]:
    """Write the vectors that an index holds, as well as it holds them, part by part.

    Raises:
        ValueError: It cannot give them back, or gives back ones that are not of unit length.
    """
    _number_rows(path, index)
    rows = np.unique(np.linspace(0, index.ntotal - 1, _PROBES).astype(np.int64))
    some = faiss_call(f"{path}", lambda: index.reconstruct_batch(rows))
    length = float(np.linalg.norm(some, axis=1).mean())
    if not 0.5 < length < 1.1:  # coarse codes decode to somewhat shorter vectors
        raise ValueError(
            f"{path}: its vectors are {length:.2f} long on average, so its scores are no cosines; "
            "build an index from the embeddings instead"
        )
    folder.mkdir(parents=True)
    paths = []
    for first in range(0, index.ntotal, BLOCK):
        count = min(BLOCK, index.ntotal - first)
        block = faiss_call(f"{path}", lambda f=first, n=count: index.reconstruct_n(f, n))
        paths.append(folder / f"decoded_{len(paths):06d}.npy")
        np.save(paths[-1], block)
    return paths


def _number_rows(path: Path, index: faiss.Index) -> None:
    """Have the vectors of inverted lists found by their number."""
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        faiss_call(f"{path}", ivf.make_direct_map)


def _said(path: Path, index: faiss.Index) -> tuple[str, str]:
    """Factory string and knobs: what the infos beside the index say, else what it shows."""
    infos = _infos(path)
    factory = str(infos.get("index_key") or "") or _factory(index)
    shown = _shown_knobs(index)
    knobs = str(infos.get("index_param") or "") or shown
    try:
        set_knobs(index, knobs)
    except ValueError:  # a knob that only their release of FAISS knows; the file keeps the rest
        knobs = shown
        set_knobs(index, knobs)
    return factory, knobs


def _infos(path: Path) -> dict[str, Any]:
    folder = path.parent if path.name != "populated.index" else path.parent.parent
    stem = path.stem if path.name != "populated.index" else path.parent.stem
    for name in (f"{stem}.json", f"{stem}_infos.json", "index_infos.json"):
        try:
            infos = json.loads((folder / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(infos, dict) and "index_key" in infos:
            return infos
    return {}


def _factory(index: faiss.Index) -> str:
    """A factory string, or the name of FAISS's class where it knows none."""
    try:
        return reverse_index_factory(index) or type(index).__name__
    except (NotImplementedError, AttributeError, AssertionError):
        return type(index).__name__


def _shown_knobs(index: faiss.Index) -> str:
    if isinstance(index, faiss.IndexPreTransform):
        return _shown_knobs(faiss.downcast_index(index.index))
    if isinstance(index, faiss.IndexRefine):
        return _shown_knobs(faiss.downcast_index(index.base_index))
    if isinstance(index, faiss.IndexIVF):
        return f"nprobe={index.nprobe}"
    if isinstance(index, faiss.IndexHNSW):
        return f"efSearch={index.hnsw.efSearch}"
    return ""


def _name_lists(index: faiss.Index, name: str) -> None:
    """Have an index say that its lists lie in this file beside it."""
    lists: Any = faiss.downcast_InvertedLists(faiss.extract_index_ivf(index).invlists)  # pyright: ignore
    lists.filename = name


def _bytes(path: Path, lists: Path | None) -> int:
    return path.stat().st_size + (lists.stat().st_size if lists else 0)

"""Indexes built in shares: by many processes, or by one whose memory holds a share of them.

An index of an inverted-file kind is trained once; every share adds some consecutive parts of the
table to a copy of it, and the shares' inverted lists are merged into one file on disk
(Johnson et al. 2017, arXiv 1702.08734, section 5 calls them shards). The lists of the whole are
those that one process would have made: a share's rows follow those of the share before.

    OUT.partial/plan.json      what is built, and which parts each share has
    OUT.partial/trained.faiss  trained and empty
    OUT.partial/share-0.faiss  the first share: there when it is whole
    OUT.partial/share-0.json   how many seconds it took

After a kill the same call goes on with the shares that are there. Processes on several machines
need the folder on a file system that all of them see.
"""

import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from align.folders import whole_folder
from eval.cards import read_card, write_card
from eval.index.blocks import blocks
from eval.index.build import (
    Progress,
    card_of,
    finished,
    refuse_strangers,
    trained,
    training_vectors,
)
from eval.index.card import IndexCard
from eval.index.folder import faiss_call, read_faiss, take_rows, with_checksums, write_faiss
from eval.index.lists import SHARE_ROWS, add_numbered, size_of, write_lists
from eval.index.recall import Queries, draw_queries
from eval.table import EmbeddingTable

_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """What is built in shares.

    Attributes:
        table: Fingerprint of the table.
        modality: Which embeddings are indexed.
        factory: FAISS factory string.
        train_rows: Rows that train, at most.
        seed: Draws them.
        train_seconds: What training took.
        shares: First part and the one behind the last of each share.
    """

    table: str
    modality: str
    factory: str
    train_rows: int
    seed: int
    train_seconds: float
    shares: tuple[tuple[int, int], ...]


def work_folder(out: Path) -> Path:
    """Where the shares of an index lie until they are merged."""
    return out.with_name(out.name + ".partial")


def is_mergeable(factory: str, dim: int) -> bool:
    """Whether an index of this kind can be built in shares.

    Raises:
        ValueError: FAISS does not know the kind.
    """
    what = f"index factory {factory!r}"
    index = faiss_call(what, lambda: faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT))
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    others = (faiss.IndexIVFFastScan, faiss.IndexIVFPQR)  # lists in blocks; codes beside the lists
    return isinstance(inner, faiss.IndexIVF) and not isinstance(inner, others)


def refuse_unmergeable(factory: str, dim: int) -> None:
    """Refuse kinds that cannot be built in shares.

    Raises:
        ValueError: This one cannot; the line names those that can.
    """
    if not is_mergeable(factory, dim):
        raise ValueError(
            f"index factory {factory!r} cannot be built in shares with its lists on disk; these "
            "can: IVF4096,Flat  IVF4096,SQ8  OPQ64,IVF4096,PQ64  IVF4096,RaBitQ (not FastScan, not "
            "Refine, not those without IVF)"
        )


def factory_for(rows: int) -> str:
    """The kind that `auto` stands for where lists lie on disk: inverted lists of 8-bit codes.

    About `4 sqrt(rows)` lists, at most one for 39 rows, which is what k-means wants.
    """
    lists = 2 ** round(math.log2(4 * math.sqrt(rows)))
    return f"IVF{max(1, min(lists, rows // 39))},SQ8"


def prepared(
    table: EmbeddingTable,
    out: Path | str,
    *,
    factory: str = "auto",
    modality: str = "image",
    train_rows: int = 262_144,
    seed: int = 0,
    share_rows: int = SHARE_ROWS,
    processes: int = 1,
    progress: Progress | None = None,
) -> Plan:
    """Train the index and say what each share is; shares that are there by the same plan are kept.

    Args:
        table: Where the vectors come from.
        out: The index folder that will be.
        factory: FAISS factory string of an inverted-file kind, or `auto`.
        modality: Which embeddings to index.
        train_rows: At most so many rows, drawn at random, train the index.
        seed: Draws them.
        share_rows: Rows of a share at most.
        processes: As many shares are made at least, where the table has as many parts.
        progress: Told of long work.

    Raises:
        ValueError: The kind cannot be built in shares, FAISS refuses to train it, or the folder
            for the shares holds something else.
    """
    out = Path(out)
    refuse_strangers(out)
    if factory == "auto":
        factory = factory_for(table.rows)
    refuse_unmergeable(factory, table.card.dim)
    table.vector_paths(modality)  # refuses a modality that the table lacks
    limit = max(1, min(share_rows, -(-table.rows // processes)))
    wanted = Plan(
        table=table.fingerprint,
        modality=modality,
        factory=factory,
        train_rows=train_rows,
        seed=seed,
        train_seconds=0.0,
        shares=tuple(_shares([part.rows for part in table.card.parts], limit)),
    )
    work = work_folder(out)
    found = _plan(work)
    if found and replace(found, train_seconds=0.0, shares=()) == replace(wanted, shares=()):
        return found
    _clear(work)
    work.mkdir(parents=True)
    started = time.perf_counter()
    generator = np.random.default_rng(seed)
    training = training_vectors(table, modality, count=train_rows, generator=generator)
    index = trained(table.card.dim, factory, training, progress=progress)
    _write_beside(index, work / "trained.faiss")
    plan = replace(wanted, train_seconds=time.perf_counter() - started)
    write_card(work / "plan.json", _VERSION, asdict(plan))
    return plan


def build_share(
    table: EmbeddingTable,
    out: Path | str,
    plan: Plan,
    number: int,
    *,
    progress: Progress | None = None,
) -> None:
    """Build one share, unless it is there; the file appears whole or not at all.

    Raises:
        ValueError: This table is not the plan's.
    """
    if table.fingerprint != plan.table:
        raise ValueError(f"{table.folder}: not the table that the index is built from")
    work = work_folder(Path(out))
    path = work / f"share-{number}.faiss"
    if path.exists():
        return
    started = time.perf_counter()
    index = read_faiss(work / "trained.faiss")
    first, last = plan.shares[number]
    rows = np.cumsum([0, *(part.rows for part in table.card.parts)])
    place = int(rows[first])
    for block in blocks(table, plan.modality, range(first, last)):
        place = add_numbered(index, block, place)
        _tell(progress, "add", place - int(rows[first]), int(rows[last] - rows[first]))
    (work / f"share-{number}.json").write_text(json.dumps(time.perf_counter() - started))
    _write_beside(index, path)


def merged(
    table: EmbeddingTable,
    out: Path | str,
    plan: Plan,
    *,
    knobs: str = "",
    queries: str | None = None,
    target_recall: float = 0.95,
    query_count: int = 1000,
    progress: Progress | None = None,
) -> IndexCard:
    """Merge all shares into an index whose lists lie on disk, tune and measure it.

    The folder appears whole or not at all; then the shares are removed.

    Args:
        table: The plan's.
        out: The index folder; an index that is there is replaced.
        plan: What was built.
        knobs: As for :func:`eval.index.build.build_index`, like the remaining arguments.
        queries: The kind of queries to tune for.
        target_recall: Recall@10 to tune for.
        query_count: Queries of each kind that tune and measure.
        progress: Told of long work.
    """
    out = Path(out)
    work = work_folder(out)
    started = time.perf_counter()
    names = [work / f"share-{number}.faiss" for number in range(len(plan.shares))]
    with whole_folder(out) as folder:
        pieces = [read_faiss(name, memory_map=True) for name in names]
        _tell(progress, "merge", 0, 1)
        empty = read_faiss(work / "trained.faiss")
        digest = write_lists(empty, pieces, folder, "index.faiss", "lists-0.ivfdata")
        del empty, pieces
        _tell(progress, "merge", 1, 1)
        index = read_faiss(folder / "index.faiss", lists="lists-0.ivfdata")
        seconds = plan.train_seconds + time.perf_counter() - started
        seconds += sum(json.loads(name.with_suffix(".json").read_text()) for name in names)
        facts = finished(
            index,
            table,
            plan.modality,
            knobs=knobs,
            queries=queries,
            target_recall=target_recall,
            drawn=_drawn(table, plan, query_count),
            progress=progress,
        )
        source = take_rows(table, plan.modality, folder, number=0, first_id=0, first_part=0)
        size = size_of(folder, "index.faiss", "lists-0.ivfdata")
        card = card_of(
            table, source, facts, folder, index, factory=plan.factory, size=size, seconds=seconds
        )
        card = replace(card, lists_file="lists-0.ivfdata", files={"index.faiss": digest})
        card = with_checksums(card, folder)
        card.save(folder)
    _clear(work)
    return card


def _drawn(table: EmbeddingTable, plan: Plan, count: int) -> dict[str, Queries]:
    """The queries that one process would draw, after the rows that train."""
    generator = np.random.default_rng(plan.seed)
    generator.choice(table.rows, size=min(table.rows, plan.train_rows), replace=False)
    return draw_queries(table, plan.modality, count=count, generator=generator)


def build_in_shares(
    table: EmbeddingTable,
    out: Path | str,
    *,
    factory: str = "auto",
    modality: str = "image",
    train_rows: int = 262_144,
    seed: int = 0,
    share_rows: int = SHARE_ROWS,
    progress: Progress | None = None,
    **tuning: Any,
) -> IndexCard:
    """Build an index with its lists on disk by one process, with one share in memory at a time.

    Args:
        table: As for :func:`prepared`, like the arguments up to `share_rows`.
        out: The index folder.
        factory: FAISS factory string, or `auto`.
        modality: Which embeddings to index.
        train_rows: Rows that train, at most.
        seed: Draws them.
        share_rows: Rows of a share at most.
        progress: Told of long work.
        **tuning: As for :func:`merged`.

    Raises:
        ValueError: As :func:`prepared`.
    """
    plan = prepared(
        table, out, factory=factory, modality=modality, train_rows=train_rows, seed=seed,
        share_rows=share_rows, progress=progress,
    )  # fmt: skip
    for number in range(len(plan.shares)):
        build_share(table, out, plan, number)
        _tell(progress, "share", number + 1, len(plan.shares))
    return merged(table, out, plan, progress=progress, **tuning)


def _shares(rows: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of parts of at most `limit` rows together, or of one part."""
    start, count = 0, 0
    for number, here in enumerate(rows):
        if number > start and count + here > limit:
            yield start, number
            start, count = number, 0
        count += here
    yield start, len(rows)


def _plan(work: Path) -> Plan | None:
    """The plan of shares that are there, where there are any."""
    try:
        return read_card(
            work / "plan.json",
            version=_VERSION,
            kind="a plan",
            again="build again",
            read=_read_plan,
        )
    except (FileNotFoundError, ValueError):
        return None


_OURS = re.compile(r"(plan\.json|trained\.faiss|share-\d+\.(faiss|json))(\.writing)?")
"""Names of files that we write in a folder of shares."""


def _clear(work: Path) -> None:
    """Remove a folder of shares.

    Raises:
        ValueError: Something in it is not ours; nothing is removed.
    """
    others = [path for path in work.glob("*") if not _OURS.fullmatch(path.name)]
    if others or (work.exists() and not work.is_dir()):
        found = others[0] if others else work
        raise ValueError(
            f"{found}: not of an index built in shares, for which {work.name} is needed; move it "
            "away, or choose another folder for the index"
        )
    if work.exists():
        shutil.rmtree(work)


def _read_plan(value: dict[str, Any]) -> Plan:
    return Plan(**{**value, "shares": tuple((first, last) for first, last in value["shares"])})


def _write_beside(index: faiss.Index, path: Path) -> None:
    beside = path.with_name(path.name + ".writing")
    write_faiss(index, beside)
    beside.replace(path)


def _tell(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress:
        progress(what, done, total)

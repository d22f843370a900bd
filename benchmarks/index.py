"""`align index` against autofaiss on the same vectors, and a million vectors in 200 MB.

    python -m benchmarks.index --peer ENVIRONMENT/bin/python
    python -m benchmarks.index --million

The peer's environment: `pip install autofaiss==2.18.0 "numpy<2" "pyarrow<16" faiss-cpu==1.8.0`.
Both sides get the same vectors, memory and threads; they answer the same text queries, in turns,
each in processes of its own FAISS. Texts that tune an index are not those that measure it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from benchmarks.index_data import clip_like_table
from eval.index.build import MEASURING, TUNING, build_index
from eval.index.card import IndexCard
from eval.index.describe import describe
from eval.index.folder import open_index
from eval.index.recall import Queries, draw_queries
from eval.index.tune import tune
from eval.table import EmbeddingTable

_PEER = Path(__file__).with_name("index_peer.py")
_TURNS = 3


def main() -> None:
    """Run what was asked for and print its figures as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="Python of an environment with autofaiss")
    parser.add_argument("--million", action="store_true", help="the second benchmark")
    parser.add_argument("--rows", type=int, help="instead of 200,000 or a million")
    parser.add_argument("--dim", type=int, help="instead of 512 or 256")
    parser.add_argument("--memory", default="1GB", help="of an index, for both sides")
    parser.add_argument("--query-ms", type=int, default=10, help="autofaiss's limit of a query")
    parser.add_argument(
        "--target", type=float, help="recall@10 asked of ours; the peer's, if not given"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="kept, and used again if it is there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        if given.million:
            figures = million(folder, given.rows or 1_000_000, given.dim or 256, given.threads)
        elif given.peer:
            figures = against(given, folder)
        else:
            parser.error("name what to run: --peer PYTHON or --million")
    print(json.dumps(figures))


def against(given: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The peer's recall, speed and building time, and ours."""
    rows, dim = given.rows or 200_000, given.dim or 512
    table = clip_like_table(folder / f"table-{rows}-{dim}", rows=rows, dim=dim)
    texts = draw_queries(table, "image", count=2000, generator=np.random.default_rng(1))["text"]
    tuning, asked = texts.some(TUNING), texts.some(MEASURING)
    np.save(folder / "asked.npy", asked.vectors)
    peer = _peer_built(given, folder, table)
    print("autofaiss:", peer, flush=True)
    theirs = [given.peer, str(_PEER), "search", str(folder / "peer.index"), str(peer["knobs"])]
    their_recall = _recall(_asked(theirs, folder, given.threads)[1], asked)
    started = time.perf_counter()
    card = _ours_built(given, folder, table, given.target or their_recall)
    built = time.perf_counter() - started
    print("ours:", *describe(card), sep="\n  ", flush=True)
    opened = open_index(folder / "ours", check="sizes")
    points = []
    targets = [their_recall, *(t for t in (0.9, 0.95, 0.99) if t > their_recall)]
    for target in targets:
        knobs = tune(opened.index, table, "image", tuning, target).knobs
        ours = [sys.executable, str(_PEER), "search", str(folder / "ours/index.faiss"), knobs]
        ratios, speeds, recall = [], [], 0.0
        for _ in range(_TURNS):
            our_speed, found = _asked(ours, folder, given.threads)
            recall = _recall(found, asked)
            their_speed, _ = _asked(theirs, folder, given.threads)
            ratios.append(our_speed / their_speed)
            speeds.append((our_speed, their_speed))
        ours_at, theirs_at = (statistics.median(column) for column in zip(*speeds, strict=True))
        point = {"knobs": knobs, "recall": round(recall, 4), "queries_per_second": round(ours_at),
                 "peer_recall": round(their_recall, 4), "peer_queries_per_second": round(theirs_at),
                 "speed_ratio": round(statistics.median(ratios), 2)}  # fmt: skip
        print(point, flush=True)
        points.append(point)
    equal = [p["speed_ratio"] for p in points if p["recall"] >= their_recall]
    faster = [p["recall"] - their_recall for p in points if p["speed_ratio"] >= 1]
    return {
        "rows": rows, "dim": dim, "memory": given.memory, "threads": given.threads,
        "factory": card.factory, "peer_factory": peer["index_key"],
        "peer_recall_it_reports": peer.get("10-recall@10"),
        "peer_recall_of_texts": round(their_recall, 4),
        "speed_ratio": max(equal, default=None),
        "recall_gain": round(max(faster, default=0.0), 4),
        "seconds": round(built, 1), "peer_seconds": round(float(peer["seconds"]), 1),
        "build_ratio": round(built / float(peer["seconds"]), 3),
        "bytes": round(card.bytes_per_vector * rows), "peer_bytes": peer["bytes"],
    }  # fmt: skip


def million(folder: Path, rows: int, dim: int, threads: int) -> dict[str, object]:
    """Size, recall and memory of an index of a million vectors in 200 MB."""
    faiss.omp_set_num_threads(threads)
    table = clip_like_table(folder / f"table-{rows}-{dim}", rows=rows, dim=dim)
    limit = rows * 200
    code = (
        "import resource, sys; from eval.index.build import build_index;"
        "from eval.table import EmbeddingTable;"
        "import pyarrow, faiss, duckdb;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        f"faiss.omp_set_num_threads({threads});"
        "build_index(EmbeddingTable(sys.argv[1], check='sizes'), sys.argv[2],"
        f" target_recall=0.9, max_bytes={limit});"
        "print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    out = folder / "million"
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, str(table.folder), str(out)],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    before, peak = (1024 * int(number) for number in done.stdout.split()[-2:])
    card = open_index(out, check="sizes").card
    print(*describe(card), sep="\n", flush=True)
    size = (out / "index.faiss").stat().st_size
    return {
        "rows": rows, "dim": dim, "limit": limit, "bytes": size, "factory": card.factory,
        "recall": {one.queries: round(one.at_10.value, 4) for one in card.reached},
        "seconds": round(seconds, 1), "build_seconds": round(card.build_seconds, 1),
        "peak_bytes": peak, "memory_beyond_the_index": peak - size, "at_start": before,
    }  # fmt: skip


def _ours_built(
    given: argparse.Namespace, folder: Path, table: EmbeddingTable, target: float
) -> IndexCard:
    faiss.omp_set_num_threads(given.threads)
    return build_index(
        table,
        folder / "ours",
        queries="text",
        target_recall=target,
        max_bytes=_bytes(given.memory),
    )


def _peer_built(given: argparse.Namespace, folder: Path, table: EmbeddingTable) -> dict[str, Any]:
    told = folder / "peer-told.json"
    if not told.exists():
        command = [given.peer, str(_PEER), "build", str(table.folder / "img_emb"), str(folder),
                   given.memory, str(given.threads), str(given.query_ms)]  # fmt: skip
        told.write_text(json.dumps(_json(command, given.threads)))
    peer = json.loads(told.read_text())
    return {**peer, "knobs": peer.get("index_param", "")}


def _asked(command: list[str], folder: Path, threads: int) -> tuple[float, np.ndarray]:
    """Queries a second of one side, and the rows it found."""
    out = folder / "found.npy"
    answer = _json([*command, str(folder / "asked.npy"), str(threads), str(out)], threads)
    return float(answer["queries_per_second"]), np.load(out)


def _json(command: list[str], threads: int) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.strip().splitlines()[-1])


def _recall(found: np.ndarray, asked: Queries) -> float:
    return float((found[:, :, None] == asked.rows[:, None, :10]).any(axis=1).mean())


def _bytes(memory: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    return int(float(memory[:-2]) * units[memory[-2:]])


if __name__ == "__main__":
    main()

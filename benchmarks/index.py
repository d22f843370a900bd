"""`align index` against autofaiss on the same vectors, and a million vectors in 200 MB.

    python -m benchmarks.index --peer ENVIRONMENT/bin/python
    python -m benchmarks.index --million

The peer's environment: `pip install autofaiss==2.18.0 "numpy<2" "pyarrow<16" faiss-cpu==1.8.0`.
Both sides get the same vectors, memory and threads; they answer the same text queries, in turns,
each in processes of its own FAISS. Texts that tune an index are not those that measure it. The
peer's index is asked as it tuned itself, and at the quickest of its settings that find as much.
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
_GRIDS = {
    "efSearch": (16, 32, 64, 128, 256, 512, 1024, 2048),
    "nprobe": (1, 2, 4, 8, 16, 32, 64, 128, 256),
}
"""Settings of the peer's index that are tried beside its own."""


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
    theirs = [given.peer, str(_PEER), "search", str(folder / "peer.index")]
    swept = {knobs: _asked([*theirs, knobs], folder, given.threads) for knobs in _sweep(peer)}
    peer_recalls = {knobs: _recall(found, asked) for knobs, (_, found) in swept.items()}
    their_recall = peer_recalls[peer["knobs"]]
    started = time.perf_counter()
    card = _ours_built(given, folder, table, given.target or their_recall)
    built = time.perf_counter() - started
    print("ours:", *describe(card), sep="\n  ", flush=True)
    opened = open_index(folder / "ours", check="sizes")
    points = []
    for target in sorted({their_recall, 0.9, 0.95, 0.98, 0.99}):
        knobs = tune(opened.index, table, "image", tuning, target).knobs
        ours = [sys.executable, str(_PEER), "search", str(folder / "ours/index.faiss"), knobs]
        recall = _recall(_asked(ours, folder, given.threads)[1], asked)
        able = [one for one in peer_recalls if peer_recalls[one] >= recall]
        fastest = max(able or [peer["knobs"]], key=lambda one: swept[one][0])
        pace, as_set, best = [], [], []
        for _ in range(_TURNS):
            pace.append(_asked(ours, folder, given.threads)[0])
            as_set.append(_asked([*theirs, peer["knobs"]], folder, given.threads)[0])
            best.append(_asked([*theirs, fastest], folder, given.threads)[0])
        point = {"knobs": knobs, "recall": round(recall, 4),
                 "queries_per_second": round(statistics.median(pace)),
                 "peer_as_set": {"knobs": peer["knobs"], "recall": round(their_recall, 4),
                                 "queries_per_second": round(statistics.median(as_set)),
                                 "ratio": _ratio(pace, as_set)},
                 "peer_swept": {"knobs": fastest, "recall": round(peer_recalls[fastest], 4),
                                "queries_per_second": round(statistics.median(best)),
                                "ratio": _ratio(pace, best) if able else None}}  # fmt: skip
        print(point, flush=True)
        points.append(point)
    equal = [p["peer_as_set"]["ratio"] for p in points if p["recall"] >= their_recall - 0.0005]
    faster = [p["recall"] - their_recall for p in points if p["peer_as_set"]["ratio"] >= 1]
    seconds = None if peer["kept"] else float(peer["seconds"])
    return {
        "rows": rows, "dim": dim, "memory": given.memory, "threads": given.threads,
        "query_ms": given.query_ms, "factory": card.factory, "peer_factory": peer["index_key"],
        "peer_recall_of_texts": round(their_recall, 4),
        "speed_ratio": max(equal, default=None),
        "recall_gain": round(max(faster, default=0.0), 4),
        "swept_ratios": {str(p["recall"]): p["peer_swept"]["ratio"] for p in points},
        "seconds": round(built, 1), "peer_seconds": seconds and round(seconds, 1),
        "build_ratio": seconds and round(built / seconds, 3),
        "bytes": round(card.bytes_per_vector * rows), "peer_bytes": peer["bytes"],
    }  # fmt: skip


def _sweep(peer: dict[str, Any]) -> list[str]:
    """The peer's setting as it was tuned, and others of its first knob."""
    name, _, rest = peer["knobs"].partition("=")
    others = ",".join(peer["knobs"].split(",")[1:])
    if name not in _GRIDS:
        return [peer["knobs"]]
    values = sorted({*_GRIDS[name], int(rest.partition(",")[0])})
    return [peer["knobs"], *(f"{name}={value}" + f",{others}" * bool(others) for value in values)]


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """Median of the ratios of turns."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2)


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
    kept = told.exists()
    if not told.exists():
        command = [given.peer, str(_PEER), "build", str(table.folder / "img_emb"), str(folder),
                   given.memory, str(given.threads), str(given.query_ms)]  # fmt: skip
        told.write_text(json.dumps(_json(command, given.threads)))
    peer = json.loads(told.read_text())
    return {**peer, "knobs": peer.get("index_param", ""), "kept": kept}


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

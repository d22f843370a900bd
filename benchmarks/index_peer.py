"""The peer's side, run by the peer's own Python: autofaiss builds, its FAISS answers.

    python benchmarks/index_peer.py build VECTORS_FOLDER OUT_FOLDER MEMORY THREADS MILLISECONDS
    python benchmarks/index_peer.py search INDEX_FILE KNOBS QUERIES.npy THREADS ROWS_OUT.npy

Prints one line of JSON. Imports nothing of this project.
"""

import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np


def build(vectors: str, out: str, memory: str, threads: str, milliseconds: str) -> dict:
    """Build as its README tells; the seconds of the whole call."""
    from autofaiss import build_index  # pyright: ignore[reportMissingImports]

    started = time.perf_counter()
    build_index(
        embeddings=vectors,
        index_path=str(Path(out) / "peer.index"),
        index_infos_path=str(Path(out) / "peer.json"),
        max_index_memory_usage=memory,
        current_memory_available="16GB",
        max_index_query_time_ms=float(milliseconds),
        metric_type="ip",
        nb_cores=int(threads),
        verbose=40,
    )
    seconds = time.perf_counter() - started
    told = json.loads((Path(out) / "peer.json").read_text())
    keep = ("index_key", "index_param", "10-recall@10")
    return {
        "seconds": seconds,
        "bytes": (Path(out) / "peer.index").stat().st_size,
        **{name: told[name] for name in keep if name in told},
    }


def search(index: str, knobs: str, queries: str, threads: str, rows: str) -> dict:
    """Answer the queries, ten rows each, again and again for a second; the best batch counts."""
    import faiss

    faiss.omp_set_num_threads(int(threads))
    loaded = faiss.read_index(index)
    if knobs:
        faiss.ParameterSpace().set_index_parameters(loaded, knobs)
    asked = np.load(queries)
    found = loaded.search(asked, 10)[1]
    np.save(rows, found)
    best, until = float("inf"), time.perf_counter() + 1.5
    while time.perf_counter() < until:
        started = time.perf_counter()
        loaded.search(asked, 10)
        best = min(best, time.perf_counter() - started)
    return {"queries_per_second": len(asked) / best}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    what = {"build": build, "search": search}[sys.argv[1]]
    print(json.dumps(what(*sys.argv[2:])))

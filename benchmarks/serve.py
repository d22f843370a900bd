"""What the server costs beside the model and the index: `python -m benchmarks.serve`.

The index is like the demo's: 3,496 pictures of one artist, embedded by a small model that is ready
(untrained: its weights do not change its speed). `align serve` runs in a process of its own and is
asked over loopback: texts one after the other on one connection, then pictures, then texts on 200
connections at once, all sent before the first is answered. The last line is JSON.

| figure | what it is |
|---|---|
| `overhead_ms_median` | wall time of a request as the client sees it, minus the encoder's call and minus FAISS's search of that index, which is timed in this process: HTTP, checks, threads, metadata, JSON; `overhead_ms_p99` likewise |
| `total_ms_median`, `p99_ms` | wall time of a request for a text, one at a time |
| `upload_ms_median` | wall time of a picture of 500 x 375 pixels in a form, one at a time |
| `parallel_ms_median`, `parallel_p99_ms` | the same for a text, with 199 others at once |
| `parallel_per_second` | answers a second, then |
| `errors` | answers of any of these that are no 200 |
"""  # noqa: E501

import argparse
import asyncio
import http.client
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import faiss
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from align.bundle import save
from align.model import DualEncoder, DualEncoderConfig, Tower
from align.tokenizer import Tokenizer
from benchmarks import loader_data
from eval.index.folder import open_index
from eval.search.searcher import Searcher
from pipelines.cli import VERBS, parse
from shards import demo
from shards.packing import pack
from shards.sources import Record

K = 24
_BOUNDARY = "benchmark"
_HEAD = b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def world(cache: Path) -> Path:
    """A folder with shards, a bundle, a table and an index; made once."""
    with loader_data.made(cache / "serve") as folder:
        if folder is not None:
            rows = pq.read_table(
                demo.FOLDER / "noto.parquet", columns=["image", "name", "group"]
            ).to_pylist()
            records = [
                Record(f"{n:05d}", row["image"], row["name"], {"group": row["group"]})
                for n, row in enumerate(rows)
            ]
            pack(records, folder / "data", samples_per_shard=1000)
            save(small_model([row["name"] for row in rows]), folder / "bundle")
    index = cache / "serve-index"
    if not (index / "index.json").exists():
        place = cache / "serve"
        run("embed", f"{place}/bundle", f"{place}/data", f"{cache}/serve-table")
        run("index", f"{cache}/serve-table", str(index))
    return index


def run(verb: str, *arguments: str) -> None:
    from pkgutil import resolve_name

    resolve_name(VERBS[verb].run)(parse(verb, arguments))


def small_model(texts: Sequence[str]) -> DualEncoder:
    """A dual encoder as the demo's is: pictures of 64 pixels, 256 numbers a vector."""
    torch.manual_seed(0)
    image = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 4}
    text = {
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 768,
        "max_position_embeddings": 32,
    }
    config = DualEncoderConfig(
        image=Tower("timm:vit_tiny_patch16_224", image),
        text=Tower("hf:bert", text),
        dim=256,
        image_size=64,
        context_length=32,
    )
    tokenizer = Tokenizer.train(texts, vocabulary_size=2000, context_length=32)
    return DualEncoder(config, tokenizer).eval()


@contextmanager
def server(index: Path) -> Iterator[str]:
    """The address of `align serve` on this index."""
    command = [sys.executable, "-m", "pipelines.cli", "serve", str(index), "port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            yield line.split()[-1]
        finally:
            process.terminate()


@dataclass
class Asked:
    """Wall times of requests, in milliseconds, with what the server says of each."""

    wall: list[float] = field(default_factory=list)
    encode: list[float] = field(default_factory=list)
    search: list[float] = field(default_factory=list)
    errors: int = 0

    def add(self, seconds: float, status: int, body: bytes) -> None:
        """Note an answer."""
        if status != 200:
            self.errors += 1
            return
        told = json.loads(body)["milliseconds"]
        self.wall.append(1000 * seconds)
        self.encode.append(told["encode"])
        self.search.append(told["search"])


def body_of(text: str) -> bytes:
    return json.dumps({"terms": [{"text": text}], "k": K}).encode()


def form_of(picture: bytes) -> bytes:
    query = json.dumps({"terms": [{"upload": 0}], "k": K})
    parts = (('name="query"', query.encode()), ('name="images"; filename="a.jpg"', picture))
    sent = b"".join(
        f"--{_BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + data + b"\r\n"
        for head, data in parts
    )
    return sent + f"--{_BOUNDARY}--\r\n".encode()


def one_by_one(url: str, bodies: Sequence[bytes], kind: str) -> Asked:
    """Ask on one connection, each when the one before is answered."""
    asked = Asked()
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    for body in bodies:
        started = time.perf_counter()
        connection.request("POST", "/api/search", body, {"Content-Type": kind})
        answer = connection.getresponse()
        data = answer.read()
        asked.add(time.perf_counter() - started, answer.status, data)
    connection.close()
    return asked


async def at_once(url: str, bodies: Sequence[bytes]) -> tuple[Asked, float]:
    """Ask all on connections of their own; also the seconds until the last was answered."""
    place = urlsplit(url)
    asked = Asked()
    doors = [
        await asyncio.open_connection(place.hostname, place.port, limit=1 << 20) for _ in bodies
    ]
    began = time.perf_counter()

    async def one(number: int) -> None:
        reader, writer = doors[number]
        started = time.perf_counter()
        length = f"Content-Length: {len(bodies[number])}\r\n\r\n".encode()
        writer.write(_HEAD + length + bodies[number])
        try:
            head_lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            size = int(head_lines.partition("content-length:")[2].split("\r\n")[0])
            data = await reader.readexactly(size)
            asked.add(time.perf_counter() - started, int(head_lines.split()[1]), data)
        except (asyncio.IncompleteReadError, ConnectionError):
            asked.errors += 1

    await asyncio.gather(*(one(number) for number in range(len(bodies))))
    taken = time.perf_counter() - began
    for _, writer in doors:
        writer.close()
    return asked, taken


def faiss_ms(index: Path) -> float:
    """Median time of one search of this index by FAISS alone, on one thread."""
    opened = open_index(index, check="sizes")
    faiss.omp_set_num_threads(1)
    vectors = opened.rows.vectors(np.arange(200))
    taken = []
    for row in range(len(vectors)):
        started = time.perf_counter()
        opened.index.search(vectors[row : row + 1], K)
        taken.append(1000 * (time.perf_counter() - started))
    return statistics.median(taken)


def photo() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(sink, "JPEG")
    return sink.getvalue()


def measure(index: Path, *, requests: int, parallel: int, rounds: int) -> dict[str, float]:
    """All figures."""
    names = [row["caption"] for row in Searcher(index, check="sizes").metadata(np.arange(requests))]
    bodies = [body_of(name) for name in names]
    alone = faiss_ms(index)
    with server(index) as url:
        one_by_one(url, bodies[:50], "application/json")
        texts = one_by_one(url, bodies, "application/json")
        form = f"multipart/form-data; boundary={_BOUNDARY}"
        uploads = one_by_one(url, [form_of(photo())] * max(20, requests // 5), form)
        some = (bodies * (1 + parallel // len(bodies)))[:parallel]
        together = [asyncio.run(at_once(url, some)) for _ in range(rounds)]
    over = [wall - encode - alone for wall, encode in zip(texts.wall, texts.encode, strict=True)]
    wall = [ms for asked, _ in together for ms in asked.wall]
    return {
        "overhead_ms_median": statistics.median(over),
        "overhead_ms_p99": float(np.percentile(over, 99)),
        "encode_ms_median": statistics.median(texts.encode),
        "faiss_ms_median": alone,
        "search_ms_median": statistics.median(texts.search),
        "total_ms_median": statistics.median(texts.wall),
        "p99_ms": float(np.percentile(texts.wall, 99)),
        "upload_ms_median": statistics.median(uploads.wall),
        "parallel_ms_median": statistics.median(wall),
        "parallel_p99_ms": float(np.percentile(wall, 99)),
        "parallel_per_second": statistics.median(parallel / taken for _, taken in together),
        "errors": texts.errors + uploads.errors + sum(asked.errors for asked, _ in together),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cache = Path(tempfile.gettempdir()) / "align-benchmarks"
    parser.add_argument("--requests", type=int, default=500, help="texts, one at a time")
    parser.add_argument("--parallel", type=int, default=200, help="requests at once")
    parser.add_argument("--rounds", type=int, default=5, help="of requests at once")
    parser.add_argument("--index", type=Path, metavar="FOLDER", help="another index")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", default=cache, help=str(cache))
    chosen = parser.parse_args()
    index = chosen.index or world(chosen.cache)
    figures = measure(
        index, requests=chosen.requests, parallel=chosen.parallel, rounds=chosen.rounds
    )
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for the encoder")
    for name, value in figures.items():
        print(f"{name:<24} {value:9.3f}")
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()

"""What `benchmarks.embed` makes of two sides' files and rates."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from benchmarks import embed
from eval.embed import EmbeddedRows, write_table

ROWS = 6
# Keys begin anew in the second shard.
KEYS = ["0", "1", "2", "0", "1", "2"]
CAPTIONS = [f"caption {number}" for number in range(ROWS)]


def vectors(seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((ROWS, 8)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def sides(tmp_path) -> tuple[Path, Path]:
    """Our table, and the peer's files of the same rows in another order."""
    embeddings = {"image": vectors(0), "text": vectors(1)}
    rows = EmbeddedRows(np.arange(ROWS), KEYS, CAPTIONS, ["a"] * ROWS, embeddings)
    write_table(
        tmp_path / "ours",
        lambda _start: [rows],
        modalities=["image", "text"],
        dim=8,
        fingerprints={},
    )
    order = np.array([3, 5, 0, 1, 4, 2])
    theirs = tmp_path / "theirs"
    for folder, kind in {"img_emb": "image", "text_emb": "text"}.items():
        (theirs / folder).mkdir(parents=True)
        for part in range(2):
            chosen = embeddings[kind][order[3 * part : 3 * part + 3]].astype(np.float16)
            np.save(theirs / folder / f"{folder}_{part}.npy", chosen)
    (theirs / "metadata").mkdir()
    for part in range(2):
        some = order[3 * part : 3 * part + 3]
        said = {"image_path": [KEYS[n] for n in some], "caption": [CAPTIONS[n] for n in some]}
        parquet.write_table(pa.table(said), theirs / "metadata" / f"metadata_{part}.parquet")
    return tmp_path / "ours", theirs


def test_rows_are_compared_by_sample_whatever_their_order(sides):
    ours, theirs = sides
    found = embed.agreement(ours, theirs)
    assert found == {"image_cosine": pytest.approx(1), "text_cosine": pytest.approx(1)}
    other = np.load(theirs / "text_emb/text_emb_1.npy")
    np.save(theirs / "text_emb/text_emb_1.npy", -other)
    assert embed.agreement(ours, theirs)["text_cosine"] == pytest.approx(-1, abs=1e-3)


def test_the_sides_take_turns_and_the_ratio_is_that_of_a_round(tmp_path, monkeypatch):
    asked: list[str] = []
    rates = {"ours": iter([30.0, 10.0, 50.0]), "peer": iter([10.0, 10.0, 20.0])}

    def side(name: str) -> Any:
        return lambda *_: (asked.append(name), next(rates[name]))[1]

    monkeypatch.setattr(embed, "ours", side("ours"))
    monkeypatch.setattr(embed, "peer", side("peer"))
    monkeypatch.setattr(embed, "agreement", lambda *_: {"image_cosine": 0.999})
    task = embed.Task("m", tmp_path, tmp_path, 4, 2, "fp32", 1, 0)
    found = embed.compare(task, Path("python"), rounds=3, out=tmp_path)
    assert asked == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert found == {
        "ours_samples_per_s": 30.0,
        "peer_samples_per_s": 10.0,
        "embed_ratio": 2.5,
        "image_cosine": 0.999,
    }
    rates["ours"] = iter([7.0])
    assert embed.compare(task, None, rounds=1, out=tmp_path) == {"ours_samples_per_s": 7.0}

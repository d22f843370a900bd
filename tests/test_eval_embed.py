import dataclasses
import json
import os

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from eval.embed import EmbeddedRows, TableWriter, write_table
from eval.table import EmbeddingTable

ROWS, DIM = 23, 6
PRINTS = {"model": "m1", "data": "d1"}


def rows(start, stop, *, skip=()):
    """Samples `start` to `stop`, each a function of its id alone."""
    ids = np.array([some for some in range(start, stop) if some not in skip], dtype=np.int64)
    vectors = np.stack([np.random.default_rng(some).standard_normal(DIM) for some in ids])
    return EmbeddedRows(
        ids=ids,
        keys=[f"key-{some}" for some in ids],
        captions=[None if some % 5 == 0 else f"caption {some}" for some in ids],
        shards=[f"{some // 10:05}.tar" for some in ids],
        embeddings={
            "image": vectors.astype(np.float32),
            "text": (2 * vectors[:, ::-1]).astype(np.float32),
        },
        fields=[{"group": f"g{some % 3}", "size": {"width": int(some)}, "key": 1} for some in ids],
    )


def batches(size, *, stop=ROWS, skip=()):
    def from_id(start):
        for first in range(start, stop, size):
            ids = [some for some in range(first, min(first + size, stop)) if some not in skip]
            if ids:
                yield rows(first, min(first + size, stop), skip=skip)

    return from_id


def write(out, source, **options):
    settings = {
        "modalities": ("image", "text"),
        "dim": DIM,
        "fingerprints": PRINTS,
        "rows_per_part": 10,
        **options,
    }
    return write_table(out, source, **settings)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_layout_is_the_one_clip_retrieval_reads(tmp_path):
    table = write(tmp_path / "t", batches(4))
    images = [np.load(tmp_path / f"t/img_emb/img_emb_{n:05}.npy") for n in range(3)]
    assert [part.shape for part in images] == [(10, DIM), (10, DIM), (3, DIM)]
    assert images[0].dtype == np.float16
    assert np.load(tmp_path / "t/text_emb/text_emb_00002.npy").shape == (3, DIM)
    metadata = parquet.read_table(tmp_path / "t/metadata/metadata_00001.parquet").to_pylist()
    assert metadata[3] == {
        "id": 13,
        "key": "key-13",
        "caption": "caption 13",
        "shard": "00001.tar",
        "group": "g1",
        "json.key": 1,
        "size.width": 13,
    }
    assert table.rows == ROWS
    assert len(table.metadata_paths) == 3


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_come_back_at_unit_length_and_in_order(tmp_path, dtype):
    table = write(tmp_path / "t", batches(7), dtype=dtype)
    given = rows(0, ROWS).embeddings
    for modality in ("image", "text"):
        expected = given[modality] / np.linalg.norm(given[modality], axis=1, keepdims=True)
        found = table.vectors(modality)
        assert np.abs(found - expected).max() < (1e-3 if dtype == "float16" else 1e-6)
        assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-6)
        stored = np.concatenate([np.load(path) for path in table.vector_paths(modality)])
        assert stored.dtype == dtype
        assert np.linalg.norm(stored.astype(np.float32), axis=1) == pytest.approx(1, abs=1e-3)
        some = np.array([22, 0, 10, 9, 10])
        assert np.array_equal(table.vectors(modality, some), found[some])
    metadata = table.metadata()
    assert metadata["id"].to_pylist() == list(range(ROWS))
    assert metadata["caption"].to_pylist()[4:7] == ["caption 4", None, "caption 6"]


def test_the_bytes_do_not_depend_on_the_batches(tmp_path):
    write(tmp_path / "one", batches(1))
    write(tmp_path / "all", batches(50))
    assert contents(tmp_path / "one") == contents(tmp_path / "all")


@pytest.mark.parametrize("stopped_at", [3, 9, 10, 15, 20, 22])
def test_a_killed_run_goes_on_and_ends_equal(tmp_path, stopped_at):
    skip = (9, 12, 19)  # unreadable samples
    write(tmp_path / "whole", batches(4, stop=26, skip=skip))
    asked = []

    def killed(start):
        yield from batches(4, stop=stopped_at, skip=skip)(start)
        raise KeyboardInterrupt

    def rest(start):
        asked.append(start)
        return batches(3, stop=26, skip=skip)(start)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "t", killed)
    with pytest.raises(ValueError, match="unfinished"):
        EmbeddingTable(tmp_path / "t")
    # A kill between the files of a part, or within one, leaves some of them behind.
    (tmp_path / "t/img_emb").mkdir(exist_ok=True)
    (tmp_path / "t/img_emb/img_emb_00002.npy").write_bytes(b"other")
    (tmp_path / "t/img_emb/img_emb_00002.npy.writing").write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "t").glob("*/*_00000.*")}
    write(tmp_path / "t", rest)
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")
    # A part is whole once a sample behind it was seen.
    assert asked == [10 * (max(some for some in range(stopped_at) if some not in skip) // 10)]
    assert bool(before) == (asked[0] > 0)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_complete_table_is_not_embedded_again(tmp_path):
    write(tmp_path / "t", batches(5))

    def never(start):
        raise AssertionError(start)

    assert write(tmp_path / "t", never).rows == ROWS


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"fingerprints": {"model": "m2", "data": "d1"}}, "fingerprints.model m1, now m2"),
        ({"options": {"precision": "bf16"}}, "options.precision None, now bf16"),
        ({"dtype": "float32"}, "dtype"),
        ({"rows_per_part": 11}, "rows_per_part"),
    ],
)
def test_going_on_with_other_options_is_refused(tmp_path, options, named):
    write(tmp_path / "t", batches(5))
    with pytest.raises(ValueError, match=f"begun with {named}.*; embed into a new folder"):
        write(tmp_path / "t", batches(5), **options)


def test_damage_is_found_on_opening(tmp_path):
    write(tmp_path / "t", batches(5))
    victim = tmp_path / "t/text_emb/text_emb_00001.npy"
    sound = victim.read_bytes()
    victim.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"text_emb_00001.npy: changed since"):
        EmbeddingTable(tmp_path / "t")
    assert EmbeddingTable(tmp_path / "t", check="sizes").rows == ROWS
    np.save(victim, np.load(victim)[:4])
    with pytest.raises(ValueError, match=r"text_emb_00001.npy: 4 rows, table.json says 10"):
        EmbeddingTable(tmp_path / "t", check="sizes")
    victim.unlink()
    with pytest.raises(FileNotFoundError, match=r"text_emb_00001.npy: this part .* is missing"):
        EmbeddingTable(tmp_path / "t")
    with pytest.raises(FileNotFoundError, match=r"not an embedding table"):
        EmbeddingTable(tmp_path)
    card = tmp_path / "t/table.json"
    for broken in (
        "{",
        "[]",
        '{"version": 7}',
        '{"version": 2}',
        json.dumps({"version": 2, "x": 2}),
    ):
        card.write_text(broken)
        with pytest.raises(ValueError, match=r"table.json: not readable") as caught:
            EmbeddingTable(tmp_path / "t")
        assert "\n" not in str(caught.value)


def test_bad_batches_are_refused_and_named(tmp_path):
    writer = TableWriter(
        tmp_path / "t", modalities=["image"], dim=2, fingerprints={}, rows_per_part=10
    )

    def batch(ids, vectors, **options):
        names = [f"k{some}" for some in ids]
        given = {"keys": names, "captions": names, "shards": names, **options}
        vectors = np.array(vectors, dtype=np.float32)
        return EmbeddedRows(np.array(ids, dtype=np.int64), embeddings={"image": vectors}, **given)

    first = batch([3, 4], [[1, 0], [0, 1]])
    texts = dataclasses.replace(batch([5], [[1, 0]]), embeddings={"text": np.ones((1, 2))})
    for said, wrong in {
        r"sample id 4 \(key 'k4'\) comes after 4": batch([4, 5], [[1, 0], [0, 1]]),
        r"sample id 7 \(key 'k7'\) comes after 9": batch([9, 7], [[1, 0], [0, 1]]),
        "sample id 10 is of a later part": batch([9, 10], [[1, 0], [0, 1]]),
        r"image \(samples 5 to 6\) .*NaN or infinity: rows 1": batch([5, 6], [[1, 0], [0, np.nan]]),
        "2 ids but 1 of keys": batch([5, 6], [[1, 0], [0, 1]], keys=["a"]),
        "3 wide, the table 2": batch([5], [[1, 0, 0]]),
        r"modalities \['text'\], but the table has \['image'\]": texts,
    }.items():
        with pytest.raises(ValueError, match=said):
            writer.write(0, [first, wrong])
    with pytest.raises(ValueError, match=r"sample id 3 \(key 'k3'\) comes after 9"):
        writer.write(1, [first])
    with pytest.raises(ValueError, match="100,000 parts at most"):
        writer.write(100_000, [])
    assert list(contents(tmp_path / "t")) == ["table.json"]
    writer.write(0, [first, batch([], np.empty((0, 2))), batch([5, 6], [[1, 0], [0, 1]])])
    assert writer.finish().metadata()["id"].to_pylist() == [3, 4, 5, 6]
    with pytest.raises(ValueError, match="holds no text embeddings, only image"):
        EmbeddingTable(tmp_path / "t").vectors("text")


def test_parts_come_in_any_order_from_several_writers(tmp_path):
    """Part 1 has no sample: it exists all the same, without files."""
    options = {
        "modalities": ("image", "text"),
        "dim": DIM,
        "fingerprints": PRINTS,
        "rows_per_part": 10,
    }
    first, second = (TableWriter(tmp_path / "t", **options) for _ in range(2))
    second.write(1, [], lambda: {"bad": 10})
    second.write(2, [rows(20, 23)])
    assert first.done == {}
    first.write(0, [rows(0, 4), rows(4, 10, skip=(9,))], lambda: {"bad": 1})
    first.finish()
    again = TableWriter(tmp_path / "t", **options)
    assert again.card.complete
    assert [card.rows for card in again.done.values()] == [9, 0, 3]
    assert [card.facts.get("bad") for card in again.done.values()] == [1, 10, None]
    table = EmbeddingTable(tmp_path / "t")
    assert table.metadata()["id"].to_pylist() == [*range(9), 20, 21, 22]
    assert [path.name for path in table.vector_paths("text")] == [
        "text_emb_00000.npy",
        "text_emb_00002.npy",
    ]
    write(tmp_path / "stream", batches(4, skip=[9, *range(10, 20)]))
    assert contents(tmp_path / "t/img_emb") == contents(tmp_path / "stream/img_emb")
    (tmp_path / "t/parts/part_00002.json").rename(tmp_path / "t/parts/part_00007.json")
    with pytest.raises(ValueError, match=r"part_00007.json: is the card of part 2"):
        TableWriter(tmp_path / "t", **options)


def test_bad_options_are_refused(tmp_path):
    good = {"modalities": ["image"], "dim": 2, "fingerprints": {}}
    with pytest.raises(ValueError, match="modalities"):
        TableWriter(tmp_path / "t", **{**good, "modalities": ["sound"]})
    with pytest.raises(ValueError, match="modalities"):
        TableWriter(tmp_path / "t", **{**good, "modalities": []})
    with pytest.raises(ValueError, match="rows_per_part 0"):
        TableWriter(tmp_path / "t", **good, rows_per_part=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        TableWriter(tmp_path / "other", **good)
    with pytest.raises(ValueError, match="no samples to embed"):
        TableWriter(tmp_path / "t", **good).finish()


def test_fields_may_differ_between_samples(tmp_path):
    options = {"modalities": ["image"], "dim": 2, "fingerprints": {}, "rows_per_part": 1}
    several = [{"a": 1}, {"b": ["x", "y"]}, {"a": 2.5, "b": []}, {}]
    source = [sample(number, fields) for number, fields in enumerate(several)]
    table = write_table(tmp_path / "t", lambda _start: source, **options)
    metadata = table.metadata()
    assert metadata["a"].to_pylist() == [1.0, None, 2.5, None]
    assert metadata["b"].to_pylist() == [None, ["x", "y"], [], None]
    assert metadata.schema.field("a").type == pa.float64()
    assert writer_of(tmp_path / "t").notes == []


def sample(number, fields):
    return EmbeddedRows(
        np.array([number]), [f"k{number}"], ["c"], ["s"], {"image": np.ones((1, 2))}, [fields]
    )


def writer_of(folder, size=1):
    options = {"modalities": ["image"], "dim": 2, "fingerprints": {}, "rows_per_part": size}
    return TableWriter(folder, **options)


def written(folder, several, size):
    """A table of samples with these fields, and its writer."""
    writer = writer_of(folder, size)
    for part in range(0, len(several), size):
        rows = [sample(part + n, fields) for n, fields in enumerate(several[part : part + size])]
        writer.write(part // size, rows)
    return writer.finish().metadata(), writer


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_field_of_several_types_becomes_text_wherever_parts_begin(tmp_path, size):
    values = [1, "two", None, [3, "x"], True, 4.5, "ü", {"inner": 1}]
    several = [{"mixed": one, "plain": n} for n, one in enumerate(values)]
    metadata, writer = written(tmp_path / "t", several, size)
    said = ["1", "two", None, '[3, "x"]', "true", "4.5", "ü", None]
    assert metadata["mixed"].to_pylist() == said
    assert metadata["mixed.inner"].to_pylist() == [None] * 7 + [1]
    assert metadata["plain"].to_pylist() == list(range(8))
    assert writer.notes == ["JSON fields of several types are kept as text: mixed"]
    for path in (tmp_path / "t/metadata").iterdir():
        schema = parquet.read_schema(path)
        if "mixed" in schema.names:
            assert schema.field("mixed").type in (pa.string(), pa.null())
    EmbeddingTable(tmp_path / "t", check="sha256")


def test_numbers_and_letters_beyond_what_a_column_holds_are_text(tmp_path):
    several = [{"huge": 10**30, "half": "a\ud800"}, {"huge": 1, "half": "b"}]
    metadata, _ = written(tmp_path / "t", several, 2)
    assert metadata["huge"].to_pylist() == [str(10**30), "1"]
    assert metadata["half"].to_pylist() == ["a?", "b"]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_names_that_differ_in_case_alone_are_told_apart_wherever_parts_begin(tmp_path, size):
    several = [{"Name": "A0"}, {"name": "b1"}, {"NAME": "C2", "Name": "A2", "name": "b2"}, {"x": 1}]
    metadata, writer = written(tmp_path / "t", several, size)
    assert metadata["name"].to_pylist() == [None, "b1", "b2", None]
    assert metadata["json.Name"].to_pylist() == ["A0", None, "A2", None]
    assert metadata["json.json.NAME"].to_pylist() == [None, None, "C2", None]
    names = metadata.column_names
    assert len({name.lower() for name in names}) == len(names)
    (note,) = writer.notes
    assert "kept as json.Name, json.json.NAME" in note


def test_taken_names_are_kept_under_others(tmp_path):
    several = [
        {"id": 5, "key": "k0", "caption": " c ", "shard": None, "a.b": 1, "a": {"b": 2}},
        {"Id": 6, "key": "mine", "a.b": 3},
    ]
    metadata, writer = written(tmp_path / "t", several, 2)
    rows = metadata.drop_columns(["id", "key", "caption", "shard"]).to_pylist()
    none = {"a.b": None, "json.a.b": None, "json.id": None, "json.Id": None, "json.key": None}
    del none["json.Id"]
    assert rows[0] == {**none, "a.b": 1, "json.a.b": 2, "json.id": 5, "json.json.Id": None}
    assert rows[1] == {**none, "a.b": 3, "json.json.Id": 6, "json.key": "mine"}
    assert metadata["key"].to_pylist() == ["k0", "k1"]
    assert "json.id" in writer.notes[0]


@pytest.mark.parametrize("flush", [1, 2, 3, 4, 5])
def test_a_kill_while_columns_are_agreed_on_costs_a_part_at_most(tmp_path, monkeypatch, flush):
    several = [{"Name": 1}, {"name": 2}, {"Name": "x"}]
    written(tmp_path / "whole", several, 1)
    writer = writer_of(tmp_path / "t")
    for number, fields in enumerate(several):
        writer.write(number, [sample(number, fields)])
    flush_to_disk, seen = os.fsync, []

    def fsync(descriptor):
        flush_to_disk(descriptor)
        seen.append(descriptor)
        if len(seen) == flush:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        writer.finish()
    monkeypatch.undo()
    again = writer_of(tmp_path / "t")
    again.verify(again.done)
    missing = [number for number in range(3) if number not in again.done]
    assert len(missing) <= 1
    for number in missing:
        again.write(number, [sample(number, several[number])])
    again.finish()
    found, expected = contents(tmp_path / "t"), contents(tmp_path / "whole")
    assert {name: found[name] for name in expected} == expected

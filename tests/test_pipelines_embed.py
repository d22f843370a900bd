"""`align embed`: parts that do not depend on who wrote them, nor on what was killed before."""

import json
import os
import shutil
import signal
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from pairs_corpus import encoded, picture, tiny_model, write_pairs
from ranks import run_ranks
from shards_corpus import write_tar
from torch.nn import functional as F

import align
from align import interop
from align.fusion import fusion_head
from align.fusion.head import Modality
from align.fusion.store import head_fingerprint, save_head
from align.identity import weights_fingerprint
from eval.embed import TableWriter
from eval.table import EmbeddingTable
from pipelines import embed
from pipelines.cli import parse
from pipelines.config import ConfigError, build
from pipelines.part_reader import PartReader
from pipelines.row_encoder import RowEncoder, precision_for
from pipelines.schemas import EmbedConfig
from shards.crop import FITS
from shards.damage import TooMuchDamageError
from shards.loader import iterate

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, PART = 48, 20


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A bundle, heads of it, and data: sound, and with what can be wrong."""
    root = tmp_path_factory.mktemp("embed")
    write_pairs(root / "data")
    model = tiny_model()
    align.save(model, root / "bundle")
    towers = align.bundle.fingerprint(root / "bundle")
    widths = {
        "dim": model.config.dim,
        "image_width": model.image.token_width,
        "text_width": model.text.token_width,
    }
    for name in ("late", "intermediate"):
        torch.manual_seed(0)
        head = fusion_head(name)(**widths)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        save_head(head, root / name, name=name, options={}, towers=towers)
    save_head(head, root / "strange", name=name, options={}, towers="another")
    write_odd(root / "odd")
    return root


def write_odd(folder: Path) -> None:
    """Nine samples in three shards: the middle ones are all bad, one is too long, two are equal."""
    captions = ["red dot", "red dot", " ".join(["blue ring"] * 20), *["x"] * 3, "a", "b", "c"]
    folder.mkdir()
    for shard in range(3):
        members = {}
        for number in range(3 * shard, 3 * shard + 3):
            image = encoded(picture("red", "dot", side=32 + number))
            members[f"{number}.png"] = b"no image" if shard == 1 else image
            fields = {"n": number, "in": {"a": number % 2, "b": "x"}, "odd": f"o{number}"}
            members[f"{number}.json"] = json.dumps(fields).encode()
            if number != 7:
                members[f"{number}.txt"] = captions[number].encode()
        write_tar(folder / f"{shard}.tar", members)


def settings(place: Path, out: Path, **options: Any) -> EmbedConfig:
    given = {"model": str(place / "bundle"), "data": str(place / "data"), "out": str(out)}
    given |= {"rows_per_part": PART, "batch_size": 7, "workers": 0, "precision": "fp32"}
    return build(EmbedConfig, {**given, **options}, origin="test")


def table(place: Path, out: Path, **options: Any) -> EmbeddingTable:
    assert embed.run(settings(place, out, **options)) == 0
    return EmbeddingTable(out)


def contents(folder: Path) -> dict[str, Any]:
    """All files; without how long it took, which is all that may differ."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    for name in found:
        if name == "data_report.json" or name.startswith("parts/"):
            said = json.loads(found[name])
            del (said if name == "data_report.json" else said["facts"])["seconds"]
            found[name] = said
    return found


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory) -> Path:
    """A table that was never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "table"
    table(place, out)
    return out


def test_rows_are_the_model_s_own_in_the_order_of_the_data(place, whole):
    made, model = EmbeddingTable(whole), align.load(place / "bundle")
    assert [part.rows for part in made.card.parts] == [20, 20, 8]
    said = made.metadata()
    assert said["id"].to_pylist() == list(range(ROWS))
    batch = next(
        iter(iterate(place / "data", batch_size=ROWS, image_size=32, crop=FITS[model.config.fit]))
    )
    assert said["key"].to_pylist() == batch.keys
    assert said["caption"].to_pylist() == batch.captions
    assert said["colour"].to_pylist() == [one["colour"] for one in batch.fields]
    images, texts = model.encode_image(batch.images), model.encode_text(batch.captions)
    assert np.abs(made.vectors("image") - images.numpy()).max() < 1e-3
    assert np.abs(made.vectors("text") - texts.numpy()).max() < 1e-3
    assert made.card.origin == {"model": str(place / "bundle"), "data": str(place / "data")}


def test_workers_do_not_matter_and_batches_hardly(place, whole, tmp_path):
    table(place, tmp_path / "threads", workers=3)
    assert contents(tmp_path / "threads") == contents(whole)
    one = EmbeddingTable(whole)
    for size in (1, 64):
        other = table(place, tmp_path / f"{size}", batch_size=size, dtype="float32")
        assert other.metadata().equals(one.metadata())
        for kind in ("image", "text"):
            assert np.abs(other.vectors(kind) - one.vectors(kind)).max() < 1e-3
    exact = table(place, tmp_path / "exact", dtype="float32")
    assert np.abs(other.vectors("image") - exact.vectors("image")).max() < 1e-6


# --- interrupted ---


def in_a_fork(work: Callable[[], Any]) -> int:
    """How a forked process ends that does some work: minus the signal, or its exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it has threads, and they sleep
        pid = os.fork()
    if not pid:
        code = 70
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(config: EmbedConfig, flush: int) -> int:
    """Embed in a process that is killed when it flushes its n-th file, before that is renamed."""

    def work() -> int:
        flush_to_disk, seen = os.fsync, [0]

        def fsync(descriptor: int) -> None:
            flush_to_disk(descriptor)
            seen[0] += 1
            if seen[0] == flush:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = fsync
        return embed.run(config)

    return in_a_fork(work)


@pytest.mark.slow
def test_what_is_killed_goes_on_and_ends_as_if_it_never_was(place, whole, tmp_path):
    """A table of three parts flushes a card, four files for each part, the report, the card."""
    config = settings(place, tmp_path / "t")
    for flush in (1, 2, 4, 6, 10, 14, 15):
        shutil.rmtree(config.out, ignore_errors=True)
        assert killed_at(config, flush) == -signal.SIGKILL, flush
        with pytest.raises((FileNotFoundError, ValueError), match=r"unfinished|not an embedding"):
            EmbeddingTable(config.out)
        before = {
            path: path.stat().st_mtime_ns
            for card in config.out.glob("parts/part_*.json")
            for path in config.out.glob(f"*/*{card.stem[4:]}.*")
        }
        assert len(before) == 4 * min(3, max(0, (flush - 2) // 4))
        assert killed_at(config, 3) == (-signal.SIGKILL if flush < 14 else 0), "once more"
        assert embed.run(config) == 0
        for path, time in before.items():
            assert path.stat().st_mtime_ns == time, "whole parts are kept"
        assert contents(config.out) == contents(whole)
    assert killed_at(config, 16) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_whole_parts_and_one_line(
    place, whole, tmp_path, monkeypatch, capsys, number
):
    config = settings(place, tmp_path / "t")
    write = TableWriter.write

    def interrupted(self: Any, part: int, *rest: Any) -> Any:
        card = write(self, part, *rest)
        signal.raise_signal(number)
        return card

    monkeypatch.setattr(TableWriter, "write", interrupted)
    assert embed.run(config) == 130
    out = capsys.readouterr().out
    said = "stopped; 20 rows are in a whole part, and the same command goes on"
    assert out == f"{config.out}: {said}\n"
    monkeypatch.undo()
    assert embed.run(config) == 0
    out = capsys.readouterr().out
    assert f"{config.out}: going on; 20 rows are in a whole part" in out
    assert contents(config.out) == contents(whole)
    assert embed.run(config) == 0
    assert "going on" not in capsys.readouterr().out
    assert contents(config.out) == contents(whole)


@pytest.mark.parametrize("size", [3, 20])
def test_scraped_fields_are_kept_and_told_of(place, tmp_path, capsys, size):
    members = {}
    for number in range(6):
        fields = {"mixed": number if number % 2 else "s", "Name": "A", "name": f"b{number}"}
        if number < 3:
            fields = {"mixed": number, "Name": "A", "id": 7, "caption": "red dot"}
        members[f"{number}.png"] = encoded(picture("red", "dot", side=32))
        members[f"{number}.txt"] = b"red dot"
        members[f"{number}.json"] = json.dumps(fields).encode()
    (tmp_path / "scraped").mkdir()
    write_tar(tmp_path / "scraped" / "0.tar", members)
    data = str(tmp_path / "scraped")
    said = table(place, tmp_path / "t", data=data, rows_per_part=size).metadata()
    assert said["mixed"].to_pylist() == ["0", "1", "2", "3", "s", "5"]
    assert said["name"].to_pylist() == [None, None, None, "b3", "b4", "b5"]
    assert said["json.Name"].to_pylist() == ["A"] * 6
    assert said["json.id"].to_pylist() == [7, 7, 7, None, None, None]
    assert "json.caption" not in said.column_names
    out = capsys.readouterr().out
    assert "names are taken are kept as json.Name, json.id\n" in out
    assert "several types are kept as text: mixed\n" in out


def test_a_model_that_is_nowhere_is_told_before_anything_is_loaded(place, tmp_path):
    def missing(model: str) -> list[str]:
        return settings(place, tmp_path / "t", model=model).missing_places()

    (line,) = missing(str(tmp_path / "nope"))
    assert "there is no bundle" in line
    assert missing("nope")
    for model in (str(place / "bundle"), "owner/name", "open_clip:ViT-B-32@openai"):
        assert missing(model) == []


def stay(self: Accelerator) -> None:
    """Instead of leaving the other process."""


def rank_of(rank: int, world: int, folder: str) -> None:
    for name, value in {
        **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world},
        **{"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1},
    }.items():
        os.environ[name] = str(value)
    Accelerator.end_training = stay  # the next run needs the other process too
    place = Path(folder)
    for out in ("both", "resumed"):
        assert embed.run(settings(place, place / out)) == 0

    # One process cannot go on: none does, and what is whole stays.
    if rank:
        TableWriter.write = lambda *_: {}["never"]  # type: ignore[method-assign]
    with pytest.raises((KeyError, RuntimeError), match="never"):
        embed.run(settings(place, place / "failed"))
    with pytest.raises(ConfigError, match="see different samples"):
        embed.run(settings(place, place / "mixed", data=str(place / ("odd" if rank else "data"))))
    with pytest.raises(ConfigError, match="begun with dtype float16, now float32"):
        embed.run(settings(place, place / "both", dtype="float32"))
    assert not (place / "mixed").exists()


@pytest.mark.slow
def test_two_processes_write_what_one_does(place, whole, tmp_path):
    folder = tmp_path / "place"
    shutil.copytree(place, folder)
    alone = folder / "alone"
    table(folder, alone)
    for path in alone.rglob("*.*"):  # the model and the data lie where they lay
        if path.suffix in (".npy", ".parquet"):
            assert path.read_bytes() == (whole / path.relative_to(alone)).read_bytes()
    assert killed_at(settings(folder, folder / "resumed"), 7) == -signal.SIGKILL
    run_ranks(rank_of, 2, str(folder))
    assert contents(folder / "both") == contents(alone)
    assert contents(folder / "resumed") == contents(alone)
    assert table(folder, folder / "failed").rows == ROWS
    assert contents(folder / "failed") == contents(alone)


# --- what data may hold ---


def test_bad_samples_are_left_out_and_reported_for_the_whole_table(
    place, tmp_path, capsys, monkeypatch
):
    """Of three parts, all samples of the second are bad, and one of the third has no caption."""
    options = {"data": str(place / "odd"), "rows_per_part": 3, "max_bad_fraction": 0.9}
    made = table(place, tmp_path / "t", **options)
    said = capsys.readouterr().out
    assert said.startswith(
        f"{tmp_path}/t: 5 rows of 16 (image, text), 4 bad samples left out (data_report.json), "
        "1 captions cut at 16 tokens, "
    )
    budget = said.partition("time: ")[2].split(", ")
    stages = ["read and decode", "image", "text", "write"]
    assert [one.rpartition(" ")[0] for one in budget] == stages
    assert made.metadata()["id"].to_pylist() == [0, 1, 2, 6, 8]
    assert [path.name for path in made.vector_paths("image")] == [
        "img_emb_00000.npy",
        "img_emb_00002.npy",
    ]
    report = json.loads((tmp_path / "t/data_report.json").read_text())
    assert (report["seen"], report["bad"], report["cut_captions"]) == (9, 4, 1)
    assert report["reasons"] == {"undecodable image": 3, "no caption": 1}
    assert [one["key"] for one in report["listed"]] == ["3", "4", "5", "7"]
    card = json.loads((tmp_path / "t/parts/part_00001.json").read_text())
    assert (card["rows"], card["last_id"], card["files"]) == (0, -1, {})

    # The report is of all parts, also where others wrote some of them before.
    written = TableWriter.write
    calls: list[int] = []

    def twice(self: Any, part: int, *rest: Any) -> Any:
        if part == 2:
            raise KeyboardInterrupt
        calls.append(part)
        return written(self, part, *rest)

    monkeypatch.setattr(TableWriter, "write", twice)
    with pytest.raises(KeyboardInterrupt):
        embed.run(settings(place, tmp_path / "u", **options))
    monkeypatch.undo()
    with pytest.raises(TooMuchDamageError, match="3 of 6 samples are bad"):
        embed.run(settings(place, tmp_path / "u", **{**options, "max_bad_fraction": 0.0001}))
    assert calls == [0, 1]
    table(place, tmp_path / "u", **options)
    assert contents(tmp_path / "u") == contents(tmp_path / "t")
    with pytest.raises(TooMuchDamageError, match="strict mode stops at the first bad sample"):
        embed.run(settings(place, tmp_path / "v", data=str(place / "odd"), strict=True))


def test_pictures_alone_need_no_caption(place, tmp_path):
    options = {"data": str(place / "odd"), "max_bad_fraction": 0.9, "rows": "image"}
    made = table(place, tmp_path / "t", **options)
    assert made.card.modalities == ("image",)
    assert made.metadata()["id"].to_pylist() == [0, 1, 2, 6, 7, 8]
    assert made.metadata()["caption"].to_pylist()[3:] == ["a", None, "c"]
    assert made.metadata()["n"].to_pylist() == [0, 1, 2, 6, 7, 8]
    assert not (tmp_path / "t/text_emb").exists()


def test_fields_are_those_that_were_asked_for(place, tmp_path):
    options = {"data": str(place / "odd"), "max_bad_fraction": 0.9}
    fixed = ["id", "key", "caption", "shard"]
    every = table(place, tmp_path / "all", **options).metadata()
    assert every.column_names == [*fixed, "in.a", "in.b", "n", "odd"]
    some = table(place, tmp_path / "some", fields=["in.b", "n", "none"], **options).metadata()
    assert some.column_names == [*fixed, "in.b", "n"]
    assert some["n"].equals(every["n"])
    assert table(place, tmp_path / "two", fields=["in"], **options).metadata().column_names == [
        *fixed,
        "in.a",
        "in.b",
    ]
    assert table(place, tmp_path / "no", fields=[], **options).metadata().column_names == fixed


def test_equal_captions_are_encoded_once_and_long_ones_counted(place, monkeypatch):
    model, asked = align.load(place / "bundle"), []
    tokenize = type(model).tokenize

    def seen(self: Any, texts: list[str], **options: Any) -> Any:
        asked.append(list(texts))
        return tokenize(self, texts, **options)

    monkeypatch.setattr(type(model), "tokenize", seen)
    batch = next(iter(iterate(place / "odd", batch_size=3, image_size=32)))
    encoder = RowEncoder(model, ["text"])
    with encoder.ready():
        rows = encoder.encode(batch)["text"]
        assert np.array_equal(rows[0], rows[1])
        assert not np.array_equal(rows[0], rows[2])
        encoder.encode(batch)
    assert asked[0] == batch.captions[1:]
    assert encoder.cut == 2
    assert encoder.seconds.keys() == {"image", "text"}


# --- fused rows ---


@pytest.mark.parametrize("head", [None, "late", "intermediate"])
def test_fused_rows_are_the_head_s(place, tmp_path, head):
    given = {} if head is None else {"head": str(place / head)}
    made = table(place, tmp_path / "t", rows=["image", "fused"], dtype="float32", **given)
    assert made.card.modalities == ("image", "fused")
    assert made.card.origin["head"] == (None if head is None else str(place / head))
    expected = "unit-length mean" if head is None else head_fingerprint(place / head)
    assert made.card.fingerprints["head"] == expected
    model = align.load(place / "bundle")
    batch = next(
        iter(iterate(place / "data", batch_size=ROWS, image_size=32, crop=FITS[model.config.fit]))
    )
    with torch.no_grad():
        images = model.image_features(batch.images)
        tokens = model.tokenize(batch.captions)
        texts = model.text_features(tokens.ids, tokens.mask)
        picture_rows = model.project_image(images.pooled)
        text_rows = model.project_text(texts.pooled)
        fused = F.normalize(picture_rows + text_rows, dim=-1)
        if head is not None:
            plain = fused
            loaded = align.fusion.store.load_head(
                place / head, towers=made.card.fingerprints["model"]
            )
            fused = loaded(
                Modality(picture_rows, images.tokens, images.mask),
                Modality(text_rows, texts.tokens, texts.mask),
            ).embedding
            assert (fused - plain).abs().max() > 1e-3
    assert np.abs(made.vectors("fused") - fused.numpy()).max() < 1e-5
    assert np.abs(made.vectors("image") - picture_rows.numpy()).max() < 1e-5


# --- models of others ---


def test_a_model_of_open_clip_is_named_by_its_weights(place, tmp_path):
    interop.export(align.load(place / "bundle"), tmp_path / "theirs", to="open_clip")
    made = table(place, tmp_path / "t", model=str(tmp_path / "theirs"), dtype="float32")
    named = weights_fingerprint(align.load(tmp_path / "theirs"))
    assert made.card.fingerprints["model"] == named
    assert made.card.origin["model"] == str(tmp_path / "theirs")
    ours = table(place, tmp_path / "u", dtype="float32")
    assert np.abs(made.vectors("image") - ours.vectors("image")).max() < 1e-5
    with pytest.raises(ValueError, match=r"begun with fingerprints.model .*into a new folder"):
        embed.run(settings(place, tmp_path / "u", model=str(tmp_path / "theirs"), dtype="float32"))


# --- refused ---


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows": ["image"]}, "begun with modalities image and text, now image"),
        ({"rows_per_part": 10}, "begun with rows_per_part 20, now 10"),
        ({"fields": ["shape"]}, r"begun with options.fields None, now \['shape'\]"),
        ({"caption_fields": ["txt"]}, r"begun with options.caption_fields \[\], now \['txt'\]"),
        ({"precision": "bf16"}, "begun with options.precision fp32, now bf16"),
        ({"data": "{place}/odd"}, "begun with fingerprints.data "),
    ],
)
def test_other_options_do_not_go_into_the_same_folder(place, whole, options, says):
    before = contents(whole)
    given = {k: v.format(place=place) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=f"{says}.*; embed into a new folder"):
        embed.run(settings(place, whole, **given))
    assert contents(whole) == before


def test_a_damaged_part_is_named_with_its_remedy(place, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "t")
    victim = tmp_path / "t/text_emb/text_emb_00001.npy"
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    says = r"text_emb_00001.npy: changed since .*; without .*parts/part_00001.json this part alone"
    with pytest.raises(ValueError, match=says):
        embed.run(settings(place, tmp_path / "t"))
    (tmp_path / "t/parts/part_00001.json").unlink()
    table(place, tmp_path / "t")
    assert contents(tmp_path / "t") == contents(whole)


def test_a_head_must_be_of_these_towers(place, tmp_path):
    others = {"strange": "was trained on other towers", "data": "is no fusion head"}
    for head, says in others.items():
        with pytest.raises(ValueError, match=says):
            embed.run(settings(place, tmp_path / "t", rows=["fused"], head=str(place / head)))
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows": ["sound"]}, "rows"),
        ({"rows": []}, "rows"),
        ({"rows": ["text", "text"]}, "name each once"),
        ({"head": "somewhere"}, "add fused to rows"),
    ],
)
def test_contradictions_are_found_before_anything_starts(place, tmp_path, options, says):
    with pytest.raises(ConfigError, match=says):
        settings(place, tmp_path / "t", **options)


def test_the_command_line_takes_one_kind_or_several():
    for given, rows in {"fused": ["fused"], "[image,text]": ["image", "text"]}.items():
        assert parse("embed", ["m", "d", "o", f"rows={given}"]).model_dump()["rows"] == rows


# --- precision, progress ---


def test_bf16_is_near_fp32(place, whole, tmp_path):
    near = table(place, tmp_path / "t", precision="bf16")
    assert near.card.options["precision"] == "bf16"
    exact = EmbeddingTable(whole)
    for kind in ("image", "text"):
        cosines = (near.vectors(kind) * exact.vectors(kind)).sum(axis=1)
        assert 0.99 < cosines.min() < 0.999999


def test_auto_takes_what_the_device_is_made_for(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert precision_for("auto", "cpu") == "bf16"
    assert precision_for("fp32", "cpu") == "fp32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False}, raising=False)
    assert precision_for("auto", "cpu") == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert precision_for("auto", "cuda") == "bf16"


def test_piped_output_is_plain_lines(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(embed, "_SAY_EVERY_S", 0.0)
    table(place, tmp_path / "t")
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("7 of 48 samples, ")
    assert lines[-2].startswith("48 of 48 samples, ")
    assert all(line.endswith(" to go") for line in lines[:-1])
    assert err == ""


def test_batches_begin_where_parts_do(place):
    from shards.captions import CaptionRule
    from shards.manifest import Manifest

    manifest = Manifest.open(place / "data")
    reader = PartReader(
        manifest,
        rows_per_part=PART,
        batch_size=7,
        image_size=32,
        crop=FITS["crop"],
        captions=CaptionRule(),
        workers=2,
    )
    with reader.pieces([2, 0]) as pieces:
        found = [(one.part, one.batch.ids.tolist(), one.last) for one in pieces if one.batch]
    assert found == [
        (2, list(range(40, 47)), False),
        (2, [47], True),
        (0, list(range(7)), False),
        (0, list(range(7, 14)), False),
        (0, list(range(14, 20)), True),
    ]


def test_the_shards_were_not_changed(place):
    with tarfile.open(place / "odd" / "0.tar") as tar:
        assert len(tar.getnames()) == 9

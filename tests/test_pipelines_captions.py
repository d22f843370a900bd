"""Captions: which template is drawn, what it may name, and which rows are right for each other."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs_corpus import COLOURS, SHAPES, encoded, picture, write_pairs

from pipelines.captions import CaptionWriter, positive_labels, train_tokenizer
from pipelines.config import ConfigError
from shards.loader import Batch
from shards.manifest import Manifest
from shards.packing import pack
from shards.sources import Record

TEMPLATES = ["{caption}", "a {colour} thing", "{caption} of {hand}"]
FIELDS = {"colour": "red", "hand": "one"}


def write(writer: CaptionWriter, ids, epochs, caption="red dot") -> list[str]:
    count = len(ids)
    return writer(
        [caption] * count,
        [FIELDS] * count,
        ids=np.array(ids, np.int64),
        epochs=np.array(epochs, np.int64),
    )


@settings(max_examples=30, deadline=None)
@given(
    ids=st.lists(st.integers(0, 2**40), min_size=1, max_size=20),
    epoch=st.integers(0, 1000),
    seed=st.integers(-1000, 1000),
)
def test_the_template_depends_on_seed_epoch_and_sample_alone(ids, epoch, seed):
    writer = CaptionWriter(TEMPLATES, seed=seed)
    together = write(writer, ids, [epoch] * len(ids))
    assert set(together) <= {"red dot", "a red thing", "red dot of one"}
    for place, sample in enumerate(ids):
        assert write(CaptionWriter(TEMPLATES, seed=seed), [sample], [epoch]) == [together[place]]


def test_templates_are_drawn_alike_and_a_repeated_one_more_often():
    ids, epochs = np.arange(3000), np.zeros(3000)
    counts = Counter(write(CaptionWriter(TEMPLATES, seed=0), ids, epochs))
    assert min(counts.values()) > 900
    weighted = Counter(write(CaptionWriter([*TEMPLATES, "{caption}"], seed=0), ids, epochs))
    assert 1350 < weighted["red dot"] < 1650


def test_epochs_and_seeds_draw_anew():
    ids = np.arange(300)
    first = write(CaptionWriter(TEMPLATES, seed=0), ids, ids * 0)
    assert first != write(CaptionWriter(TEMPLATES, seed=0), ids, ids * 0 + 1)
    assert first != write(CaptionWriter(TEMPLATES, seed=1), ids, ids * 0)


def test_every_way_is_what_may_be_drawn():
    writer = CaptionWriter(TEMPLATES, seed=0)
    drawn = set(write(writer, np.arange(100), np.zeros(100)))
    assert set(writer.every_way("red dot", FIELDS)) == drawn


def test_lists_are_joined_and_the_caption_is_not_hidden_by_a_field():
    writer = CaptionWriter(["{caption}: {keywords}"], seed=0)
    fields = {"keywords": ["a", "b", 3], "caption": "of the field"}
    assert writer.every_way("the caption", fields) == ["the caption: a, b, 3"]


def test_braces_in_a_caption_are_only_text():
    assert CaptionWriter(["{caption}"], seed=0).every_way("{colour} {0} {", FIELDS) == [
        "{colour} {0} {"
    ]


@pytest.mark.parametrize("template", ["{colr}", "{", "{0}", "{caption.__class__.x}", "{caption[0}"])
def test_a_template_that_does_not_fit_is_named_with_the_fields(template):
    with pytest.raises(ConfigError, match=r"captions: template .* does not fit the data") as caught:
        CaptionWriter([template], seed=0).every_way("red dot", FIELDS)
    message = str(caught.value)
    assert repr(template) in message
    assert "fields: caption, colour, hand" in message
    assert "\n" not in message


def batch(captions: list[str], fields: list[dict]) -> Batch:
    rows = len(captions)
    return Batch(
        images=torch.zeros(rows, 3, 2, 2, dtype=torch.uint8),
        captions=captions,
        all_captions=[[caption] for caption in captions],
        ids=torch.arange(rows),
        keys=[f"key{row}" for row in range(rows)],
        fields=fields,
        epochs=torch.zeros(rows, dtype=torch.int64),
        consumed=rows,
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "ab", "", "A", "á", "a ", "1"]), min_size=1, max_size=9))
def test_equal_values_and_no_others_have_equal_labels(values):
    by_caption = positive_labels(batch(values, [{}] * len(values)), "caption")
    fields = [{"kind": value} for value in values]
    by_field = positive_labels(batch(["x"] * len(values), fields), "kind")
    assert torch.equal(by_caption, by_field)
    equal = by_field[:, None] == by_field[None, :]
    assert equal.tolist() == [[one == other for other in values] for one in values]


def test_labels_do_not_depend_on_the_process():
    """Ranks compare them: a hash that differs from process to process would make no positives."""
    assert positive_labels(batch(["red"], [{}]), "caption").tolist() == [-6681078847286810355]


def test_a_sample_without_the_field_is_named():
    with pytest.raises(
        ConfigError, match="sample 'key1' has no field 'kind'; it has caption, key, x"
    ):
        positive_labels(batch(["a", "b"], [{"kind": 1}, {"x": 2}]), "kind")


def test_the_vocabulary_is_of_all_captions_by_all_templates(tmp_path):
    manifest = write_pairs(tmp_path / "data")
    writer = CaptionWriter(["{caption}", "drawn by hand {hand}"], seed=0)
    tokenizer = train_tokenizer(manifest, writer, vocabulary_size=400, context_length=16)
    known = tokenizer.backend.get_vocab()
    assert {*COLOURS, *SHAPES, "drawn", "by", "one"} <= set(known)


def test_samples_without_captions_and_bad_json_do_not_stop_the_vocabulary(tmp_path):
    import io
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in {
            "0.png": encoded(picture("red", "dot")),
            "0.txt": b"red dot",
            "1.png": encoded(picture("blue", "dot")),
            "2.png": encoded(picture("red", "dot")),
            "2.txt": b"bad json",
            "2.json": b"{",
            "3.png": b"",
            "3.txt": b"\xff\xfe",
        }.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    writer = CaptionWriter(["{caption}"], seed=0)
    tokenizer = train_tokenizer(
        Manifest.open(tmp_path), writer, vocabulary_size=99, context_length=8
    )
    known = tokenizer.backend.get_vocab()
    assert "red" in known
    assert "json" not in known


def test_no_caption_at_all_is_no_crash(tmp_path):
    record = Record("a", encoded(picture("red", "dot")), "é", {})
    manifest = pack([record], tmp_path / "data")
    tokenizer = train_tokenizer(
        manifest, CaptionWriter(["{caption}"], seed=0), vocabulary_size=99, context_length=8
    )
    assert len(tokenizer) == 5

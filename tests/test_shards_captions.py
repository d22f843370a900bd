"""Where captions stand, and which of several is drawn."""

import json

import numpy as np
import pytest
from shards_corpus import picture, write_tar

from shards.captions import CaptionRule
from shards.damage import BadSample, Reason
from shards.decode import Limits
from shards.loader import ShardLoader, iterate

TEXT = b"a cat\n\n  two cats \n"


def captions(rule, *, text=None, fields=None):
    members = {} if text is None else {"txt": text}
    if fields is not None:
        members["json"] = json.dumps(fields).encode()
    return rule.read(members, Limits())[0]


@pytest.mark.parametrize(
    ("places", "text", "fields", "expected"),
    [
        ((), TEXT, None, ["a cat\n\n  two cats"]),
        ((), TEXT, {"captions": ["x", " y "]}, ["x", "y"]),
        ((), TEXT, {"captions": []}, ["a cat\n\n  two cats"]),
        ((), TEXT, {"caption": "json"}, ["a cat\n\n  two cats"]),
        ((), None, {"caption": "json"}, ["json"]),
        ((), None, {"caption": ["one", "two"]}, ["one", "two"]),
        (("txt",), TEXT, {"captions": ["x"]}, ["a cat\n\n  two cats"]),
        (("txt.lines",), TEXT, None, ["a cat", "two cats"]),
        (("json.a.b",), TEXT, {"a": {"b": "deep"}}, ["deep"]),
        (("json.alt", "txt.lines"), TEXT, {"alt": "x"}, ["x", "a cat", "two cats"]),
        (("json.alt", "txt.lines"), TEXT, {}, ["a cat", "two cats"]),
        (("json.alt",), None, {"alt": ["", " ", "x", 3, None]}, ["x"]),
        ((), "e\u0301".encode(), None, ["\u00e9"]),  # NFC
    ],
)
def test_places(places, text, fields, expected):
    assert captions(CaptionRule(places), text=text, fields=fields) == expected


@pytest.mark.parametrize(
    ("places", "text", "fields", "reason"),
    [
        ((), None, None, Reason.NO_CAPTION),
        ((), None, {"alt": "x"}, Reason.NO_CAPTION),
        (("json.alt",), b"text", {"alt": 3}, Reason.NO_CAPTION),
        (("json.alt.deep",), b"text", {"alt": "x"}, Reason.NO_CAPTION),
        ((), b" \n", None, Reason.EMPTY_CAPTION),
        (("json.alt",), None, {"alt": ["", " "]}, Reason.EMPTY_CAPTION),
        ((), b"\xff", None, Reason.BAD_TEXT),
        ((), None, {"caption": "half a pair: \ud800"}, Reason.BAD_TEXT),
        ((), b"x" * (1 << 17), None, Reason.TOO_MANY_BYTES),
    ],
)
def test_bad_captions(places, text, fields, reason):
    with pytest.raises(BadSample) as caught:
        captions(CaptionRule(places), text=text, fields=fields)
    assert caught.value.reason == reason


@pytest.mark.parametrize("place", ["", "text", "json", "json.", "json..a", "txt.line"])
def test_unknown_places_list_the_known_ones(place):
    with pytest.raises(ValueError, match=r"known: txt, txt\.lines, json\.KEY"):
        CaptionRule((place,))


def test_the_draw_is_fair_and_a_function_of_seed_epoch_and_sample():
    rule = CaptionRule(seed=3)
    several = [["a", "b", "c"]] * 3000
    ids, epochs = np.arange(3000), np.zeros(3000, np.int64)
    drawn = rule.draw(several, ids, epochs)
    counts = [drawn.count(letter) for letter in "abc"]
    assert min(counts) > 1000 - 5 * 26  # five standard deviations
    assert rule.draw(several[::-1], ids[::-1], epochs)[::-1] == drawn
    assert rule.draw(several, ids, epochs + 1) != drawn
    assert CaptionRule(seed=4).draw(several, ids, epochs) != drawn
    assert CaptionRule().draw(several, ids, epochs) == ["a"] * 3000


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    members = []
    for number in range(12):
        lines = "\n".join(f"caption {number}.{line}" for line in range(number % 4 + 1))
        members += [(f"{number:03d}.png", picture(number)), (f"{number:03d}.txt", lines.encode())]
    write_tar(folder / "0.tar", members)
    return folder


def drawn(data, *, ranks=1, workers=0, start=0, count=9):
    out = {}
    for rank in range(ranks):
        with ShardLoader(
            data,
            batch_size=4,
            image_size=8,
            lanes=4,
            captions=["txt.lines"],
            rank=rank,
            world_size=ranks,
            workers=workers,
        ) as loader:
            loader.load_state_dict({"consumed": start})
            for _ in range(count):
                batch = next(loader)
                for sample, epoch, caption, several in zip(
                    batch.ids.tolist(),
                    batch.epochs.tolist(),
                    batch.captions,
                    batch.all_captions,
                    strict=True,
                ):
                    assert len(several) == sample % 4 + 1
                    assert caption in several
                    out[epoch, sample] = caption
    return out


def test_the_loader_draws_alike_for_any_ranks_and_workers_and_after_a_resume(data):
    whole = drawn(data)
    assert len(whole) == 36  # three epochs
    assert any(whole[0, sample] != whole[1, sample] for sample in range(12))
    assert drawn(data, ranks=2) == drawn(data, ranks=4, workers=2) == whole
    rest = drawn(data, start=20, count=4, ranks=2)
    assert rest.items() <= whole.items()


def test_one_pass_takes_the_first_and_gives_all(data):
    for batch in iterate(data, batch_size=5, image_size=8, captions=["txt.lines"]):
        assert batch.captions == [several[0] for several in batch.all_captions]
        assert [len(several) for several in batch.all_captions] == [
            sample % 4 + 1 for sample in batch.ids.tolist()
        ]

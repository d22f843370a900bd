import _thread
import io
import itertools
import signal
import threading
import time
from collections import deque
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image
from shards_corpus import SIDE, numbers_in, sample, write_set, write_tar

from shards.crop import RandomCrop
from shards.loader import ShardLoader, iterate
from shards.manifest import Manifest
from shards.order import Order

SIZES = {1: [23], 3: [9, 0, 16], 8: [1, 7, 0, 5, 2, 9, 4, 3], 17: [3, 0, 1, 4] * 4 + [2]}
BATCH = 8


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    return {
        shards: Manifest.open(write_set(root / str(shards), sizes))
        for shards, sizes in SIZES.items()
    }


def loader(manifest, **options):
    given: dict[str, Any] = {"batch_size": BATCH, "image_size": SIDE, "lanes": 4, "window": 5}
    return ShardLoader(manifest, **(given | options))


def global_batches(manifest, *, start, count, ranks, workers):
    """The ids of some global batches, put together from all ranks."""
    batches = [[-1] * BATCH for _ in range(count)]
    for rank in range(ranks):
        with loader(manifest, rank=rank, world_size=ranks, workers=workers) as stream:
            stream.load_state_dict({"consumed": start})
            for number in range(count):
                batch = next(stream)
                assert batch.ids.tolist() == numbers_in(batch)
                assert batch.captions == [f"caption {i}" for i in batch.ids.tolist()]
                assert batch.fields == [{"number": i} for i in batch.ids.tolist()]
                assert batch.keys == [f"{i:05d}" for i in batch.ids.tolist()]
                first = start + number * BATCH
                mine = [p - first for p in range(first, first + BATCH) if p % ranks == rank]
                for slot, sample_id in zip(mine, batch.ids.tolist(), strict=True):
                    batches[number][slot] = sample_id
                assert batch.consumed == stream.consumed == first + BATCH
    return batches


@pytest.mark.parametrize("shards", SIZES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_sample_once_per_epoch_in_the_same_global_batches(sets, shards, ranks, workers):
    manifest = sets[shards]
    total = len(manifest)
    count = -(-2 * total // BATCH)
    batches = global_batches(manifest, start=0, count=count, ranks=ranks, workers=workers)
    flat = [sample_id for batch in batches for sample_id in batch]
    assert sorted(flat[:total]) == sorted(flat[total : 2 * total]) == list(range(total))
    order = Order(SIZES[shards], seed=0, lanes=4, window=5)
    assert flat == order.ids(np.arange(count * BATCH)).tolist()


@given(
    shards=st.sampled_from(sorted(SIZES)),
    stop=st.integers(0, 60),
    ranks=st.sampled_from([1, 2, 4]),
    workers=st.sampled_from([0, 1, 3]),
)
@settings(max_examples=20, deadline=None)
def test_a_resumed_stream_is_the_rest_of_the_first(sets, shards, stop, ranks, workers):
    manifest = sets[shards]
    whole = Order(SIZES[shards], seed=0, lanes=4, window=5).ids(np.arange(stop + 3 * BATCH))
    rest = global_batches(manifest, start=stop, count=3, ranks=ranks, workers=workers)
    assert np.array(rest).ravel().tolist() == whole[stop:].tolist()


def test_the_state_is_what_was_handed_out_not_what_was_read_ahead(sets):
    with loader(sets[3], workers=3) as stream:
        assert stream.state_dict() == {"consumed": 0}
        first = [next(stream).ids.tolist() for _ in range(3)]
        assert stream.state_dict() == {"consumed": 3 * BATCH}
        stream.load_state_dict({"consumed": 0})
        assert [next(stream).ids.tolist() for _ in range(3)] == first


def test_epochs_are_told_per_sample(sets):
    batch = next(loader(sets[1], batch_size=30))  # 23 samples and the first 7 of the next epoch
    assert batch.epochs.tolist() == [0] * 23 + [1] * 7


def our_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("shards")]


def test_no_thread_outlives_the_loader(sets):
    with loader(sets[8], workers=3) as stream:
        next(stream)
        assert our_threads()
    assert not our_threads()


class Crop(RandomCrop):
    """Does something in a worker for every picture."""

    def __init__(self, what):
        super().__init__(0)
        self.what = what

    def box(self, row, height, width):
        self.what()
        return super().box(row, height, width)


def fail():
    raise RuntimeError("the crop broke")


def test_a_failure_in_a_worker_reaches_the_consumer(sets):
    stream = loader(sets[8], workers=2, crop=Crop(fail))
    with pytest.raises(RuntimeError, match="the crop broke"):
        next(stream)
    assert not our_threads()
    assert stream.consumed == 0


def test_an_interrupt_ends_the_threads(sets):
    begin = time.monotonic()
    # A shell's background job starts with interrupts ignored; a terminal's does not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.2, _thread.interrupt_main)
    timer.start()
    try:
        with (
            pytest.raises(KeyboardInterrupt),
            loader(sets[8], workers=2, crop=Crop(lambda: time.sleep(0.003))) as stream,
        ):
            deque(itertools.islice(stream, 1000), maxlen=0)
        assert time.monotonic() - begin < 5
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not our_threads()


def test_workers_compute_on_one_core_and_leave_the_main_thread_alone(sets):
    seen = []

    def look():
        torch.ones(1000).exp().sum()
        seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with loader(sets[1], workers=2, crop=Crop(look)) as stream:
            next(stream)
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_crop_is_drawn_for_each_sample_and_epoch(tmp_path):
    """Pictures whose every pixel tells its place; boxes of one pixel, so that none is mixed."""
    members = {}
    across, down = np.meshgrid(np.arange(16), np.arange(16))
    for number in range(6):
        pixels = np.stack([across, down, np.full_like(across, number)], axis=2).astype(np.uint8)
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "PNG")
        members |= {f"{number}.png": sink.getvalue(), f"{number}.txt": b"x"}
    write_tar(tmp_path / "0.tar", members)
    crop = RandomCrop(5, scale=(1 / 256, 1 / 256), ratio=(1.0, 1.0))

    def places(**options):
        found = {}
        stream = loader(tmp_path, crop=crop, image_size=1, **options)
        for batch in itertools.islice(stream, 3):
            for pixel, sample_id, epoch in zip(
                batch.images[:, :, 0, 0].tolist(),
                batch.ids.tolist(),
                batch.epochs.tolist(),
                strict=True,
            ):
                row = crop.draws(np.array([sample_id]), np.array([epoch]))[0]
                box = crop.box(row, 16, 16)
                assert pixel == [box.left, box.top, sample_id]
                found[epoch, sample_id] = pixel
        stream.close()
        return found

    whole = places()
    assert len(whole) == 24
    assert len({tuple(pixel[:2]) for pixel in whole.values()}) > 12
    halves = places(rank=0, world_size=2, workers=2) | places(rank=1, world_size=2)
    assert halves == whole


def test_one_pass_in_order(sets):
    for workers in (0, 2):
        batches = list(iterate(sets[17], batch_size=7, image_size=SIDE, workers=workers))
        ids = [i for batch in batches for i in batch.ids.tolist()]
        assert ids == list(range(len(sets[17])))
        assert [i for batch in batches for i in numbers_in(batch)] == ids
        assert [batch.consumed for batch in batches] == [7, 14, 21, 28, 34]
    part = list(iterate(sets[17], batch_size=7, image_size=SIDE, start=14, stop=30))
    assert [i for batch in part for i in batch.ids.tolist()] == list(range(14, 30))
    assert not our_threads()


def test_a_pass_that_is_left_ends_its_threads(sets):
    stream = iterate(sets[17], batch_size=3, image_size=SIDE, workers=2)
    next(stream)
    assert our_threads()
    del stream
    assert not our_threads()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"batch_size": 9, "world_size": 2}, "batch_size=9 is not a multiple of 2"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 9, "world_size": 3}, "lanes=4 .* such as 6"),
        ({"workers": -1}, "workers=-1"),
        ({"image_size": 0}, "image_size=0"),
        ({"max_bad_fraction": 2.0}, "max_bad_fraction is 2.0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(sets, options, message):
    with pytest.raises(ValueError, match=message):
        loader(sets[3], **options)


@pytest.mark.parametrize("state", [{}, {"consumed": -1}, {"consumed": "3"}])
def test_what_is_not_a_state_is_refused(sets, state):
    with pytest.raises(ValueError, match="must hold 'consumed'"):
        loader(sets[3]).load_state_dict(state)


@pytest.mark.parametrize(
    "options", [{"start": -1}, {"stop": 99}, {"start": 5, "stop": 4}, {"batch_size": 0}]
)
def test_a_pass_over_nothing_sensible_is_refused(sets, options):
    with pytest.raises(ValueError, match=r"samples|batch_size"):
        iterate(sets[3], **({"batch_size": 4, "image_size": SIDE} | options))


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        ShardLoader(tmp_path / "none", batch_size=1, image_size=8)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """40 samples; numbers 3, 17 and 18 have no caption."""
    folder = tmp_path_factory.mktemp("spoilt")
    for shard in range(2):
        members = {}
        for number in range(20 * shard, 20 * shard + 20):
            members |= sample(number)
            if number in (3, 17, 18):
                del members[f"{number:05d}.txt"]
        write_tar(folder / f"{shard}.tar", members)
    return Manifest.open(folder)


def test_bad_samples_are_replaced_by_position_alone(spoilt):
    reference = loader(spoilt, max_bad_fraction=1.0)
    expected = [next(reference).ids.tolist() for _ in range(10)]
    planned = reference.order.ids(np.arange(80)).reshape(10, BATCH)
    found = np.array(expected)
    bad = np.isin(planned, [3, 17, 18])
    assert bad.sum() == 6
    assert (found[~bad] == planned[~bad]).all()
    assert not np.isin(found, [3, 17, 18]).any()
    for ranks, workers, start in [(2, 3, 0), (4, 0, 24), (1, 1, 40)]:
        for rank in range(ranks):
            options = {"rank": rank, "world_size": ranks, "workers": workers}
            with loader(spoilt, max_bad_fraction=1.0, **options) as stream:
                stream.load_state_dict({"consumed": start})
                for number in range(start // BATCH, 10):
                    mine = expected[number][rank::ranks]
                    assert next(stream).ids.tolist() == mine


def test_the_report_counts_and_names(spoilt):
    stream = loader(spoilt, max_bad_fraction=1.0)
    for _ in range(10):
        next(stream)
    report = stream.report()
    assert (report["seen"], report["bad"], report["repeats"]) == (80, 6, 6)
    assert report["reasons"] == {"no caption": 6}
    names = {(entry["shard"], entry["key"]) for entry in report["listed"]}
    assert names == {("0.tar", "00003"), ("0.tar", "00017"), ("0.tar", "00018")}
    assert report["fingerprint"] == spoilt.fingerprint


def test_too_much_damage_stops_with_a_clear_line(spoilt):
    with pytest.raises(ValueError, match=r"above max_bad_fraction=0.05: .* x no caption; first: 0"):
        for _ in loader(spoilt):
            pass
    with pytest.raises(ValueError, match=r"0.tar, sample '00\d+': no caption .* strict mode"):
        for _ in loader(spoilt, strict=True, max_bad_fraction=1.0):
            pass


def test_a_set_without_a_good_sample_ends(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.png": b"no picture", "a.txt": b"x"})
    with pytest.raises(ValueError, match="no readable sample in"):
        next(loader(Manifest.open(tmp_path), max_bad_fraction=1.0))

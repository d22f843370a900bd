import json
import tarfile

import torch

from benchmarks import loader, loader_data, loader_sides
from shards.manifest import Manifest


def test_photos_are_the_same_each_time_and_of_a_photos_size(tmp_path):
    folders = [loader_data.photos(tmp_path / name, count=3) for name in ("one", "two")]
    first, second = ((folder / "00000.tar").read_bytes() for folder in folders)
    assert first == second
    with tarfile.open(folders[0] / "00000.tar") as tar:
        sizes = [member.size for member in tar if member.name.endswith(".jpg")]
    assert all(30_000 < size < 80_000 for size in sizes)
    assert loader_data.photos(tmp_path / "one", count=3) == folders[0]
    assert loader.psnr(folders[0], most=3) > 60


def test_a_tar_of_photos_is_used_as_it_is(tmp_path):
    made = loader_data.photos(tmp_path, count=2) / "00000.tar"
    folder = loader_data.photos(tmp_path, count=9, tar=made)
    assert (folder / "00000.tar").read_bytes() == made.read_bytes()
    assert len(Manifest.open(folder)) == 2


def test_our_side_goes_once_through_its_data(tmp_path):
    folder = str(loader_data.emoji(tmp_path))
    plain = list(loader_sides.ours(folder, 32, 128, "uint8")())
    floats = list(loader_sides.ours(folder, 32, 128, "float")())
    assert [tuple(images.shape) for images in plain] == [(64, 3, 32, 32)] * 2
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    for images, normalised in zip(plain, floats, strict=True):
        torch.testing.assert_close(normalised, (images / 255 - mean) / std)


def test_resuming_is_timed_to_the_first_batch(tmp_path, capsys):
    folder = loader_data.tiny(tmp_path, shards=3, samples=100)
    assert len(Manifest.open(folder)) == 300
    loader_sides.resume(str(folder), 150)
    assert 0 < json.loads(capsys.readouterr().out)["resume_s"] < 60


def test_ratios_are_medians_over_the_rounds():
    found = {"peer": [1.0, 2.0, 4.0], "ours": [3.0, 4.0, 20.0]}
    assert loader.ratio(found, "ours") == 3.0
    assert loader.ratio(found, "peer") == 1.0

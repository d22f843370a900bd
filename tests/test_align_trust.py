"""What a bundle may not hold: each intruder is refused, by name, before anything is read."""

import json
import os
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs_corpus import picture, tiny_model
from torch import nn

from align import bundle
from align.bundle import load, save
from align.encoders import IMAGE_LIBRARIES, build_image_tower, build_text_tower
from align.encoders.tower import Features, ImageTower
from align.model import DualEncoder, Tower
from align.trust import data_alone, refuse_intruders, refuse_names


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "bundle"
    save(tiny_model(), folder)
    return folder


@pytest.fixture
def saved(original, tmp_path) -> Path:
    shutil.copytree(original, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def unread(monkeypatch) -> None:
    """Nothing of the bundle's content may be read."""

    def read(*_: object, **__: object) -> None:
        raise AssertionError("the bundle was read")

    monkeypatch.setattr(bundle, "_read", read)


def refused(folder: Path, name: str) -> str:
    with pytest.raises(ValueError, match="is refused") as caught:
        load(folder)
    message = str(caught.value)
    assert type(caught.value) is ValueError
    assert "\n" not in message
    assert str(folder) in message
    assert name in message
    return message


NAMES = [
    *("model.py", "model.pyc", "native.so", "native.so.1.2", "run.sh", "notes.ipynb", "MODEL.PY"),
    *("a.pkl", "a.pickle", "pytorch_model.bin", "a.pt", "a.pth", "a.ckpt", "a.npy", "a.npz"),
    *("a.joblib", "flax_model.msgpack", "tf_model.h5", "a.keras", "a.dill", "a.zip", "a.tar.gz"),
    *("deep/er/a.pkl", "tokenizer/tokenization.py", ".hidden.pkl", ".hidden/a.py"),
]


@pytest.mark.parametrize("name", NAMES)
def test_code_pickles_and_archives_are_refused_wherever_they_are(saved, unread, name):
    path = saved / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    refused(saved, name)


def test_what_people_put_beside_a_model_is_fine(saved):
    for name in (
        *(".gitattributes", "LICENSE", "README.pt.md", "notes.txt", "results.json", "picture.png"),
        *("tokenizer/vocab.txt", "tokenizer/merges.txt", "tokenizer/sentencepiece.model"),
        *("tokenizer/chat_template.jinja", "heads/late/head.json", "heads/late/head.safetensors"),
        *(".git/hooks/pre-push.py", "v1.0.txt"),
    ):
        (saved / name).parent.mkdir(parents=True, exist_ok=True)
        (saved / name).write_bytes(b"text")
    (saved / "also.txt").symlink_to("notes.txt")
    load(saved)


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"x")


@pytest.mark.parametrize(
    "write",
    [
        archive,
        *(
            lambda path, protocol=protocol: path.write_bytes(pickle.dumps([1], protocol=protocol))
            for protocol in (2, 3, 4, 5)
        ),
        lambda path: path.write_bytes(b"\x7fELF\x02"),
        lambda path: path.write_text("#!/bin/sh\n"),
    ],
)
def test_another_name_hides_nothing(saved, unread, write):
    write(saved / "vocab.txt")
    refused(saved, "vocab.txt")


def test_weights_may_begin_with_any_byte(tmp_path):
    """The first bytes of safetensors are a length, which can look like a pickle's."""
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04" + bytes(6))
    refuse_intruders(tmp_path)


def test_a_link_out_of_the_folder_is_refused(saved, unread, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "elsewhere").mkdir()
    for name, target in (
        ("a.txt", "../secret.txt"),
        ("b", "../elsewhere"),
        ("c.txt", "/etc/hosts"),
    ):
        (saved / name).symlink_to(target)
        refused(saved, name)
        (saved / name).unlink()
    (saved / "tokenizer" / "d.txt").symlink_to(tmp_path / "secret.txt")
    refused(saved, "tokenizer/d.txt")


def test_a_link_to_a_pickle_under_another_name_is_refused(saved, unread):
    (saved / "ring").symlink_to("ring")
    refused(saved, "ring")
    (saved / "ring").unlink()
    (saved / ".git").mkdir()
    (saved / ".git" / "a.pkl").write_bytes(b"")
    (saved / "vocab.txt").symlink_to(".git/a.pkl")
    refused(saved, "vocab.txt")


def test_what_is_no_file_is_refused_and_not_waited_for(saved, unread):
    os.mkfifo(saved / "pipe.txt")
    refused(saved, "pipe.txt")


def test_a_bundle_behind_a_link_loads(saved, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    load(tmp_path / "link")


def test_a_snapshot_s_links_may_lead_to_its_own_blobs_alone(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    refuse_intruders(snapshot)
    (tmp_path / "2").write_text("{}")
    (snapshot / "results.json").symlink_to("../../../2")
    with pytest.raises(ValueError, match=r"results\.json"):
        refuse_intruders(snapshot)


def change(folder: Path, name: str, keys: list[str], value: object) -> None:
    values = json.loads((folder / name).read_text())
    inner = values
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (folder / name).write_text(json.dumps(values))


IMAGE, TEXT = ["model", "image", "options"], ["model", "text", "options"]


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["auto_map"], {"AutoModel": "evil.Model"}),
        ([*TEXT, "config", "auto_map"], {"AutoModel": "evil.Model"}),
        ([*TEXT, "trust_remote_code"], True),
        ([*TEXT, "config", "deep"], [{"trust_remote_code": True}]),
        ([*IMAGE, "pretrained"], True),
        ([*IMAGE, "checkpoint_path"], "/tmp/evil.pth"),
        ([*IMAGE, "pretrained_cfg_overlay"], {"file": "/tmp/evil.pth"}),
        ([*TEXT, "pretrained"], True),
        ([*TEXT, "config", "use_pretrained_backbone"], True),
        (["model", "image", "name"], "timm:hf-hub:someone/evil"),
        (["model", "image", "name"], "timm:local-dir:/tmp/evil"),
        (["model", "image", "name"], "local:/tmp/evil"),
        (["model", "text"], {"name": "hf:someone/evil", "options": {}}),
        (["model", "text"], {"name": "open_clip:hf-hub:someone/evil", "options": {}}),
        (["model", "text"], {"name": "hf:bert-base-uncased", "options": {}}),
        (["model", "text"], {"name": "new:someone/evil", "options": {}}),
        (["model", "text"], {"name": "new:..\\evil", "options": {}}),
        (["model", "image"], {"name": "new:folder:evil", "options": {"config": {}}}),
    ],
)
def test_a_configuration_that_asks_for_more_is_refused(saved, unread, keys, value):
    change(saved, "config.json", keys, value)
    message = refused(saved, "config.json")
    path = ".".join(keys)
    if keys[-1] in {"image", "text"}:
        path += ".name"
    if keys[-1] == "deep":
        path += "[0].trust_remote_code"
    assert path in message


def test_a_tokenizer_that_asks_for_code_is_refused(saved, unread):
    name = "tokenizer/tokenizer_config.json"
    change(saved, name, ["auto_map"], {"AutoTokenizer": ["evil.Tokenizer", None]})
    assert "auto_map" in refused(saved, name)


def test_what_is_switched_off_or_merely_told_is_fine(saved):
    change(saved, "config.json", [*IMAGE, "pretrained"], False)
    change(saved, "config.json", [*TEXT, "config", "trust_remote_code"], False)
    change(saved, "config.json", ["provenance"], {"config": {"pretrained": True}})
    load(saved)


def test_a_tower_out_of_a_bundle_is_refused_likewise(saved):
    (saved / "evil.py").write_text("")
    for build in (build_image_tower, build_text_tower):
        with pytest.raises(ValueError, match=r"evil\.py"):
            build(f"local:{saved}")
    (saved / "evil.py").unlink()
    change(saved, "config.json", [*IMAGE, "checkpoint_path"], "/tmp/evil.pth")
    with pytest.raises(ValueError, match="checkpoint_path"):
        build_image_tower(f"local:{saved}")


def test_names_alone_tell_most(tmp_path):
    refuse_names(["config.json", "model.safetensors", "tokenizer/vocab.txt", ".gitattributes"], "x")
    for name in ("weights/pytorch_model.bin", "handler.py"):
        with pytest.raises(ValueError, match="x is refused") as caught:
            refuse_names(["config.json", name], "x")
        assert name in str(caught.value)


def test_options_that_fetch_are_left_out_of_what_is_saved(tmp_path, monkeypatch):
    """Else a bundle could be written that its own loader refuses."""
    assert data_alone({"a": [{"pretrained": True, "b": 1}], "auto_map": {}, "c": (1, 2)}) == {
        "a": [{"b": 1}],
        "auto_map": {},
        "c": [1, 2],
    }
    model: Any = tiny_model()
    monkeypatch.setitem(model.image.options, "pretrained_cfg_overlay", {"file": "x"})
    model.text.transformer.config.auto_map = {"AutoModel": "a.b"}
    save(model, tmp_path / "bundle")
    load(tmp_path / "bundle")


class PatchTower(ImageTower):
    """A library of towers as somebody would add it: a module, an entry, a recipe of plain options.

    It takes the mean of the projected patches.
    """

    def __init__(self, name: str, *, patch: int = 16, image_size: int = 32, **more: Any) -> None:
        super().__init__([0.5] * 3, [0.25] * 3)
        self.name, self.width, self.token_width = f"patches:{name}", 8, 8
        self.options = {"patch": patch, "image_size": image_size, **more}
        self.patches = nn.Conv2d(3, 8, patch, stride=patch)

    @property
    def body(self) -> nn.Module:
        return self.patches

    def recipe(self) -> dict[str, Any]:
        return self.options

    def encode(self, pixels: torch.Tensor) -> Features:
        tokens = self.patches(pixels).flatten(2).mT
        return Features(tokens.mean(1), tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))

    def _checkpoint_gradients(self, enabled: bool) -> None:
        del enabled
        raise ValueError("it has no blocks")


def patches(name: str, **options: Any) -> DualEncoder:
    made = tiny_model()
    config = replace(made.config, image=Tower(f"patches:{name}", options))
    return DualEncoder(config, made.tokenizer).eval()


@pytest.fixture
def another_library(monkeypatch) -> None:
    monkeypatch.setitem(IMAGE_LIBRARIES, "patches", f"{__name__}:PatchTower")


@pytest.mark.usefixtures("another_library")
def test_a_bundle_with_towers_of_another_library_saves_and_loads(tmp_path):
    model = patches("plain", patch=8)
    save(model, tmp_path / "bundle")
    again = load(tmp_path / "bundle")
    assert again.config.image == Tower("patches:plain", {"patch": 8, "image_size": 32})
    pictures = [picture("red", "cross"), picture("blue", "dot")]
    assert torch.equal(again.encode_image(pictures), model.encode_image(pictures))
    tower = build_image_tower(f"local:{tmp_path / 'bundle'}")
    assert torch.equal(
        tower.state_dict()["patches.weight"], model.state_dict()["image.patches.weight"]
    )


@pytest.mark.usefixtures("another_library")
@pytest.mark.parametrize("name", ["someone/plain", "folder:plain"])
def test_what_would_not_load_is_not_saved(name, tmp_path):
    target = tmp_path / "bundle"
    with pytest.raises(ValueError, match=r"model\.image\.name in its config\.json") as caught:
        save(patches(name), target)
    assert str(caught.value).startswith(f"{target} is refused")
    assert "\n" not in str(caught.value)
    assert [*tmp_path.iterdir()] == []

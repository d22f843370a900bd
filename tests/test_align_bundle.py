"""Bundles: what is saved is what is loaded, and damage is one clear line."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pairs_corpus import TINY_BERT, TINY_RESNET, TINY_VIT, encoded, picture, tiny_model
from test_align_model import DISTILBERT

import align
from align import bundle
from align.bundle import fingerprint, load, save

TEXTS = ["red circle", "a much longer text: purple frame, yellow dot", ""]
_FRESH = """
import sys, torch, align
from PIL import Image
model = align.load(sys.argv[1])
assert not model.training
pictures = [Image.open(path) for path in sys.argv[3:]]
torch.save((model.encode_image(pictures), model.encode_text({texts!r})), sys.argv[2])
"""


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def saved(model, tmp_path) -> Path:
    save(model, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.slow
def test_a_fresh_process_gets_the_same_embeddings(model, saved, tmp_path):
    files = []
    for name, image in {"a": picture("red", "cross"), "b": picture("blue", "dot", side=71)}.items():
        files.append(tmp_path / f"{name}.png")
        files[-1].write_bytes(encoded(image))
    script = _FRESH.format(texts=TEXTS)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(saved), str(tmp_path / "out.pt"), *map(str, files)]
    subprocess.run(command, check=True, timeout=120, env=environment)
    images, texts = torch.load(tmp_path / "out.pt")
    expected = model.encode_image([picture("red", "cross"), picture("blue", "dot", side=71)])
    assert torch.equal(images, expected)
    assert torch.equal(texts, model.encode_text(TEXTS))


TOWERS = [
    ("timm:resnet10t", {**TINY_RESNET, "mean": [1 / 3, 0.48145466, 0.1], "std": [0.7, 0.2, 1 / 7]}),
    ("timm:vit_tiny_patch16_224", TINY_VIT),
    ("timm:convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}),
]
TEXT_TOWERS = [
    ("hf:bert", {**TINY_BERT, "pooler": "last"}),
    ("hf:roberta", TINY_BERT),
    ("hf:distilbert", {**DISTILBERT, "pooler": "cls"}),
]


@pytest.mark.parametrize(
    ("image", "text"), [*zip(TOWERS, TEXT_TOWERS, strict=True)], ids=lambda tower: tower[0]
)
def test_every_architecture_survives_saving(image, text, tmp_path):
    model = tiny_model(image=image[0], image_options=image[1], text=text[0], text_options=text[1])
    save(model, tmp_path / "bundle")
    other = align.load(tmp_path / "bundle")
    pictures = [picture("green", "ring"), picture("black", "bar", side=77)]
    assert torch.equal(other.encode_image(pictures), model.encode_image(pictures))
    assert torch.equal(other.encode_text(TEXTS), model.encode_text(TEXTS))


def test_saving_what_was_loaded_gives_the_same_files(saved, tmp_path):
    save(load(saved), tmp_path / "again")
    first, again = files_of(saved), files_of(tmp_path / "again")
    for files in (first, again):
        # transformers notes there where a tokenizer was loaded from; we never read it
        assert files.pop("tokenizer/tokenizer_config.json")
    assert first == again
    assert fingerprint(saved) == fingerprint(tmp_path / "again")


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_there_is_no_pickle_in_a_bundle_and_nothing_of_this_machine(saved):
    contents = files_of(saved)
    assert set(contents) >= {"config.json", "model.safetensors", "README.md"}
    for name, data in contents.items():
        assert Path(name).suffix in {".json", ".safetensors", ".md", ".txt"}
        assert not data.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"))
        assert str(saved.parent).encode() not in data


def test_a_bundle_names_its_pixel_statistics_and_fetches_nothing(model, saved):
    """A later timm may have other statistics for this tower; these weights want their own."""
    options = json.loads((saved / "config.json").read_text())["model"]["image"]["options"]
    own = model.image.backbone.default_cfg
    assert (options["mean"], options["std"]) == ([*own["mean"]], [*own["std"]])
    assert not options.get("pretrained")


def test_card_and_provenance_are_kept(model, tmp_path):
    save(model, tmp_path / "b", card="# Mine\n", provenance={"data": "abc"})
    assert (tmp_path / "b" / "README.md").read_text() == "# Mine\n"
    assert json.loads((tmp_path / "b" / "config.json").read_text())["provenance"] == {"data": "abc"}


def test_the_fingerprint_is_of_weights_vocabulary_and_configuration(saved, tmp_path):
    seen = {fingerprint(saved)}
    assert fingerprint(saved) in seen, "it is a function of the files"
    other = tiny_model()
    with torch.no_grad():
        next(iter(other.parameters())).view(-1)[0] += 1e-3
    save(other, tmp_path / "other")
    seen.add(fingerprint(tmp_path / "other"))
    assert len(seen) == 2, "one weight moved"
    for name in ("tokenizer/tokenizer.json", "config.json"):
        path = saved / name
        path.write_text(path.read_text() + " ")
        seen.add(fingerprint(saved))
    assert len(seen) == 4


def drop(name):
    def change(folder: Path) -> None:
        (folder / name).unlink()

    change.__name__ = f"without {name}"
    return change


def cut(name, keep=0.5):
    def change(folder: Path) -> None:
        path = folder / name
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])

    change.__name__ = f"{name} cut at {keep}"
    return change


def edit(what, *path, to):
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        inner = values
        for key in path[:-1]:
            inner = inner[key]
        if to is None:
            del inner[path[-1]]
        else:
            inner[path[-1]] = to
        (folder / "config.json").write_text(json.dumps(values))

    change.__name__ = what
    return change


def whole(name, content):
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    change.__name__ = f"{name} is {content[:10]!r}"
    return change


def no_tokenizer(folder: Path) -> None:
    for path in (folder / "tokenizer").iterdir():
        path.unlink()
    (folder / "tokenizer").rmdir()


DAMAGE = [
    drop("config.json"),
    drop("model.safetensors"),
    drop("tokenizer/tokenizer.json"),
    no_tokenizer,
    cut("config.json"),
    cut("config.json", 0),
    cut("model.safetensors"),
    cut("model.safetensors", 0),
    cut("tokenizer/tokenizer.json"),
    whole("config.json", b"[1, 2]"),
    whole("config.json", b"\xff\xfe\x00"),
    edit("no format", "format", to=None),
    edit("a later format", "format", to=99),
    edit("no model", "model", to=None),
    edit("model is a list", "model", to=[1]),
    edit("no width", "model", "image", to=None),
    edit("unknown entry", "model", "colour", to=1),
    edit("unknown tower", "model", "image", "name", to="timm:no_such_model"),
    edit("unknown option", "model", "text", "options", "no_such", to=1),
    edit("another width", "model", "dim", to=8),
    edit("a width of text", "model", "dim", to="wide"),
    edit("another depth", "model", "text", "options", "config", "num_hidden_layers", to=2),
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_one_line_that_names_the_bundle(damage, saved, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    damage(saved)
    with pytest.raises(ValueError, match=r".") as caught:
        load(saved)
    message = str(caught.value)
    assert type(caught.value) is ValueError, "not a JSON error or the like that slipped through"
    assert str(saved) in message
    assert "\n" not in message
    assert not message.endswith(":"), "says what is wrong, not only that something is"


@pytest.mark.parametrize("function", [load, fingerprint])
@pytest.mark.parametrize("name", ["no/such/folder", "someone/some-model", "a b", "a/b/c/d"])
def test_what_is_nowhere_is_one_line(function, name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"there is no (bundle|folder)") as caught:
        function(name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer/tokenizer.json", "config.json"])
def test_a_fingerprint_needs_all_files(saved, name):
    (saved / name).unlink()
    with pytest.raises(ValueError, match=f"is no bundle: it has no {name}"):
        fingerprint(saved)


def test_a_file_is_no_bundle(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is no bundle"):
        load(tmp_path / "file")


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["save_file", "tokenizer", "README", "rename"])
def test_a_full_disk_leaves_the_old_bundle_whole(saved, step, monkeypatch):
    before = files_of(saved)
    changed = tiny_model(seed=1)
    if step == "save_file":
        monkeypatch.setattr(bundle, "save_file", full_disk)
    elif step == "tokenizer":
        monkeypatch.setattr(type(changed.tokenizer), "save", full_disk)
    elif step == "README":
        original = Path.write_text

        def write_text(path, *args, **kwargs):
            return full_disk() if path.name == "README.md" else original(path, *args, **kwargs)

        monkeypatch.setattr(Path, "write_text", write_text)
    else:
        original_rename = Path.rename

        def rename(path, target):
            return full_disk() if path.name.endswith(".writing") else original_rename(path, target)

        monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="No space left"):
        save(changed, saved)
    monkeypatch.undo()
    assert files_of(saved) == before
    save(changed, saved)
    assert files_of(saved) != before
    assert [path.name for path in saved.parent.iterdir()] == ["bundle"]


def test_a_first_bundle_that_fails_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(model, tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bundle_of_a_pretrained_folder_stands_alone(tmp_path, dtype):
    """Weights as a hub has them: with keys of their own in the configuration, perhaps in bf16."""
    from pairs_corpus import tiny_tokenizer
    from transformers import AutoConfig, AutoModel

    from align.model import DualEncoder, DualEncoderConfig, Tower

    tokenizer = tiny_tokenizer()
    settings = AutoConfig.for_model("bert", **TINY_BERT, vocab_size=len(tokenizer), colour="odd")
    hub = tmp_path / "hub"
    AutoModel.from_config(settings).to(dtype).save_pretrained(hub)
    config = DualEncoderConfig(
        image=Tower("timm:resnet10t", TINY_RESNET),
        text=Tower(f"hf:{hub}", {"pretrained": True, "pooler": "cls"}),
        dim=16,
        image_size=32,
        context_length=16,
    )
    model = DualEncoder(config, tokenizer)
    save(model, tmp_path / "bundle")
    expected = model.encode_text(TEXTS)
    for path in sorted(hub.iterdir()):
        path.unlink()
    assert torch.equal(load(tmp_path / "bundle").encode_text(TEXTS), expected)


def test_a_name_without_an_owner_never_asks_the_network(monkeypatch):
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    with pytest.raises(ValueError, match="no such folder"):
        load("nothing-of-this-name")

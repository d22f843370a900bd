"""Bundles: what is saved is what is loaded, and damage is one clear line."""

import errno
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import transformers
from pairs_corpus import TINY_BERT, TINY_RESNET, TINY_VIT, encoded, picture, tiny_model
from safetensors.torch import load_file, save_file

import align
from align import bundle
from align.bundle import fingerprint, load, save
from align.model import DualEncoder, DualEncoderConfig, Tower
from align.tokenizer import Tokenizer

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


DISTILBERT = {
    "dim": 32,
    "n_layers": 1,
    "n_heads": 2,
    "hidden_dim": 48,
    "max_position_embeddings": 24,
}
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


def test_the_temperature_is_part_of_the_model(tmp_path):
    model: Any = tiny_model()
    model.logit_scale.fill_(3.25)
    model.logit_bias.fill_(-1.5)
    save(model, tmp_path / "b")
    other = load(tmp_path / "b")
    assert (other.logit_scale.item(), other.logit_bias.item()) == (3.25, -1.5)


def test_how_texts_are_cleaned_is_part_of_the_bundle(tmp_path):
    model = tiny_model()
    model.tokenizer.clean = "lower"
    save(model, tmp_path / "b")
    assert load(tmp_path / "b").tokenizer.clean == "lower"


def test_everybody_who_reads_one_file_reads_all(saved):
    modes = {path.stat().st_mode & 0o777 for path in saved.rglob("*") if path.is_file()}
    assert modes == {(saved / "config.json").stat().st_mode & 0o777}


def test_weights_with_two_names_are_saved_under_both(tmp_path):
    model: Any = tiny_model()
    blocks = model.image.backbone
    blocks.layer2[0].bn1.weight = blocks.layer1[0].bn1.weight
    expected = model.encode_image([picture("red", "dot")])
    save(model, tmp_path / "b")
    assert torch.equal(load(tmp_path / "b").encode_image([picture("red", "dot")]), expected)


# --- loading does no needless work ---


def test_loading_draws_no_random_numbers(saved):
    before = torch.get_rng_state()
    load(saved)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.nn.Linear(3, 3).weight.std() > 0
    assert not torch.equal(torch.get_rng_state(), before), "while others draw as ever"


def test_buffers_that_are_not_saved_are_real(tmp_path):
    """Statistics of pixels, positions and the like, which are computed and not drawn."""
    options = {"img_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
    image = ("timm:swin_tiny_patch4_window7_224", {**options, "window_size": 4})
    model = tiny_model(image=image[0], image_options=image[1])
    save(model, tmp_path / "b")
    named = dict(load(tmp_path / "b").named_buffers())
    assert named.keys() == dict(model.named_buffers()).keys()
    assert named.keys() > model.state_dict().keys() & named.keys(), "some are not in the file"
    for name, buffer in model.named_buffers():
        assert torch.equal(named[name], buffer), name


def test_no_class_is_looked_for_to_read_a_tokenizer(saved, monkeypatch):
    from transformers import AutoConfig, AutoTokenizer

    def looked(*_: object, **__: object) -> None:
        raise AssertionError("a class of tokenizers was looked for")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", looked)
    monkeypatch.setattr(AutoConfig, "from_pretrained", looked)
    load(saved)


_IMPORTED = """
import sys, align
align.load(sys.argv[1])
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.slow
def test_libraries_that_a_bundle_does_not_need_are_not_imported(saved):
    command = [sys.executable, "-c", _IMPORTED, str(saved)]
    done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
    names = done.stdout.split()
    assert {"timm", "transformers"} <= set(names)
    assert not {"open_clip", "faiss", "pyarrow", "webdataset", "onnx", "shards"} & set(names)


@pytest.mark.parametrize("family", ["bert", "roberta", "clip", "t5"])
def test_tokenizers_of_every_family_give_the_same_ids(family, tmp_path):
    """Their classes are not asked for: all they do stands in the one file that is saved."""
    if family == "clip":
        tokenizer = Tokenizer.clip(context_length=16)
    else:
        tokenizer = Tokenizer(family_tokenizer(family), context_length=16)
    towers = (Tower("timm:resnet10t", TINY_RESNET), Tower("hf:bert", TINY_BERT))
    config = DualEncoderConfig(*towers, dim=16, image_size=32, context_length=16)
    model = DualEncoder(config, tokenizer)
    save(model, tmp_path / "b")
    other = load(tmp_path / "b").tokenizer
    texts = ["A red circle!", "two  spaces", "", "x" * 50, "née <pad> </s> [SEP]"]
    ours, theirs = tokenizer(texts), other(texts)
    assert torch.equal(ours.ids, theirs.ids)
    assert torch.equal(ours.mask, theirs.mask)
    assert (other.pad_id, other.end_id) == (tokenizer.pad_id, tokenizer.end_id)


def family_tokenizer(family: str) -> Any:
    """A tokenizer of transformers with a tiny vocabulary of its own."""
    families: Any = transformers
    words = ["a", "red", "circle", "two", "x", "##x", "!"]
    if family == "bert":
        entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
        return families.BertTokenizer(vocab={word: number for number, word in enumerate(entries)})
    if family == "roberta":
        entries = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcdeirx", "\u0120", "re"]
        vocabulary = {entry: number for number, entry in enumerate(entries)}
        return families.RobertaTokenizer(vocab=vocabulary, merges=[("r", "e")])
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("red", -3.0)]
    return families.T5Tokenizer(vocab=[*pieces, ("x", -4.0), ("circle", -5.0)], extra_ids=0)


# --- what was written before, and what is in the way ---


def test_a_bundle_of_the_first_format_is_read(model, saved):
    """It had no temperature, and its texts were taken as they are."""
    values = json.loads((saved / "config.json").read_text())
    values["format"] = 1
    del values["tokenizer"]
    for side in ("image", "text"):
        del values["model"][side]["projection"]
    del values["model"]["fit"]
    values["model"]["image"]["options"]["pretrained"] = False
    (saved / "config.json").write_text(json.dumps(values))
    weights = load_file(saved / "model.safetensors")
    del weights["logit_scale"], weights["logit_bias"]
    save_file(weights, saved / "model.safetensors")
    other = load(saved)
    assert torch.equal(other.encode_text(TEXTS), model.encode_text(TEXTS))
    assert other.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert (other.logit_bias.item(), other.tokenizer.clean) == (0, "none")


def test_a_folder_of_something_else_is_not_written_over(model, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("ten years")
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match=f"{name} is there and is no bundle"):
            save(model, tmp_path / name)
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "ten years"
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty")
    load(tmp_path / "empty")


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    model: Any = tiny_model()
    with torch.no_grad():
        model.text_projection.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"text_projection\.weight .*NaN"):
        save(model, tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_infinite_values_are_weights(tmp_path):
    """Such as a mask of attention that is kept with them."""
    model = tiny_model()
    mask = torch.zeros(4)
    mask[:2] = torch.tensor([torch.inf, -torch.inf])
    model.text.register_buffer("causal", mask)
    save(model, tmp_path / "b")


@pytest.mark.parametrize("name", ["text_projection.weight", "logit_scale", "running_var"])
def test_infinite_weights_are_neither_saved_nor_loaded(saved, tmp_path, name):
    model: Any = tiny_model()
    name = next(key for key in model.state_dict() if key.endswith(name))
    with torch.no_grad():
        model.state_dict()[name].view(-1)[0] = torch.inf
    with pytest.raises(ValueError, match=f"{name} holds infinite"):
        save(model, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    tensors = load_file(saved / "model.safetensors")
    tensors[name].view(-1)[0] = -torch.inf
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match=f"damaged bundle: the weight {name} holds infinite"):
        load(saved)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("text_projection.weight", torch.int64), ("num_batches_tracked", torch.float32)],
)
def test_weights_of_another_kind_of_number_are_refused(saved, name, dtype):
    tensors = load_file(saved / "model.safetensors")
    name = next(key for key in tensors if key.endswith(name))
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match=f"the weight {name} is of {dtype}"):
        load(saved)


def test_large_weights_whose_sum_overflows_are_weights(tmp_path):
    model: Any = tiny_model()
    with torch.no_grad():
        model.text_projection.weight.fill_(3e38)
    save(model, tmp_path / "b")
    found: Any = load(tmp_path / "b")
    assert torch.equal(found.text_projection.weight, model.text_projection.weight)


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


def weights(what, edit):
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    change.__name__ = what
    return change


def without_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["text_projection.weight"][3, 3] = torch.nan


def of_another_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["image_projection.weight"] = torch.zeros(3, 3)


def no_tokenizer(folder: Path) -> None:
    for path in (folder / "tokenizer").iterdir():
        path.unlink()
    (folder / "tokenizer").rmdir()


DAMAGE = [
    drop("config.json"),
    drop("model.safetensors"),
    drop("tokenizer/tokenizer.json"),
    drop("tokenizer/tokenizer_config.json"),
    no_tokenizer,
    weights("a weight is NaN", without_a_number),
    weights("a weight of another shape", of_another_shape),
    weights("a weight too many", lambda tensors: tensors.update(more=torch.zeros(1))),
    weights("a weight too few", lambda tensors: tensors.pop("text_projection.weight")),
    weights("no temperature", lambda tensors: tensors.pop("logit_scale")),
    whole("tokenizer/tokenizer.json", b"{}"),
    cut("config.json"),
    cut("config.json", 0),
    cut("model.safetensors"),
    cut("model.safetensors", 0),
    cut("tokenizer/tokenizer.json"),
    whole("config.json", b"[1, 2]"),
    whole("config.json", b"\xff\xfe\x00"),
    edit("no format", "format", to=None),
    edit("a later format", "format", to=99),
    edit("no tokenizer", "tokenizer", to=None),
    edit("unknown cleaning", "tokenizer", "clean", to="soap"),
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


def test_loading_leaves_the_garbage_collector_as_it_was(saved):
    assert gc.isenabled()
    load(saved)
    assert gc.isenabled()
    gc.disable()
    try:
        load(saved)
        assert not gc.isenabled()
        with pytest.raises(ValueError, match="no such folder"):
            load("nowhere")
        assert not gc.isenabled()
    finally:
        gc.enable()


# --- values of the wrong kind are told before anything is built ---


def image_option(key: str, value: Any):
    return edit(f"{key} {value}", "model", "image", "options", key, to=value)


WRONG = [
    *[
        (edit(f"{key} {value!r}", "model", key, to=value), f"config.json: model.{key} is ")
        for key in ("image_size", "context_length", "dim")
        for value in ("32", 32.5, 32.0, True, [32], 0, -5, 10**9)
    ],
    (edit("a list of sizes", "model", "image_size", to={"a": None}), "model.image_size"),
    (edit("fit", "model", "fit", to=3), "model.fit"),
    (edit("projection", "model", "text", "projection", to=["linear"]), "model.text.projection"),
    (edit("name", "model", "image", "name", to=3), "model.image.name"),
    (edit("options", "model", "image", "options", to=[1]), "model.image.options"),
    (edit("tower", "model", "image", to="timm:resnet10t"), "model.image"),
    (edit("model", "model", to=[1]), "model is [1]"),
    (edit("a tower too few", "model", "text", to=None), "model lacks 'text'"),
    (edit("a name too few", "model", "text", "name", to=None), "model.text lacks 'name'"),
    (edit("a key too many", "model", "image", "colour", to=1), "model.image has an unknown key"),
    (edit("cleaning", "tokenizer", "clean", to=[1]), "config.json says no `clean`"),
    (edit("tokenizer", "tokenizer", to=["lower"]), "config.json says no `clean`"),
    (edit("format", "format", to=[2]), "format [2]"),
    (edit("a true format", "format", to=True), "format True"),
    *[
        (image_option(key, value), "takes a number for each of 3 channels")
        for key in ("mean", "std")
        for value in ([float("nan")] * 3, [float("inf")] * 3, [0.5, 0.5])
    ],
    *[(image_option("std", [value] * 3), "deviations above 0") for value in (0.0, 1e-300, -1.0)],
    *[(image_option("mean", value), "mean and std take a number") for value in (3, ["a"] * 3)],
    (whole("config.json", b"[]"), "its config.json holds []"),
    (whole("config.json", b"{}"), "is a damaged bundle: its config.json lacks 'format'"),
    (whole("config.json", b"{"), "its config.json is no JSON"),
    (whole("config.json", b"[" * 50_000), "its config.json is nested too deeply"),
    (whole("tokenizer/tokenizer.json", b"{}"), "its tokenizer/tokenizer.json is no tokenizer"),
    (whole("tokenizer/tokenizer.json", b"null"), "its tokenizer/tokenizer.json holds None"),
    (whole("tokenizer/tokenizer_config.json", b"[]"), "its tokenizer/tokenizer_config.json holds"),
    (drop("tokenizer/tokenizer_config.json"), "it has no tokenizer/tokenizer_config.json"),
    (
        edit("a width of text", "model", "text", "options", "config", "hidden_size", to="32"),
        "hidden_size",
    ),
    (image_option("channels", [0, 0, 0, 0]), "damaged bundle: "),
]


@pytest.mark.parametrize(("damage", "told"), WRONG, ids=lambda one: getattr(one, "__name__", ""))
def test_values_of_the_wrong_kind_are_one_line_that_names_file_and_key(
    damage, told, saved, monkeypatch
):
    # Users have no types checked at run time; here they would be told first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    damage(saved)
    with pytest.raises(ValueError, match=r".") as caught:
        load(saved)
    assert type(caught.value) is ValueError
    assert told in str(caught.value)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configuration_comes_back_as_it_was():
    towers = (Tower("timm:resnet10t", TINY_RESNET), Tower("hf:bert", projection="mlp"))
    config = DualEncoderConfig(*towers, dim=16, image_size=32, context_length=16, fit="squash")
    assert DualEncoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# --- a bundle that is replaced while it is read ---


def replaced_while_read(saved: Path, monkeypatch: pytest.MonkeyPatch, *, times: int) -> Any:
    """Another model takes the place between the reading of the tokenizer and of the weights."""
    others = [tiny_model(seed=seed, context_length=12) for seed in range(1, times + 1)]
    original, last = bundle.load_file, others[-1]

    def load_file_late(path):
        if others:
            save(others.pop(0), saved)
        return original(path)

    monkeypatch.setattr(bundle, "load_file", load_file_late)
    return last


def test_a_bundle_that_is_replaced_while_it_is_read_is_read_again(saved, monkeypatch):
    other = replaced_while_read(saved, monkeypatch, times=1)
    found = load(saved)
    assert found.config.context_length == found.tokenizer.context_length == 12
    assert torch.equal(found.encode_text(TEXTS), other.encode_text(TEXTS))


def test_a_bundle_that_is_replaced_again_and_again_is_refused(saved, monkeypatch):
    replaced_while_read(saved, monkeypatch, times=2)
    with pytest.raises(ValueError, match="bundle was replaced while it was read, twice"):
        load(saved)
    load(saved)


def test_damage_met_while_a_bundle_is_replaced_is_no_damage(saved, monkeypatch):
    """Such as a file that is not there between two renames."""
    other, original = tiny_model(seed=1), bundle.load_file

    def vanished(path):
        monkeypatch.setattr(bundle, "load_file", original)
        save(other, saved)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))

    monkeypatch.setattr(bundle, "load_file", vanished)
    assert torch.equal(load(saved).encode_text(TEXTS), other.encode_text(TEXTS))


def test_results_that_are_recorded_while_a_bundle_is_read_change_nothing(saved, monkeypatch):
    reads, original = [], bundle.load_file

    def record(path):
        reads.append(path)
        (saved / "results.json").write_text("{}")
        return original(path)

    monkeypatch.setattr(bundle, "load_file", record)
    load(saved)
    assert len(reads) == 1

"""`align export` and `align import`: what they write, what they say, what they refuse."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs_corpus import tiny_model

import align
from align import interop
from align.bundle import fingerprint, save
from align.interop import agreement
from align.interop.agreement import Agreement, compare
from align.model import DualEncoder
from pipelines.cli import main

FOREIGN: dict[str, Any] = {
    "image": "open_clip:ViT-B-32",
    "image_options": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text": "open_clip:ViT-B-32",
    "text_options": {"width": 32, "heads": 2, "layers": 2, "context_length": 16},
}
"""Towers that every format takes."""


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, captured.out, captured.err


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def held(folder: Path, config: str, *files: str) -> None:
    """A folder of a model, by its configuration, with other files."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config)


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    model = tiny_model(**FOREIGN)
    model.logit_scale.fill_(math.log(37.5))  # no default
    return model


@pytest.fixture
def bundle(model, tmp_path) -> Path:
    save(model, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def written(monkeypatch) -> list[Path]:
    """Folders that a pretended writer of ONNX made."""
    made: list[Path] = []

    def write(model: DualEncoder, folder: Path) -> Agreement:
        assert isinstance(model, DualEncoder)
        made.append(folder)
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"format": "onnx", "dim": model.config.dim}))
        return Agreement(2e-7)

    monkeypatch.setattr(agreement, "written_for_tests", write, raising=False)
    place = "align.interop.agreement:written_for_tests"
    monkeypatch.setitem(interop.EXPORTS, "onnx", place)
    return made


# --- export ---


@pytest.mark.slow
@pytest.mark.parametrize("to", interop.EXPORTS)
def test_export_writes_a_model_that_the_other_library_agrees_with(to, bundle, capsys, tmp_path):
    code, out, err = call(capsys, "export", bundle, tmp_path / "out", "--to", to)
    assert (code, err) == (0, "")
    assert f"{tmp_path}/out: open_clip:ViT-B-32 and open_clip:ViT-B-32, {to}\n" in out
    apart = re.search(r"cosines of both libraries differ by (\S+) at most", out)
    assert apart
    assert 0 <= float(apart[1]) <= agreement.TOLERANCE
    assert interop.format_of(tmp_path / "out") == to
    assert (tmp_path / "out" / "README.md").is_file()
    interop.refuse_to_replace(tmp_path / "out", to, overwrite=True)  # all of it is its own


def test_export_says_how_far_the_libraries_are_apart(written, bundle, capsys, tmp_path):
    code, out, err = call(capsys, "export", bundle, tmp_path / "out", "--to", "onnx")
    assert (code, err) == (0, "")
    assert written == [tmp_path / "out"]
    said = "cosines of both libraries differ by 2e-07 at most (rounding: up to "
    assert out.splitlines()[-1].startswith(said)


def test_export_says_where_nothing_could_be_compared(
    written, bundle, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(agreement, "written_for_tests", lambda *_: None)
    monkeypatch.setattr(agreement, "find_spec", lambda name: None if name == "tokenizers" else name)
    code, out, err = call(capsys, "export", bundle, tmp_path / "out", "--to", "onnx")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "not compared: tokenizers is not installed"


def test_a_model_that_another_library_computes_otherwise_is_not_written(
    bundle, capsys, monkeypatch, tmp_path
):
    def wrong(folder: Path, images: Any, texts: Any) -> torch.Tensor:
        return torch.zeros(len(images), len(texts))

    changed = replace(agreement.OTHERS["open_clip"], logits=wrong)
    monkeypatch.setitem(agreement.OTHERS, "open_clip", changed)
    out = tmp_path / "out"
    code, said, err = call(capsys, "export", bundle, out, "--to", "open_clip")
    assert (code, said) == (2, f"writing {out} ...\n")
    assert re.search(r"other logits in OpenCLIP \(cosines differ by 0\.\d+, .*nothing was wr", err)
    assert len(err.splitlines()) == 1
    assert not out.exists()


def test_every_format_has_all_that_a_format_needs():
    assert interop.EXPORTS.keys() == agreement.OTHERS.keys() == interop.FILES.keys() - {"bundle"}


def test_a_format_that_nothing_says_how_to_compare_is_one_line(model, monkeypatch, tmp_path):
    monkeypatch.delitem(agreement.OTHERS, "onnx")
    with pytest.raises(ValueError, match="'onnx' is no format that can be compared; known: open_c"):
        compare(model, tmp_path, to="onnx")


@pytest.mark.parametrize(
    ("to", "clean", "named"),
    [
        ("open_clip", "none", "OpenCLIP repairs broken encodings"),
        ("open_clip", "whitespace", None),
        ("hf", "none", None),
        ("onnx", "none", None),
        ("onnx", "lower", "the code in README.md does"),
    ],
)
def test_texts_that_get_other_tokens_are_told(
    to, clean, named, model, bundle, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(agreement, "written_for_tests", lambda *_: None, raising=False)
    monkeypatch.setitem(interop.EXPORTS, to, "align.interop.agreement:written_for_tests")
    monkeypatch.setattr(model.tokenizer, "clean", clean)
    save(model, tmp_path / "cleaned")
    code, out, _ = call(capsys, "export", tmp_path / "cleaned", tmp_path / "out", "--to", to)
    assert code == 0
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert len(notes) == (named is not None)
    assert (named or "") in "".join(notes)


@pytest.mark.parametrize(
    ("difference", "holds"), [(0.0, True), (1e-5, True), (1.1e-5, False), (float("nan"), False)]
)
def test_an_agreement_holds_up_to_rounding(difference, holds):
    assert Agreement(difference).holds is holds


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["bundle", "out", "--to", "coreml"],
            "unknown format 'coreml'; known: open_clip, hf, onnx",
        ),
        (["bundle", "out"], "to: required, and not given"),
        (["nowhere", "out", "--to", "onnx"], "there is no bundle nowhere"),
        (["bundle", "other", "--to", "hf"], "other holds a model; choose another folder, or"),
        (["bundle", "other", "--to", "onnx", "--overwrite"], "other holds a model for hf, which a"),
        (["bundle", "trained", "--to", "hf", "--overwrite"], "trained holds optimizer.pt, which"),
        (["bundle", "noted", "--to", "onnx", "--overwrite"], "noted holds tokenizer/notes.txt, "),
        (["bundle", "bundle", "--to", "onnx", "--overwrite"], "bundle is the bundle itself"),
        (["bundle", "file", "--to", "onnx"], "file is a file; choose another folder"),
        (["bundle", "mine", "--to", "onnx"], "mine holds something other than a model"),
        (["bundle", "mine", "--to", "onnx", "--overwrite"], "mine holds something other than"),
        (["mine", "out", "--to", "onnx"], "mine is no bundle: it has no config.json"),
    ],
)
def test_mistakes_of_export_are_one_line_and_change_nothing(
    arguments, says, written, bundle, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    Path("mine").mkdir()
    Path("mine/letters.txt").write_text("x")
    held(Path("other"), '{"model_type": "clip"}')
    held(Path("trained"), '{"model_type": "clip"}', "optimizer.pt", "model.safetensors")
    held(Path("noted"), '{"format": "onnx"}', "image.onnx", "tokenizer/notes.txt")
    before = content(tmp_path)
    code, out, err = call(capsys, "export", *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == (2 if "errors in" in err or "error in" in err else 1)
    assert written == []
    assert content(tmp_path) == before


def test_a_model_that_does_not_fit_the_format_is_one_line(
    bundle, capsys, monkeypatch, tmp_path
):  # fmt: skip
    def refuse(model: DualEncoder, folder: Path) -> None:
        raise ValueError("the pooler mean fits no class; `--to onnx` takes any model")

    monkeypatch.setattr(agreement, "refusing_for_tests", refuse, raising=False)
    monkeypatch.setitem(interop.EXPORTS, "hf", "align.interop.agreement:refusing_for_tests")
    code, _, err = call(capsys, "export", bundle, tmp_path / "out", "--to", "hf")
    assert code == 2
    assert err == "align export: the pooler mean fits no class; `--to onnx` takes any model\n"
    assert not (tmp_path / "out").exists()


def test_export_replaces_a_model_where_it_is_told_to(written, bundle, capsys, tmp_path):
    out = tmp_path / "out"
    call(capsys, "export", bundle, out, "--to", "onnx")
    assert call(capsys, "export", bundle, out, "--to", "onnx")[0] == 2
    assert len(written) == 1
    call(capsys, "export", bundle, out, "--to", "onnx", "--overwrite")
    assert len(written) == 2


def test_the_library_exports_a_model_or_a_bundle_and_lists_the_formats(
    written, model, bundle, tmp_path
):
    assert align.export is interop.export
    align.export(model, tmp_path / "one", to="onnx")
    align.export(bundle, tmp_path / "two", to="onnx")
    assert written == [tmp_path / "one", tmp_path / "two"]
    with pytest.raises(ValueError, match="unknown format 'tflite'; known: open_clip, hf, onnx"):
        align.export(model, tmp_path / "three", to="tflite")
    with pytest.raises(ValueError, match="cannot be exported over itself"):
        align.export(bundle, bundle, to="onnx", overwrite=True)


# --- import, and models of others where bundles are taken ---


@pytest.fixture
def reader(monkeypatch, model) -> list[str]:
    """Sources that a pretended reader of OpenCLIP's models was asked for."""
    asked: list[str] = []

    def read(source: str) -> DualEncoder:
        asked.append(source)
        return model

    monkeypatch.setattr(agreement, "reading_for_tests", read, raising=False)
    for kind in ("open_clip", "hf"):
        monkeypatch.setitem(interop.READERS, kind, "align.interop.agreement:reading_for_tests")
    return asked


def test_import_writes_a_bundle_and_says_what_it_read(reader, model, capsys, tmp_path):
    out = tmp_path / "out"
    code, said, err = call(capsys, "import", "open_clip:ViT-B-32@tag", out)
    assert (code, err) == (0, "")
    assert reader == ["ViT-B-32@tag"]
    count = sum(weight.numel() for weight in model.image.parameters()) / 1e6
    for part in (
        f"{out}: 16 dimensions",
        f"open_clip:ViT-B-32, {count:.1f} M parameters, pictures of 32 px (crop)",
        "16 tokens at most",
        f"{len(model.tokenizer)} entries, texts cleaned: none",
        "37.5 x cosine +0",
    ):
        assert part in said
    loaded = align.load(out)
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[key])
    config = json.loads((out / "config.json").read_text())
    assert config["provenance"] == {"imported": "open_clip:ViT-B-32@tag"}


@pytest.mark.slow
@pytest.mark.parametrize("to", ["open_clip", "hf"])
def test_what_is_exported_is_imported_with_equal_rows(to, model, bundle, capsys, tmp_path):
    assert call(capsys, "export", bundle, tmp_path / "theirs", "--to", to)[0] == 0
    code, _, err = call(capsys, "import", tmp_path / "theirs", tmp_path / "ours")
    assert (code, err) == (0, "")
    back, texts = align.load(tmp_path / "ours"), ["red heart", "a green bar and a blue ring"]
    assert torch.allclose(back.encode_text(texts), model.encode_text(texts), atol=1e-5)
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    assert torch.allclose(back.encode_image(pixels), model.encode_image(pixels), atol=1e-5)
    assert torch.equal(back.logit_scale, model.logit_scale)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere", "out"], "nowhere: there is no such folder; name open_clip:NAME@TAG, hf:"),
        (["mine", "out"], "mine: holds no model that is known; name open_clip:NAME@TAG"),
        (["bundle", "out"], "bundle is a bundle already"),
        (["graphs", "out"], "graphs was exported to ONNX, which is not read"),
        (["open_clip:ViT-B-32@x", "bundle"], "bundle holds a model; choose another folder, or set"),
        (["open_clip:ViT-B-32@x", "mine", "--overwrite"], "mine holds something other than"),
        (["open_clip:ViT-B-32@x", "other", "--overwrite"], "other holds a model for hf, which a b"),
        (["open_clip:ViT-B-32@x", "noted", "--overwrite"], "noted holds notes.txt, which is no "),
        (["theirs", "theirs", "--overwrite"], "theirs is the model itself"),
    ],
)
def test_mistakes_of_import_are_one_line_and_change_nothing(
    arguments, says, reader, bundle, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    for name, file, text in (
        ("mine", "letters.txt", "x"),
        ("graphs", "config.json", '{"format": "onnx"}'),
        ("theirs", "config.json", '{"model_type": "clip"}'),
    ):
        Path(name).mkdir()
        (Path(name) / file).write_text(text)
    held(Path("other"), '{"model_type": "clip"}')
    held(Path("noted"), '{"format": 2, "model": {}}', "notes.txt")
    before = content(tmp_path)
    code, out, err = call(capsys, "import", *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1
    assert reader == []
    assert content(tmp_path) == before


def test_import_replaces_a_bundle_where_it_is_told_to(reader, capsys, tmp_path):
    save(tiny_model(seed=3), tmp_path / "out")
    before = fingerprint(tmp_path / "out")
    assert call(capsys, "import", "hf:a/b", tmp_path / "out", "--overwrite")[0] == 0
    assert fingerprint(tmp_path / "out") != before


def test_a_link_is_no_part_of_a_model_and_results_are(bundle, tmp_path):
    (bundle / "results.json").write_text("{}")
    interop.refuse_to_replace(bundle, "bundle", overwrite=True)
    (tmp_path / "elsewhere").mkdir()
    (bundle / "tokenizer" / "merges.txt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"bundle holds tokenizer/merges\.txt, which is no part"):
        interop.refuse_to_replace(bundle, "bundle", overwrite=True)


def test_of_every_format_it_is_known_which_files_it_writes():
    assert interop.FILES.keys() == {"bundle", *interop.EXPORTS}


def test_models_of_others_are_loaded_where_bundles_are(reader, model, tmp_path):
    for name, file, text in (
        ("one", "open_clip_config.json", "{}"),
        ("two", "config.json", '{"model_type": "siglip"}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
        assert align.load(tmp_path / name) is model
    assert align.load("open_clip:ViT-B-32@laion") is model
    assert align.load("hf:openai/clip") is model
    assert reader == [
        str(tmp_path / "one"), str(tmp_path / "two"), "ViT-B-32@laion", "openai/clip"
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"no bundle; `align import hf:a/b FOLDER` makes one"):
        fingerprint("hf:a/b")


def test_a_bundle_is_told_from_its_neighbours(bundle, tmp_path):
    assert interop.format_of(bundle) == "bundle"
    assert not interop.is_foreign(bundle)
    assert interop.format_of(tmp_path) is None
    assert interop.format_of("hub:a/b") is None
    assert interop.format_of(Path("hf:a")) is None
    (tmp_path / "config.json").write_text("[1]")
    assert interop.format_of(tmp_path) is None

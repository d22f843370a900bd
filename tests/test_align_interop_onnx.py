"""Graphs for onnxruntime: the same rows as ours, for any number of texts of any length."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from pairs_corpus import TINY_BERT, TINY_VIT, tiny_model
from PIL import Image
from torch import Tensor

from align import interop
from align.interop import onnx
from align.interop.agreement import Agreement, compare
from align.interop.onnx import write_onnx
from align.interop.onnx_readme import readme
from align.model import DualEncoder

LAYERS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
TEXT: dict[str, Any] = {**LAYERS, "max_position_embeddings": 16}
PICTURE: dict[str, Any] = {**LAYERS, "patch_size": 16}
OPEN_CLIP: dict[str, Any] = {"width": 32, "heads": 2, "layers": 2, "context_length": 16}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16}
VIT = {"image": "timm:vit_tiny_patch16_224", "image_options": TINY_VIT}


def of(image: dict[str, Any], text: str, **text_options: Any) -> dict[str, Any]:
    return {**image, "text": text, "text_options": text_options}


MODELS: dict[str, dict[str, Any]] = {
    "a timm ViT and BERT with a learned query": of(VIT, "hf:bert", **TINY_BERT, pooler="attention"),
    "CLIP's towers from Hugging Face": of(
        {"image": "hf:clip_vision_model", "image_options": PICTURE},
        "hf:clip_text_model",
        **TEXT,
        pooler="native",
    ),
    "SigLIP's towers from Hugging Face": of(
        {"image": "hf:siglip_vision_model", "image_options": PICTURE},
        "hf:siglip_text_model",
        **TEXT,
        pooler="native",
        projection_size=32,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "OpenCLIP's own towers": of(
        {
            "image": "open_clip:ViT-B-32",
            "image_options": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        },
        "open_clip:ViT-B-32",
        **OPEN_CLIP,
    ),
    "OpenCLIP's ResNet and a text tower that reads padding": of(
        {"image": "open_clip:RN50", "image_options": {"layers": [1, 1, 1, 1], "width": 8}},
        "open_clip:ViT-B-32",
        **OPEN_CLIP,
        no_causal_mask=True,
        pool_type="last",
    ),
    "RoBERTa's greatest": of(
        VIT, "hf:roberta", **{**TEXT, "max_position_embeddings": 20}, pooler="max"
    ),
    "BERT's first token": of(VIT, "hf:bert", **TINY_BERT, pooler="cls", attention="eager"),
    "BERT's own pooler": of(VIT, "hf:bert", **TINY_BERT, pooler="native"),
    "GPT-2's last token": of(VIT, "hf:gpt2", **GPT, pooler="last"),
    "Qwen 2's last token": of(VIT, "hf:qwen2", **TEXT, num_key_value_heads=1, pooler="last"),
}  # fmt: skip


def texts(model: DualEncoder, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Ids as a tokenizer gives them: an end behind each text, then padding."""
    generator = torch.Generator().manual_seed(100 * rows + tokens)
    lengths = torch.randint(min(2, tokens), tokens + 1, (rows, 1), generator=generator)
    lengths[0] = tokens
    places = torch.arange(tokens)[None]
    ids = torch.randint(5, len(model.tokenizer), (rows, tokens), generator=generator)
    ids = torch.where(places == lengths - 1, torch.tensor(model.tokenizer.end_id or 0), ids)
    return ids.masked_fill(places >= lengths, model.tokenizer.pad_id), places < lengths


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@torch.no_grad()
def worst(model: DualEncoder, folder: Path, *, lengths=(1, 2, 3, 9, 16)) -> float:
    """The largest difference of any number between ours and onnxruntime's."""
    image, text = session(folder / "image.onnx"), session(folder / "text.onnx")
    apart = 0.0
    for rows in (1, 3, 7):
        generator = torch.Generator().manual_seed(rows)
        pixels = torch.randint(256, (rows, 3, 32, 32), generator=generator, dtype=torch.uint8)
        theirs = image.run(None, {"pixels": pixels.numpy()})[0]
        ours = model.project_image(model.image(pixels).pooled).numpy()
        assert theirs.dtype == np.float32
        assert theirs.shape == ours.shape
        apart = max(apart, float(np.abs(theirs - ours).max()))
        for tokens in lengths:
            ids, mask = texts(model, rows, tokens)
            theirs = text.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0]
            ours = model.project_text(model.text.pool(ids, mask)).numpy()
            assert theirs.shape == ours.shape
            apart = max(apart, float(np.abs(theirs - ours).max()))
    return apart


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[DualEncoder, Path]:
    model = tiny_model()
    model.logit_scale.fill_(3.0)
    model.logit_bias.fill_(-2.5)
    folder = tmp_path_factory.mktemp("onnx") / "out"
    write_onnx(model, folder)
    return model, folder


def test_onnxruntime_gives_our_rows_for_any_number_of_texts_of_any_length(exported):
    assert worst(*exported) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_towers_of_every_kind_become_graphs(name, tmp_path):
    model = tiny_model(**MODELS[name])
    write_onnx(model, tmp_path / "out")
    assert worst(model, tmp_path / "out") < 1e-5


def test_what_stands_behind_a_text_is_not_read(exported):
    model, folder = exported
    ids, mask = texts(model, 3, 6)
    graph = session(folder / "text.onnx")
    clean = graph.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0]
    dirty = torch.where(mask, ids, torch.tensor(7))
    again = graph.run(None, {"ids": dirty.numpy(), "mask": mask.numpy()})[0]
    np.testing.assert_array_equal(clean, again)


def test_the_configuration_says_what_it_takes(exported):
    model, folder = exported
    config = json.loads((folder / "config.json").read_text())
    for side in ("image", "text"):
        graph = session(folder / config[side]["file"])
        assert [one.name for one in graph.get_inputs()] == config[side]["inputs"]
        assert [one.name for one in graph.get_outputs()] == [config[side]["output"]]
        assert graph.get_inputs()[0].shape[0] == "batch"
    assert session(folder / "text.onnx").get_inputs()[0].shape == ["batch", "tokens"]
    assert config["image"]["size"] == 32
    assert config["image"]["fit"] == "crop"
    assert config["text"]["context_length"] == 16
    assert config["text"]["clean"] == "none"
    assert config["text"]["pad_id"] == model.tokenizer.pad_id
    assert config["text"]["pad_token"] == "[PAD]"
    assert config["dim"] == 16
    assert config["logit_scale"] == pytest.approx(np.exp(3.0))
    assert config["logit_bias"] == -2.5
    assert isinstance(config["opset"], int)


@pytest.mark.parametrize(
    ("clean", "fit", "bias"),
    [
        ("none", "crop", 0.0),
        ("whitespace", "squash", -1.0),
        ("lower", "crop", 0.0),
        ("canonicalize", "squash", 0.0),
    ],
)
def test_the_code_of_the_readme_runs_and_gives_our_probabilities(
    clean, fit, bias, exported, tmp_path, monkeypatch, capsys
):
    """The graphs are those of one model; what differs is all around them."""
    model, folder = exported
    model = tiny_model()
    model.logit_bias.fill_(bias)
    model.tokenizer.clean = clean
    model.config = replace(model.config, fit=fit)
    rows = np.arange(0, 240, 5, dtype=np.uint8)[:, None, None]
    picture = Image.fromarray(np.tile(rows, (1, 80, 3)))
    code = re.findall(r"```python\n(.*?)```", readme(model), re.DOTALL)[0]
    labels = ["A red  heart,", "blue &amp; green_square", "corner"]
    code = code.replace('["a red square", "a blue circle"]', repr(labels))
    code = code.replace('Image.new("RGB", (640, 480), "red")', "given")
    for path in folder.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(folder)).parent.mkdir(exist_ok=True)
            (tmp_path / path.relative_to(folder)).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"logit_scale": float(model.logit_scale.exp()), "logit_bias": bias}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    exec(code, {"given": picture})
    said = eval(capsys.readouterr().out)
    logits = model.logits(model.encode_image([picture]), model.encode_text(labels))
    ours = logits.sigmoid() if bias else logits.softmax(dim=1)
    assert list(said) == labels
    assert list(said.values()) == pytest.approx(ours[0].tolist(), abs=2e-3)


@pytest.mark.slow
def test_weights_that_no_graph_can_hold_lie_beside_it(monkeypatch, tmp_path):
    limit = "torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD"
    monkeypatch.setattr(limit, 100)
    model = tiny_model()
    write_onnx(model, tmp_path / "made")
    (tmp_path / "made").rename(tmp_path / "moved")
    names = {path.name for path in (tmp_path / "moved").iterdir()}
    assert {"image.onnx", "image.onnx.data", "text.onnx", "text.onnx.data"} <= names
    assert worst(model, tmp_path / "moved", lengths=(5,)) < 1e-5


def test_graphs_tell_nothing_of_the_machine_they_were_made_on(exported):
    _, folder = exported
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for trace in (b"site-packages", b".py", str(Path.home()).encode() + b"/"):
                assert trace not in content, path


@pytest.mark.slow
def test_a_model_in_another_precision_and_in_training_is_exported_as_it_evaluates(tmp_path):
    model = tiny_model(text_options={**TINY_BERT, "hidden_dropout_prob": 0.5}).bfloat16().train()
    write_onnx(model, tmp_path / "out")
    assert model.training
    assert model.image_projection.weight.dtype == torch.bfloat16  # pyright: ignore
    assert worst(model.float().eval(), tmp_path / "out", lengths=(5,)) < 1e-5


@pytest.mark.slow
def test_the_exporter_is_quiet(capfd, tmp_path, caplog):
    write_onnx(tiny_model(**MODELS["OpenCLIP's own towers"]), tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []


def test_a_missing_package_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ValueError, match=r'onnxscript .*pip install "clip-align\[onnx\]"'):
        write_onnx(tiny_model(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_the_exporter_cannot_follow_is_one_line_and_leaves_nothing(monkeypatch, tmp_path):
    model = tiny_model()
    encode = model.text.encode

    def reads_numbers(ids, mask):
        return encode(ids[:, : int(mask.sum())], mask[:, : int(mask.sum())])

    monkeypatch.setattr(model.text, "encode", reads_numbers)
    with pytest.raises(ValueError, match="cannot follow the text tower") as caught:
        write_onnx(model, tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_comparison_sees_another_model(exported):
    model, folder = exported

    def compared(model: DualEncoder) -> Agreement:
        found = compare(model, folder, to="onnx")
        assert found is not None
        return found

    assert compared(model).holds
    other = tiny_model(seed=1)
    other.logit_scale.fill_(3.0)
    assert not compared(other).holds
    other = tiny_model()
    other.logit_scale.fill_(3.0)  # and no bias
    assert compared(other).difference == pytest.approx(2.5 / np.exp(3.0), abs=1e-4)


def test_an_exported_folder_is_known_and_not_read(exported):
    _, folder = exported
    assert interop.format_of(folder) == "onnx"
    with pytest.raises(ValueError, match="exported to ONNX, which is not read"):
        interop.read_foreign(folder)

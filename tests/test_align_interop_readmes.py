"""READMEs of exports to OpenCLIP and transformers: their code runs in the folder and is right."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_align_interop_huggingface import CLIP, SIGLIP, ours
from test_align_interop_open_clip import TINY_BERT, TINY_TOWERS, our_model

from align.interop.agreement import Agreement
from align.interop.huggingface import write_huggingface
from align.interop.open_clip import write_open_clip
from align.interop.torch_readmes import PATHS, moving
from align.model import DualEncoder, Tower

LABELS = ["a red square", "a blue circle"]


def probabilities(folder: Path, monkeypatch: Any, capsys: Any) -> dict[str, float]:
    """What the code prints where it is run as it stands."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(code, {})
    return eval(capsys.readouterr().out)


def expected(model: DualEncoder) -> dict[str, float]:
    red = Image.new("RGB", (640, 480), "red")
    with torch.no_grad():
        logits = model.logits(model.encode_image([red]), model.encode_text(LABELS))[0]
    rows = logits.sigmoid() if model.logit_bias.any() else logits.softmax(dim=0)
    return dict(zip(LABELS, rows.tolist(), strict=True))


OPEN_CLIP_TEXT = {"layers": 1, "width": 32, "heads": 2, "context_length": 20}
FOR_OPEN_CLIP: dict[str, tuple[str, dict[str, Any], str, float]] = {
    "its own": ("open_clip:ViT-B-32", OPEN_CLIP_TEXT, "crop", 0.0),
    "a text tower of Hugging Face's, a bias": ("hf:bert", TINY_BERT, "squash", -1.5),
}


@pytest.mark.parametrize("name", FOR_OPEN_CLIP)
def test_open_clip_s_readme_runs_where_it_stands(name, tmp_path, monkeypatch, capsys):
    text, options, fit, bias = FOR_OPEN_CLIP[name]
    image = "open_clip:ViT-B-32"
    both = {"image": TINY_TOWERS[image], "text": options}
    model = our_model(image, text, options=both, fit=fit)
    model.logit_bias.fill_(bias)
    model.logit_scale.fill_(3.0)
    write_open_clip(model, tmp_path / "out")
    said = (tmp_path / "out" / "README.md").read_text()
    assert ("differ slightly" in said) == (fit == "crop")
    assert ("`model_cfg.text_cfg.hf_model_name`" in said) == (text == "hf:bert")
    found = probabilities(tmp_path / "out", monkeypatch, capsys)
    assert found == pytest.approx(expected(model), abs=1e-4)


FOR_HUGGINGFACE: dict[str, tuple[tuple[Tower, Tower], str, float]] = {
    "CLIP": (CLIP, "crop", 0.0),
    "Siglip": (SIGLIP, "squash", -1.5),
}


@pytest.mark.parametrize("family", FOR_HUGGINGFACE)
def test_hugging_face_s_readme_runs_where_it_stands(family, tmp_path, monkeypatch, capsys):
    towers, fit, bias = FOR_HUGGINGFACE[family]
    model = ours(*towers, dim=24, fit=fit)
    model.logit_bias.fill_(bias)
    model.logit_scale.fill_(3.0)
    write_huggingface(model, tmp_path / "out")
    said = (tmp_path / "out" / "README.md").read_text()
    assert f"# {family}Model, " in said
    assert ("differ slightly" in said) == (fit == "crop")
    found = probabilities(tmp_path / "out", monkeypatch, capsys)
    assert found == pytest.approx(expected(model), abs=1e-4)


def test_a_moved_folder_of_open_clip_s_opens_when_the_named_key_is_corrected(tmp_path):
    import json

    import open_clip

    options = {"image": TINY_TOWERS["timm:resnet10t"], "text": TINY_BERT}
    write_open_clip(our_model("timm:resnet10t", "hf:bert", options=options), tmp_path / "out")
    here = (tmp_path / "out").rename(tmp_path / "moved")
    path = here / "open_clip_config.json"
    config = json.loads(path.read_text())
    for name in PATHS:
        assert (here / name).is_dir()
        key = re.findall(r"`(model_cfg\.[\w.]+)`", moving(name))[0]
        _, section, last = key.split(".")
        told = config["model_cfg"][section][last]
        assert told.endswith(str(tmp_path / "out" / name))
        config["model_cfg"][section][last] = told.replace(str(tmp_path / "out"), str(here))
    path.write_text(json.dumps(config))
    open_clip.create_model(f"local-dir:{here}")


def test_export_says_what_a_move_takes(tmp_path, monkeypatch, capsys):
    from pipelines import export
    from pipelines.schemas import ExportConfig

    model = our_model("timm:resnet10t", "hf:bert", options={"text": TINY_BERT})

    def write(model: DualEncoder, folder: Path, **_: Any) -> Agreement:
        (folder / "text").mkdir(parents=True)
        return Agreement(0.0)

    monkeypatch.setattr(export, "load", lambda _: model)
    monkeypatch.setattr(export, "export", write)
    for to, said in (("open_clip", True), ("hf", False)):
        out = tmp_path / to
        assert export.run(ExportConfig(bundle="bundle", out=out, to=to, overwrite=False)) == 0
        assert (f"note: {moving('text')}" in capsys.readouterr().out.splitlines()) is said

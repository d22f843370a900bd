"""How to open exports in OpenCLIP and transformers: READMEs whose code runs as it stands."""

from collections.abc import Sequence

from align.model import DualEncoder


def open_clip_readme(model: DualEncoder, folders: Sequence[str], *, note: str = "") -> str:
    """The README.md of a folder of OpenCLIP's.

    Its code prints, when it is run in that folder, which label fits a picture.

    Args:
        model: what was exported.
        folders: those of `PATHS` that were written.
        note: which texts become other tokens there, if there are any.
    """
    notes = [_FIT_NOTES[model.config.fit], *(moving(name) for name in folders), note]
    return _OPEN_CLIP.format(
        **_said(model),
        bias=" + model.logit_bias" if model.logit_bias.any() else "",
        notes="".join(f"\n{one}\n" for one in notes if one),
    )


def huggingface_readme(model: DualEncoder, family: str, *, note: str = "") -> str:
    """The README.md of a folder of transformers'.

    Its code prints, when it is run in that folder, which label fits a picture.

    Args:
        model: what was exported.
        family: `CLIP`, `Siglip` or `VisionTextDualEncoder`.
        note: which texts become other tokens there, if there are any.
    """
    notes = [_PRECISION, _FIT_NOTES[model.config.fit], note]
    return _HUGGINGFACE.format(
        **_said(model),
        family=family,
        padding='padding="max_length"' if family == "Siglip" else "padding=True",
        notes="".join(f"\n{one}\n" for one in notes if one),
    )


PATHS = {"text": "text_cfg.hf_model_name", "image": "vision_cfg.timm_model_name"}
"""Folders inside one of OpenCLIP's, and the keys that name them."""


def moving(name: str) -> str:
    """What is to be done where a folder of OpenCLIP's with a folder in it is moved.

    OpenCLIP takes such a path as it stands, from wherever it runs, so it has to be a full one.

    Args:
        name: a key of `PATHS`.
    """
    return (
        f"`model_cfg.{PATHS[name]}` in `open_clip_config.json` is the full path of the folder "
        f"`{name}`: correct it there where this folder is moved."
    )


def _said(model: DualEncoder) -> dict[str, object]:
    return {
        "image": model.image.name,
        "text": model.text.name,
        "fit": {"crop": "its central square", "squash": "squeezed into a square"}[model.config.fit],
        "size": model.config.image_size,
        "end": "logits.sigmoid()" if model.logit_bias.any() else "logits.softmax(dim=1)",
    }


_FIT_NOTES = {
    "crop": (
        "Equal pixels have equal logits. Pictures of other sizes are scaled and then cut here, cut "
        "and then scaled in Align, so that their pixels, and with them the logits, differ slightly."
    ),
    "squash": "",
}
_PRECISION = "Use fp32 or bf16. Small numbers that fp16 would lose can be part of the weights."
_OPEN_CLIP = """\
# A dual encoder for OpenCLIP, exported from Align

Image tower `{image}`, text tower `{text}`; a picture is {fit}, {size} px.

`pip install open_clip_torch`, then, in this folder:

```python
import open_clip
import torch
from PIL import Image

model, preprocess = open_clip.create_model_from_pretrained("local-dir:.")
tokenizer = open_clip.get_tokenizer("local-dir:.")
model.eval()

labels = ["a red square", "a blue circle"]
picture = Image.new("RGB", (640, 480), "red")  # or Image.open(...).convert("RGB")
with torch.no_grad():
    pictures = model.encode_image(preprocess(picture)[None], normalize=True)
    texts = model.encode_text(tokenizer(labels), normalize=True)
    logits = model.logit_scale.exp() * pictures @ texts.T{bias}
probabilities = {end}
print(dict(zip(labels, probabilities[0].tolist())))
```
{notes}"""
_HUGGINGFACE = """\
---
library_name: transformers
pipeline_tag: zero-shot-image-classification
---
# {family}Model, exported from Align

Image tower `{image}`, text tower `{text}`; a picture is {fit}, {size} px.

`pip install transformers torchvision pillow`, then, in this folder:

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, {family}Model

folder = "."
model = {family}Model.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
processor = AutoImageProcessor.from_pretrained(folder)

labels = ["a red square", "a blue circle"]
picture = Image.new("RGB", (640, 480), "red")  # or Image.open(...).convert("RGB")
texts = tokenizer(labels, {padding}, truncation=True, return_tensors="pt")
pictures = processor([picture], return_tensors="pt")
with torch.no_grad():
    logits = model(**texts, **pictures).logits_per_image
probabilities = {end}
print(dict(zip(labels, probabilities[0].tolist())))
```
{notes}"""

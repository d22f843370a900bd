"""How to use exported graphs: a README whose code runs as it stands, without torch."""

from align.interop.agreement import caveat
from align.model import DualEncoder


def readme(model: DualEncoder) -> str:
    """The README.md of a folder of graphs.

    Its code needs onnxruntime, tokenizers and Pillow, and prints which label fits a picture.
    """
    config = model.config
    end = "1 / (1 + np.exp(-logits))" if model.logit_bias.any() else _SOFTMAX
    code = _CODE.format(clean=_CLEAN[model.tokenizer.clean], fit=_FIT[config.fit], end=end)
    return _README.format(
        image=model.image.name,
        text=model.text.name,
        dim=config.dim,
        size=config.image_size,
        context_length=config.context_length,
        note=f"\n{note}\n" if (note := caveat(model, to="onnx")) else "",
        code=code,
    )


_README = """\
# A dual encoder as ONNX graphs

Pictures and texts become unit-length vectors of one space; their dot product says how well they
fit. The image tower is {image} on pictures of {size} px, the text tower {text} on up to
{context_length} tokens, the space has {dim} dimensions. Exported with Align; config.json has all
names and numbers.

`pip install onnxruntime tokenizers pillow`, then, in this folder:

```python
{code}```
{note}"""
_CODE = """\
import json
{clean[imports]}from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

config = json.loads(Path("config.json").read_text())
image, text = (onnxruntime.InferenceSession(f"{{side}}.onnx") for side in ("image", "text"))
tokenizer = Tokenizer.from_file("tokenizer/tokenizer.json")
tokenizer.enable_truncation(config["text"]["context_length"])
tokenizer.enable_padding(pad_id=config["text"]["pad_id"], pad_token=config["text"]["pad_token"])

labels = ["a red square", "a blue circle"]
texts = [{clean[code]} for label in labels]
encoded = tokenizer.encode_batch(texts)
ids = np.array([one.ids for one in encoded], np.int64)
mask = np.array([one.attention_mask for one in encoded], bool)
texts = text.run(None, {{"ids": ids, "mask": mask}})[0]

picture = Image.new("RGB", (640, 480), "red")  # or Image.open(...).convert("RGB")
side = config["image"]["size"]
{fit}
pixels = np.asarray(picture, np.uint8).transpose(2, 0, 1)[None]
pictures = image.run(None, {{"pixels": pixels}})[0]

logits = config["logit_scale"] * pictures @ texts.T + config["logit_bias"]
probabilities = {end}
print(dict(zip(labels, probabilities[0].tolist())))
"""
_SOFTMAX = "(raised := np.exp(logits - logits.max())) / raised.sum(axis=1, keepdims=True)"
_FIT = {
    "crop": (
        "short = min(picture.size)\n"
        "left, top = ((length - short) // 2 for length in picture.size)\n"
        "picture = picture.crop((left, top, left + short, top + short))\n"
        "picture = picture.resize((side, side), Image.Resampling.BICUBIC)"
    ),
    "squash": "picture = picture.resize((side, side), Image.Resampling.BICUBIC)",
}
_UNESCAPED = '" ".join(html.unescape(html.unescape(label)).split())'
_CLEAN = {
    "none": {"imports": "", "code": "label"},
    "whitespace": {"imports": "import html\n", "code": _UNESCAPED},
    "lower": {"imports": "import html\n", "code": f"{_UNESCAPED}.lower()"},
    "canonicalize": {
        "imports": "import html\nimport string\n",
        "code": (
            '" ".join(html.unescape(html.unescape(label)).replace("_", " ")'
            '.translate(str.maketrans("", "", string.punctuation)).lower().split())'
        ),
    },
}

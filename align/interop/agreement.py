"""Whether an exported model says what ours says, asked of the other library on the same inputs."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from align.model import DualEncoder

TEXTS = (
    "a",
    "a red heart",
    "two dogs asleep on the sand of a wide beach",
    "the old town by night with all its lamps lit and nobody in the narrow streets between "
    "houses of stone that have been there for as long as anybody can remember",
)
TOLERANCE = 1e-4
"""Of cosines: above the rounding of fp32 in deep towers, below what any mistake makes."""


@dataclass(frozen=True)
class Agreement:
    """How far the logits of two libraries are apart.

    Attributes:
        difference: the largest, absolute.
        tolerance: what rounding may do: `TOLERANCE` times the scale of the logits.
    """

    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the difference is rounding; what is no number is not."""
        return self.difference <= self.tolerance


def compare(model: DualEncoder, folder: Path | str, *, to: str, pictures: int = 3) -> Agreement:
    """Open an exported model with the other library and compare logits, pictures and texts in.

    Pictures are noise of the model's own size, texts are of several lengths; the other library
    reads both with the processors that were exported.

    Args:
        model: what was exported.
        folder: where it was.
        to: one of `OTHERS`.
        pictures: how many.

    Raises:
        ValueError: the other library is not installed.
    """
    function, needed = OTHERS[to]
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ValueError(f"{missing[0]} is not installed")
    side = model.config.image_size
    noise = np.random.default_rng(0).integers(0, 256, (pictures, side, side, 3), np.uint8)
    images = [Image.fromarray(one) for one in noise]
    ours = model.logits(model.encode_image(images).cpu(), model.encode_text(TEXTS).cpu())
    with torch.no_grad():
        theirs = function(Path(folder), images, TEXTS)
    scale = float(model.logit_scale.exp())
    return Agreement(float((ours.detach().cpu() - theirs).abs().max()), TOLERANCE * max(scale, 1.0))


def _onnx(
    folder: Path, images: Sequence[Image.Image], texts: Sequence[str]
) -> Float[Tensor, "images texts"]:
    import onnxruntime
    from tokenizers import Tokenizer

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    tokenizer.enable_truncation(config["text"]["context_length"])
    tokenizer.enable_padding(pad_id=config["text"]["pad_id"], pad_token=config["text"]["pad_token"])
    encoded = tokenizer.encode_batch(list(texts))
    given: dict[str, Any] = {
        "pixels": np.stack([np.asarray(image).transpose(2, 0, 1) for image in images]),
        "ids": np.array([one.ids for one in encoded], np.int64),
        "mask": np.array([one.attention_mask for one in encoded], bool),
    }
    rows = []
    for side in ("image", "text"):
        graph = onnxruntime.InferenceSession(
            folder / config[side]["file"], providers=["CPUExecutionProvider"]
        )
        inputs = {name: given[name] for name in config[side]["inputs"]}
        rows.append(torch.from_numpy(graph.run(None, inputs)[0]))
    return config["logit_scale"] * rows[0] @ rows[1].T + config["logit_bias"]


def _open_clip(
    folder: Path, images: Sequence[Image.Image], texts: Sequence[str]
) -> Float[Tensor, "images texts"]:
    import open_clip

    name = f"local-dir:{folder}"
    model: Any = open_clip.create_model_and_transforms(name)
    model, processor = model[0].eval(), model[2]
    pixels = torch.stack([processor(image) for image in images])
    ids = open_clip.get_tokenizer(name)(list(texts))
    rows = (model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True))
    bias = getattr(model, "logit_bias", None)
    return model.logit_scale.exp() * rows[0] @ rows[1].T + (0 if bias is None else bias)


def _huggingface(
    folder: Path, images: Sequence[Image.Image], texts: Sequence[str]
) -> Float[Tensor, "images texts"]:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    pixels = processor(list(images), return_tensors="pt")["pixel_values"]
    padding = "max_length" if model.config.model_type.startswith("siglip") else True
    tokens = tokenizer(list(texts), padding=padding, truncation=True, return_tensors="pt")
    return model(pixel_values=pixels, **tokens).logits_per_image


_Logits = Callable[[Path, Sequence[Image.Image], Sequence[str]], Tensor]
OTHERS: dict[str, tuple[_Logits, tuple[str, ...]]] = {
    "open_clip": (_open_clip, ("open_clip",)),
    "hf": (_huggingface, ("transformers",)),
    "onnx": (_onnx, ("onnxruntime", "tokenizers")),
}
"""How each library is asked, and the packages that it takes."""

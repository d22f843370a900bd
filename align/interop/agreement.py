"""Whether an exported model says what ours says, asked of the other library on the same inputs."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from align.encoders.tower import refusals
from align.model import DualEncoder

PLAIN = (
    "a",
    "a red heart",
    "two dogs asleep on the sand of a wide beach",
    "the old town by night with all its lamps lit and nobody in the narrow streets between "
    "houses of stone that have been there for as long as anybody can remember",
)
MARKED = (
    "An OLD map, with notes in the margin: N 52\N{DEGREE SIGN}!",
    "under_score (and)  spaces\n",
)
SPOILT = ("salt &amp; pepper", "a caf\u00c3\u00a9 &lt;at night&gt;")
"""An HTML entity; UTF-8 that was once read as Latin-1."""
TOLERANCE = 1e-5
"""Of cosines. An operation of fp32 rounds by up to 6e-8: cosines of small towers and of a ViT-B/32
differ by 1e-7 to 2e-7, and this leaves deeper ones fifty times that. The smallest mistake that was
tried, GELU's tanh formula for the exact one in a tower of two layers, makes 2e-5 to 1e-4."""
_PICTURES = 4


@dataclass(frozen=True)
class Agreement:
    """How far two libraries are apart.

    Attributes:
        difference: the largest, absolute, of logits divided by their scale: of cosines.
        tolerance: what rounding may do.
    """

    difference: float
    tolerance: float = TOLERANCE

    @property
    def holds(self) -> bool:
        """Whether the difference is rounding; what is no number is not."""
        return self.difference <= self.tolerance


_Logits = Callable[[Path, Sequence[Image.Image], Sequence[str]], Tensor]


@dataclass(frozen=True)
class Other:
    """Another library: how it is asked, and which texts it reads as we do.

    Attributes:
        title: its name.
        logits: what it makes of an exported folder, pictures and texts.
        packages: that it takes.
        uncleaned: texts that it cuts into the same tokens where our tokenizer cleans nothing.
        cleaned: those where ours does.
        caveats: what it does to other texts, by our tokenizer's way to clean.
    """

    title: str
    logits: _Logits
    packages: tuple[str, ...]
    uncleaned: tuple[str, ...] = PLAIN
    cleaned: tuple[str, ...] = PLAIN
    caveats: dict[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.packages if find_spec(name) is None]


def other(to: str) -> Other:
    """The library of a format.

    Raises:
        ValueError: nothing says how it is asked.
    """
    if to not in OTHERS:
        raise ValueError(f"{to!r} is no format that can be compared; known: {', '.join(OTHERS)}")
    return OTHERS[to]


def caveat(model: DualEncoder, *, to: str) -> str:
    """Which texts the other library cuts into other tokens than the model, if there are any."""
    return other(to).caveats.get(model.tokenizer.clean, "")


def compare(model: DualEncoder, folder: Path | str, *, to: str) -> Agreement | None:
    """Open an exported model with the other library and compare, pictures and texts in.

    Pictures are noise of the model's own size, texts are of several lengths, with upper case,
    punctuation, HTML entities and broken encodings where the same tokens are promised; the other
    library reads both with the processors that were exported. Both sides compute on the CPU in
    fp32.

    Args:
        model: what was exported.
        folder: where it was.
        to: one of `OTHERS`.

    Returns:
        None where the other library is not installed.

    Raises:
        ValueError: the other library cannot open the folder, or nothing says how it is asked.
    """
    library = other(to)
    if library.missing:
        return None
    model = in_fp32(model)
    side = model.config.image_size
    noise = np.random.default_rng(0).integers(0, 256, (_PICTURES, side, side, 3), np.uint8)
    images = [Image.fromarray(one) for one in noise]
    texts = library.uncleaned if model.tokenizer.clean == "none" else library.cleaned
    ours = model.logits(model.encode_image(images), model.encode_text(texts))
    opened = f"{library.title} cannot use {model.image.name} with {model.text.name} as exported"
    with torch.no_grad(), refusals(opened):
        theirs = library.logits(Path(folder), images, texts)
    if theirs.shape != ours.shape:
        raise ValueError(f"{opened}: its logits are of the shape {[*theirs.shape]}")
    apart = (ours - theirs).abs().max() / model.logit_scale.exp()
    return Agreement(float(apart))


def check(model: DualEncoder, folder: Path | str, *, to: str) -> Agreement | None:
    """`compare`, for a writer that is about to put a folder in its place.

    Raises:
        ValueError: the two do not agree, or what `compare` raises.
    """
    found = compare(model, folder, to=to)
    if found is not None and not found.holds:
        raise ValueError(
            f"{model.image.name} with {model.text.name} gives other logits in {other(to).title} "
            f"(cosines differ by {found.difference:.2g}, rounding makes up to "
            f"{found.tolerance:g}); nothing was written"
        )
    return found


def in_fp32(model: DualEncoder) -> DualEncoder:
    """The model in fp32 on the CPU: itself, or a copy."""
    weights = [weight for weight in model.state_dict().values() if weight.is_floating_point()]
    if all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights):
        return model
    return copy.deepcopy(model).cpu().float()


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


OTHERS: dict[str, Other] = {
    "open_clip": Other(
        "OpenCLIP",
        _open_clip,
        ("open_clip",),
        uncleaned=(*PLAIN, MARKED[0]),
        cleaned=(*PLAIN, *MARKED, *SPOILT),
        caveats={
            "none": "OpenCLIP repairs broken encodings, resolves HTML entities (`&amp;`) and joins "
            "spaces in every text, Align does not with this tokenizer: texts with any of these "
            "give other tokens."
        },
    ),
    "hf": Other(
        "transformers",
        _huggingface,
        ("transformers",),
        uncleaned=(*PLAIN, *MARKED, *SPOILT),
        cleaned=(*PLAIN, *MARKED),
        caveats=dict.fromkeys(
            ("whitespace", "lower", "canonicalize"),
            "Align also repairs broken encodings and resolves HTML entities (`&amp;`) before it "
            "cuts texts into tokens; a tokenizer file cannot say that: texts with either give "
            "other tokens.",
        ),
    ),
    "onnx": Other(
        "onnxruntime",
        _onnx,
        ("onnxruntime", "tokenizers"),
        uncleaned=(*PLAIN, *MARKED, *SPOILT),
        caveats=dict.fromkeys(
            ("whitespace", "lower", "canonicalize"),
            "The tokenizer's file does not clean texts, the code in README.md does; where texts "
            "may hold broken encodings, repair them first: `ftfy.fix_text(text)`.",
        ),
    ),
}
"""How each library is asked, by the format that it opens."""

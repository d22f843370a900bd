"""Tiny image-text data sets, models and configurations for the tests of `align` and `pipelines`."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from align.model import DualEncoder, DualEncoderConfig, Tower
from align.tokenizer import Tokenizer
from shards.manifest import Manifest
from shards.packing import pack
from shards.sources import Record

COLOURS = {
    "red": (220, 30, 40),
    "green": (20, 160, 60),
    "blue": (30, 60, 220),
    "yellow": (240, 210, 20),
    "purple": (130, 40, 170),
    "black": (10, 10, 10),
}
SHAPES = ("circle", "square", "bar", "cross", "dot", "ring", "corner", "frame")
TINY_BERT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TINY_RESNET: dict[str, Any] = {"channels": [16, 16, 32, 32], "layers": [1, 1, 1, 1]}
TINY_VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 16,
    "embed_dim": 24,
    "depth": 1,
    "num_heads": 2,
}


def picture(colour: str, shape: str, *, side: int = 32) -> Image.Image:
    """A shape in a colour on white."""
    image = Image.new("RGB", (side, side), "white")
    draw, ink = ImageDraw.Draw(image), COLOURS[colour]
    low, high, thick = side // 5, side - side // 5, side // 6
    match shape:
        case "circle":
            draw.ellipse((low, low, high, high), fill=ink)
        case "square":
            draw.rectangle((low, low, high, high), fill=ink)
        case "bar":
            draw.rectangle((low, side // 2 - thick // 2, high, side // 2 + thick // 2), fill=ink)
        case "cross":
            draw.line((low, low, high, high), fill=ink, width=thick)
            draw.line((low, high, high, low), fill=ink, width=thick)
        case "dot":
            draw.ellipse((2 * low, 2 * low, 3 * low, 3 * low), fill=ink)
        case "ring":
            draw.ellipse((low, low, high, high), outline=ink, width=thick // 2)
        case "corner":
            draw.polygon(((low, low), (high, low), (low, high)), fill=ink)
        case "frame":
            draw.rectangle((low, low, high, high), outline=ink, width=thick // 2)
    return image


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """A picture as the bytes of a file."""
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def write_pairs(folder: Path, *, shards: int = 4, hand: str = "one") -> Manifest:
    """All colours in all shapes, 48 samples; `hand` tells one data set from another."""
    records = [
        Record(
            key=f"{hand}-{colour}-{shape}",
            image=encoded(picture(colour, shape, side=32 if hand == "one" else 40)),
            caption=f"{colour} {shape}",
            fields={"colour": colour, "shape": shape, "hand": hand},
        )
        for colour in COLOURS
        for shape in SHAPES
    ]
    return pack(records, folder, samples_per_shard=-(-len(records) // shards), shuffle_seed=0)


def tiny_tokenizer(*, context_length: int = 16) -> Tokenizer:
    """A vocabulary of the captions."""
    texts = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    return Tokenizer.train(texts, vocabulary_size=120, context_length=context_length)


def tiny_model(
    *,
    image: str = "timm:resnet10t",
    text: str = "hf:bert",
    image_options: dict[str, Any] | None = None,
    text_options: dict[str, Any] | None = None,
    context_length: int = 16,
    seed: int = 0,
) -> DualEncoder:
    """A model of some thousand weights, stirred so that nothing in it is zero or alike."""
    import torch

    torch.manual_seed(seed)
    config = DualEncoderConfig(
        image=Tower(image, TINY_RESNET if image_options is None else image_options),
        text=Tower(text, TINY_BERT if text_options is None else text_options),
        dim=16,
        image_size=32,
        context_length=context_length,
    )
    model = DualEncoder(config, tiny_tokenizer(context_length=context_length))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def tiny_pretrain(data: Path, out: Path, /, **changes: Any) -> dict[str, Any]:
    """The values of a pretraining run of seconds; `a__b=value` changes `a.b`."""
    values: dict[str, Any] = {
        "data": str(data),
        "out": str(out),
        "model": {
            "image": {"name": "timm:resnet10t", "options": dict(TINY_RESNET)},
            "text": {"name": "hf:bert", "options": {**TINY_BERT, "hidden_dropout_prob": 0.1}},
            "dim": 16,
            "image_size": 32,
            "context_length": 16,
        },
        "tokenizer": {"vocabulary_size": 120},
        "optimizer": {"learning_rate": 2e-3, "average": 0.5},
        "augment": {"decode_size": 32, "crop": None},
        "batch_size": 16,
        "lanes": 4,
        "samples": 192,
        "precision": "fp32",
        "workers": 0,
        "log_every": 1,
        "save_every": 64,
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return values


def random_pixels(height: int, width: int, channels: int, *, seed: int = 0) -> np.ndarray:
    """Noise with some structure: a resize that differs anywhere shows."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (-(-height // 5), -(-width // 5), channels), np.uint8)
    fine = np.kron(coarse, np.ones((5, 5, 1), np.uint8))[:height, :width]
    return fine ^ generator.integers(0, 32, fine.shape, np.uint8)

"""Both towers as ONNX graphs, for onnxruntime and whatever else runs them, without torch.

folder/
  image.onnx    pixels, uint8 [batch, 3, size, size]          -> embeddings, fp32 [batch, dim]
  text.onnx     ids, int64 and mask, bool [batch, tokens]     -> embeddings, fp32 [batch, dim]
  tokenizer/    Hugging Face's format; the package `tokenizers` opens its tokenizer.json
  config.json   sizes, names, padding, temperature
  README.md     how to use them

Normalisation of pixels, projection and unit length are inside the graphs, and so is what a tower
wants behind the end of a text. The number of rows is free, and so is that of tokens.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from align.folders import damage, whole_folder
from align.interop.agreement import Agreement, check, in_fp32
from align.interop.onnx_readme import readme
from align.model import DualEncoder

EMBEDDINGS = "embeddings"
_NEEDED = ("onnx", "onnxscript")
_EXAMPLES = 2
"""Rows that are traced; one would be taken for a size that never changes."""


class ImageGraph(nn.Module):
    """Pixels to unit-length rows: the image half of a model."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Embed a batch of pictures."""
        tower = self.model.image
        normalised = (pixels.float() - tower.pixel_mean) / tower.pixel_std
        return self.model.project_image(tower.encode(normalised).pooled)


class TextGraph(nn.Module):
    """Token ids to unit-length rows: the text half of a model, the whole batch in one chunk.

    Which texts make a chunk depends on their lengths, which a graph cannot follow; the results are
    the same (`TextTower`).
    """

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch dim"]:
        """Embed a batch of texts."""
        tower = self.model.text
        if tower.pad_id is not None:
            ids = ids.masked_fill(~mask, tower.pad_id)
        if tower.fixed_length is not None:
            missing = tower.fixed_length - ids.shape[1]
            ids = F.pad(ids, (0, missing), value=tower.pad_id or 0)
            mask = F.pad(mask, (0, missing), value=False)
        return self.model.project_text(tower.encode(ids, mask).pooled)


def write_onnx(model: DualEncoder, folder: Path | str) -> Agreement | None:
    """Write both towers as ONNX graphs, with all it takes to use them; whole or not at all.

    Weights of more than 2 GB, which a graph cannot hold, lie in files of their own beside it.

    Args:
        model: of any towers; stays as it is.
        folder: replaced if it is there.

    Returns:
        What onnxruntime makes of it; None where it is not installed.

    Raises:
        ValueError: torch's exporter is not installed, or cannot follow a tower, or onnxruntime
            makes something else of it.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ValueError(f'{missing[0]} is not installed: pip install "clip-align[onnx]"')
    training = model.training
    try:
        plain = in_fp32(model)
        with whole_folder(folder) as beside:
            side, tokens = model.config.image_size, min(8, model.config.context_length)
            pixels = torch.zeros(_EXAMPLES, 3, side, side, dtype=torch.uint8)
            ids = torch.zeros(_EXAMPLES, tokens, dtype=torch.int64)
            # A text tower may look for the end of a text, so the examples have one.
            ids[:, -1] = model.tokenizer.end_id or 0
            mask = torch.ones(_EXAMPLES, tokens, dtype=torch.bool)
            opset = _write(ImageGraph(plain).eval(), "image", (pixels,), beside)
            _write(TextGraph(plain).eval(), "text", (ids, mask), beside)
            model.tokenizer.save(beside / "tokenizer")
            config = {**_config(plain), "opset": opset}
            (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            (beside / "README.md").write_text(readme(plain), encoding="utf-8")
            return check(plain, beside, to="onnx")
    finally:
        model.train(training)


def _config(model: DualEncoder) -> dict[str, Any]:
    """What someone without this package has to know."""
    backend = model.tokenizer.backend
    return {
        "format": "onnx",
        "image": {
            "file": "image.onnx",
            "inputs": list(_INPUTS["image"]),
            "output": EMBEDDINGS,
            "size": model.config.image_size,
            "fit": model.config.fit,
            "tower": model.image.name,
        },
        "text": {
            "file": "text.onnx",
            "inputs": list(_INPUTS["text"]),
            "output": EMBEDDINGS,
            "context_length": model.config.context_length,
            "clean": model.tokenizer.clean,
            "pad_id": model.tokenizer.pad_id,
            "pad_token": backend.pad_token,
            "tower": model.text.name,
        },
        "dim": model.config.dim,
        "logit_scale": float(model.logit_scale.exp()),
        "logit_bias": float(model.logit_bias),
    }


_INPUTS = {"image": ("pixels",), "text": ("ids", "mask")}


def _write(graph: nn.Module, side: str, example: Sequence[Tensor], folder: Path) -> int:
    """Write one graph; returns the version of ONNX's operators that it needs."""
    # Two inputs share their axes; those of the second follow: to name one twice brings a warning.
    named = {"image": ({0: "batch"},), "text": ({0: "batch", 1: "tokens"}, _FOLLOWS)}[side]
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                graph,
                tuple(example),
                input_names=_INPUTS[side],
                output_names=[EMBEDDINGS],
                dynamic_shapes=named,
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        _forget_sources(program.model)
        program.save(folder / f"{side}.onnx")
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        why = damage(_cause(error))
        raise ValueError(f"torch's exporter cannot follow the {side} tower: {why}") from error
    return program.model.opset_imports[""]


_FOLLOWS = dict.fromkeys((0, 1), torch.export.Dim.AUTO)


def _cause(error: BaseException) -> Exception:
    """What an error goes back to: the exporter's own message is a page on how to report it."""
    while error.__cause__ is not None:
        error = error.__cause__
    assert isinstance(error, Exception)
    return error


def _forget_sources(model: Any) -> None:
    """Remove what the exporter notes of where it ran: lines of code, with paths, for every node."""
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for graph in graphs:
        for node in graph.all_nodes():
            node.metadata_props.clear()
    model.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's optimiser from telling of every step that it leaves out."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

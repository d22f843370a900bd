"""A preset's model in numbers, counted on tensors without memory; `benchmarks.scaling` adds up.

Operations are those of `torch.utils.flop_counter`, attention included. What a forward pass keeps
for its backward pass is what autograd is given to save, with matrix products in bf16; what the loss
keeps is not in it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from math import prod

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from align.encoders.chunks import plan_chunks
from align.model import DualEncoder
from align.tokenizer import Tokenizer
from benchmarks.encode import caption_lengths
from pipelines.cli import parse
from pipelines.schemas import PretrainConfig
from pipelines.training import make_model

SHORT, LONG = 16, 64
"""Tokens of the captions that are counted; others are reckoned from them."""


@dataclass(frozen=True)
class Counts:
    """A preset's model in numbers; operations and bytes are those of one sample, forwards.

    Attributes:
        parameters: of both towers and the maps into the space.
        text_parameters: of the text tower.
        dim: width of the space.
        image_flops: of a picture.
        image_held: bytes kept for the backward pass.
        image_blocks: parts of the tower that gradient checkpointing computes one at a time.
        image_between: bytes that lie between two of them.
        text_flops: of a caption of 16 and of 64 tokens.
        text_held: likewise.
        text_blocks: as of the image tower.
        text_between: of one token.
        fixed_length: tokens of every caption, where padding is attended to.
        context: tokens of the longest caption.
    """

    parameters: int
    text_parameters: int
    dim: int
    image_flops: float
    image_held: float
    image_blocks: int
    image_between: float
    text_flops: tuple[float, float]
    text_held: tuple[float, float]
    text_blocks: int
    text_between: float
    fixed_length: int | None
    context: int

    def tokens(self, chunks: int, rows: int = 1024) -> float:
        """Tokens that are computed for a caption, padding included."""
        if self.fixed_length is not None:
            return self.fixed_length
        lengths = caption_lengths(rows, self.context).tolist()
        return sum(len(one.rows) * one.length for one in plan_chunks(lengths, chunks)) / rows


def between(values: tuple[float, float], tokens: float) -> float:
    """What a caption of so many tokens takes: `a n + b n^2` through two that were counted."""
    short, long = values[0] / SHORT, values[1] / LONG
    return tokens * (short + (long - short) * (tokens - SHORT) / (LONG - SHORT))


@cache
def count(preset: str) -> Counts:
    """Count a preset's model without any memory for it."""
    config = parse("pretrain", ["data", "out", f"preset={preset}"])
    assert isinstance(config, PretrainConfig)
    context = config.model.context_length
    if config.tokenizer.name == "clip":
        tokenizer = Tokenizer.clip(context_length=context)
    else:  # trained on captions: taken to be full
        size = config.tokenizer.vocabulary_size
        given = ["data", "out", f"preset={preset}", f"model.text.options.vocab_size={size}"]
        config = parse("pretrain", given)
        assert isinstance(config, PretrainConfig)
        tokenizer = Tokenizer.train(["a caption"], vocabulary_size=99, context_length=context)
    with torch.device("meta"):
        model = make_model(config.model, tokenizer)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _count(model.to_empty(device="cpu").train(), config)


def _count(model: DualEncoder, config: PretrainConfig) -> Counts:
    side = config.model.image_size
    shapes: list[Tensor] = []

    def image(rows: int) -> Tensor:
        features = model.image.encode(torch.zeros(rows, 3, side, side))
        shapes[:] = [features.tokens]
        return features.pooled

    def text(rows: int, tokens: int) -> Tensor:
        ids = torch.ones(rows, tokens, dtype=torch.long)
        features = model.text.encode(ids, ids.bool())
        shapes[:] = [features.tokens]
        return features.pooled

    image_flops, image_held = _flops(image), _held(image)
    image_between = 4.0 * prod(shapes[0].shape[1:])
    # A shorter context is counted as far as it goes, and goes on like that.
    short, long = (min(length, config.model.context_length) for length in (SHORT, LONG))

    def both(ask: Callable[[Callable[[int], Tensor]], float]) -> tuple[float, float]:
        first, second = (ask(partial(text, tokens=tokens)) for tokens in (short, long))
        return first * SHORT / short, second * LONG / long

    text_flops, text_held = both(_flops), both(_held)
    return Counts(
        parameters=sum(one.numel() for one in model.parameters()),
        text_parameters=sum(one.numel() for one in model.text.parameters()),
        dim=config.model.dim,
        image_flops=image_flops,
        image_held=image_held,
        image_blocks=len(model.image.layer_groups()),
        image_between=image_between,
        text_flops=text_flops,
        text_held=text_held,
        text_blocks=len(model.text.layer_groups()),
        text_between=4.0 * shapes[0].shape[-1],
        fixed_length=model.text.fixed_length,
        context=config.model.context_length,
    )


def _flops(forward: Callable[[int], Tensor]) -> float:
    """Operations of one row, two for each multiplication and addition."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward(2)
    return counter.get_total_flops() / 2


def _held(forward: Callable[[int], Tensor]) -> float:
    """Bytes that each further row has the forward pass keep, with matrices in bf16."""

    def bytes_of(rows: int) -> int:
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16):
                forward(rows)
            return sum(one.nbytes() for one in storages.values())

    return (bytes_of(8) - bytes_of(4)) / 4

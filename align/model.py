"""The dual encoder: two towers, two projections, one space."""

import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from align.encoders import build_image_tower, build_text_tower
from align.encoders.tower import Features, Vocabulary
from align.preprocess import FITS, check_pictures, preprocess_all
from align.tokenizer import TokenBatch, Tokenizer, check_texts


@dataclass(frozen=True)
class Tower:
    """Which tower to build, and how its width becomes that of the space.

    Attributes:
        name: prefixed, such as `timm:resnet50`; see `align.encoders`.
        options: of the library behind it.
        projection: one of `PROJECTIONS`.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    projection: str = "linear"


@dataclass(frozen=True)
class DualEncoderConfig:
    """All it takes to rebuild a `DualEncoder` without its weights.

    Attributes:
        image: the image tower.
        text: the text tower.
        dim: width of the aligned space.
        image_size: side of the square pictures that the image tower gets, in pixels.
        context_length: longest text, in tokens.
        fit: how a picture becomes square: `crop` (its central square) or `squash` (all of it).
    """

    image: Tower
    text: Tower
    dim: int = 512
    image_size: int = 224
    context_length: int = 77
    fit: str = "crop"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DualEncoderConfig":
        """Back from `to_dict`.

        Raises:
            ValueError: a key is missing or unknown, or a value is not of its type, or no size.
        """
        _check_fields(values, cls, "model")
        for key in ("image", "text"):
            _check_fields(values[key], Tower, f"model.{key}")
        for key, most in _SIZES.items():
            if not 0 < values.get(key, 1) <= most:
                raise ValueError(f"model.{key} is {values[key]}: it is from 1 to {most}")
        towers = {key: Tower(**values[key]) for key in ("image", "text")}
        return cls(**{**values, **towers})


_SIZES = {"dim": 2**16, "image_size": 2**13, "context_length": 2**20}
"""What nobody means to exceed: more is damage, and would be asked of memory first."""


def _check_fields(values: Any, kind: type, place: str) -> None:
    """See whether JSON values are what the fields of a dataclass take."""
    if not isinstance(values, dict):
        raise ValueError(f"{place} is {repr(values)[:40]}, and no table of keys")
    known = {one.name: one for one in fields(kind)}
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"{place} has an unknown key {unknown[0]!r}; known: {', '.join(known)}")
    for key, one in known.items():
        if key not in values:
            if one.default is MISSING and one.default_factory is MISSING:
                raise ValueError(f"{place} lacks {key!r}")
        elif isinstance(one.type, type) and issubclass(one.type, int | str):
            if type(values[key]) is not one.type:
                raise ValueError(
                    f"{place}.{key} is {repr(values[key])[:40]} ({type(values[key]).__name__}): "
                    f"it takes {'an integer' if one.type is int else 'a text'}"
                )
        elif not isinstance(values[key], dict):
            raise ValueError(f"{place}.{key} is {repr(values[key])[:40]}, and no table of keys")


class DualEncoder(nn.Module):
    """Two towers and one space: `normalise(U f(picture))` and `normalise(V g(text))`.

    Radford et al. 2021 (arXiv 2103.00020, figure 3), whose projections are linear, without bias.

    Args:
        config: what to build.
        tokenizer: needed by `encode_text`; a text tower from scratch takes over its vocabulary.

    Attributes:
        logit_scale: what similarities are multiplied by is `exp(logit_scale)`: the inverse
            temperature that training ended with.
        logit_bias: what is added then (Zhai et al. 2023); zero unless trained with it.

    Raises:
        ValueError: an unknown tower or option, or a tokenizer that does not fit the text tower or
            cuts texts elsewhere than `config.context_length`.
    """

    logit_scale: Tensor
    logit_bias: Tensor

    def __init__(self, config: DualEncoderConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        if config.fit not in FITS:
            raise ValueError(f"unknown fit {config.fit!r}; known: {', '.join(FITS)}")
        self.config = config
        self.tokenizer = tokenizer
        self.image = build_image_tower(
            config.image.name, **{"image_size": config.image_size, **config.image.options}
        )
        if self.image.picture_size not in {None, config.image_size}:
            raise ValueError(
                f"the image tower {config.image.name} was built for pictures of "
                f"{self.image.picture_size} px, not for image_size {config.image_size}: choose "
                f"model.image_size={self.image.picture_size}, or another tower"
            )
        vocabulary = Vocabulary(len(tokenizer), tokenizer.pad_id, tokenizer.end_id)
        self.text = build_text_tower(config.text.name, vocabulary=vocabulary, **config.text.options)
        self._check_tokenizer()
        self.image_projection = _projection(config.image, self.image.width, config.dim)
        self.text_projection = _projection(config.text, self.text.width, config.dim)
        for part in (*self.image_projection.modules(), *self.text_projection.modules()):
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=part.in_features**-0.5)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        self.register_buffer("logit_scale", torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("logit_bias", torch.tensor(0.0))

    def _check_tokenizer(self) -> None:
        tokenizer, text, name = self.tokenizer, self.text, self.config.text.name
        if len(tokenizer) > text.vocabulary_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} entries, the text tower "
                f"{name} embeds {text.vocabulary_size}: set "
                "model.text.options.vocab_size or choose the tower's own tokenizer"
            )
        if tokenizer.context_length != self.config.context_length:
            raise ValueError(
                f"the tokenizer cuts texts to {tokenizer.context_length} tokens, the model's "
                f"context_length is {self.config.context_length}: make them equal, or texts would "
                "be cut otherwise once the model is saved and loaded"
            )
        if self.config.context_length > text.max_length:
            raise ValueError(
                f"context_length {self.config.context_length} is more than the text tower "
                f"{name} can take ({text.max_length} positions): set "
                f"model.context_length={text.max_length}"
            )
        if text.pad_is_an_entry and tokenizer.pad_id != text.pad_id:
            raise ValueError(
                f"the tokenizer pads with id {tokenizer.pad_id}, the text tower {name} takes id "
                f"{text.pad_id} for padding: choose the tower's own tokenizer"
            )
        if text.end_id is not None and tokenizer.end_id != text.end_id:
            raise ValueError(
                f"the text tower {name} looks for the end of a text by id {text.end_id}, the "
                f"tokenizer ends texts with {tokenizer.end_id}: choose the tower's own tokenizer"
            )

    def train(self, mode: bool = True) -> "DualEncoder":
        """Set the mode of training; what is frozen stays in evaluation.

        A frozen tower neither drops anything nor moves the statistics of its normalisation, nor
        does a frozen block of a tower of which the rest learns.
        """
        super().train(mode)
        if mode and not all(parameter.requires_grad for parameter in self.parameters()):
            for part in self.modules():
                within = [parameter.requires_grad for parameter in part.parameters()]
                if within and not any(within):
                    part.eval()
        return self

    def image_features(self, images: UInt8[Tensor, "batch 3 height width"]) -> Features:
        """The image tower's pooled features and tokens, before projection."""
        return self.image(images)

    def text_features(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> Features:
        """The text tower's pooled features and tokens, before projection.

        Rows do not depend on each other, nor on how far they are padded.
        """
        return self.text(ids, mask)

    def project_image(self, pooled: Float[Tensor, "batch width"]) -> Float[Tensor, "batch dim"]:
        """Into the aligned space, unit length, fp32 (fp64 where the weights are)."""
        return _unit_length(self.image_projection(pooled))

    def project_text(self, pooled: Float[Tensor, "batch width"]) -> Float[Tensor, "batch dim"]:
        """Into the aligned space, unit length, fp32 (fp64 where the weights are)."""
        return _unit_length(self.text_projection(pooled))

    def forward(
        self,
        images: UInt8[Tensor, "batch 3 height width"],
        ids: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
        """Embed a batch of pairs: (pictures, texts)."""
        return self.project_image(self.image(images).pooled), self.project_text(
            self.text.pool(ids, mask)
        )

    def logits(
        self, image: Float[Tensor, "images dim"], text: Float[Tensor, "texts dim"]
    ) -> Float[Tensor, "images texts"]:
        """What a softmax over texts (or a sigmoid, for sigmoid losses) makes probabilities of."""
        scale, bias = self.logit_scale.to(image.device), self.logit_bias.to(image.device)
        return scale.exp() * image @ text.T + bias

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.logit_scale.device

    def preprocess(
        self, images: Sequence[Image.Image | Path | str]
    ) -> UInt8[Tensor, "batch 3 size size"]:
        """Pictures, or files of them, as the image tower wants them; see `align.preprocess`.

        Raises:
            ValueError: something is no picture: its place or file, and what is wrong.
            OSError: there is no such file.
        """
        return preprocess_all(images, self.config.image_size, fit=self.config.fit)

    def tokenize(self, texts: Sequence[str], *, context_length: int | None = None) -> TokenBatch:
        """Texts as the text tower wants them; cut at a shorter length, where one is given."""
        return self.tokenizer(texts, context_length=context_length)

    @torch.no_grad()
    def encode_image(
        self,
        images: Sequence[Image.Image | Path | str] | UInt8[Tensor, "rows ..."],
        *,
        batch_size: int = 256,
        image_size: int | None = None,
    ) -> Float[Tensor, "rows dim"]:
        """Embed pictures: unit-length rows, fp32, on the CPU.

        Args:
            images: PIL pictures of any size and mode, files of pictures, or a uint8 tensor of the
                image size.
            batch_size: pictures at a time.
            image_size: of towers that take several; None = the model's.

        Raises:
            ValueError: one picture, something that is none, tensors of another type or size, or
                no pictures at a time.
        """
        if isinstance(images, Image.Image | Path | str):
            raise ValueError("encode_image takes a list of pictures, not one picture")
        size, fit = image_size or self.config.image_size, self.config.fit
        if isinstance(images, Tensor):
            _check_pixels(images, size)
        else:
            check_pictures(images)
        _check_batch(batch_size)
        with _evaluating(self):
            rows = [torch.empty(0, self.config.dim)]
            for start in range(0, len(images), batch_size):
                part = images[start : start + batch_size]
                if isinstance(part, Tensor):
                    pixels = part
                else:
                    pixels = preprocess_all(part, size, fit=fit, first=start)
                rows.append(self.project_image(self.image(pixels.to(self.device)).pooled).cpu())
            return torch.cat(rows)

    @torch.no_grad()
    def encode_text(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = 256,
        context_length: int | None = None,
    ) -> Float[Tensor, "rows dim"]:
        """Embed texts: unit-length rows, fp32, on the CPU.

        Args:
            texts: any strings; what exceeds the context length is cut, and `truncated` of what
                `tokenize` returns tells of how many.
            batch_size: texts at a time.
            context_length: cut them shorter than the model does, in tokens.

        Raises:
            ValueError: one string, something that is no text, or no texts at a time.
        """
        check_texts(texts)
        _check_batch(batch_size)
        with _evaluating(self):
            rows = [torch.empty(0, self.config.dim)]
            for start in range(0, len(texts), batch_size):
                part = texts[start : start + batch_size]
                tokens = self.tokenize(part, context_length=context_length).to(self.device)
                pooled = self.text.pool(tokens.ids, tokens.mask)
                rows.append(self.project_text(pooled).cpu())
            return torch.cat(rows)


def _unit_length(rows: Tensor) -> Tensor:
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)


def _check_pixels(images: Tensor, size: int) -> None:
    if images.dtype != torch.uint8:
        raise ValueError(
            f"encode_image takes tensors of uint8 (0 to 255), not {images.dtype}: the tower scales "
            "and normalises by itself, so give it the pixels as they are"
        )
    if images.shape[1:] != (3, size, size):
        raise ValueError(
            f"encode_image takes tensors of [rows, 3, {size}, {size}], not {[*images.shape]}; "
            "pictures of other sizes come as a list"
        )


def _check_batch(size: int) -> None:
    if size < 1:
        raise ValueError(f"batch_size={size} must be at least 1")


def _linear(width: int, dim: int) -> nn.Module:
    return nn.Linear(width, dim, bias=False)


def _affine(width: int, dim: int) -> nn.Module:
    return nn.Linear(width, dim)


def _perceptron(width: int, dim: int) -> nn.Module:
    hidden = (width + dim) // 2
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False)
    )


def _no_projection(width: int, dim: int) -> nn.Module:
    if width != dim:
        raise ValueError(
            f"projection none needs a tower as wide as the space: {width} is not dim {dim}"
        )
    return nn.Identity()


def _projection(tower: Tower, width: int, dim: int) -> nn.Module:
    if tower.projection not in PROJECTIONS:
        raise ValueError(
            f"unknown projection {tower.projection!r}; known: {', '.join(PROJECTIONS)}"
        )
    return PROJECTIONS[tower.projection](width, dim)


PROJECTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": _linear,
    "affine": _affine,
    "mlp": _perceptron,
    "none": _no_projection,
}
"""From a tower's width to that of the space: a matrix, with a bias, with one hidden layer (as
OpenCLIP's for Hugging Face towers), or nothing."""


class _evaluating:  # noqa: N801 - reads as a statement where it is used
    """Switch a module to evaluation for a `with` block, then back to what it was."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.was_training = self.module.training
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        self.module.train(self.was_training)

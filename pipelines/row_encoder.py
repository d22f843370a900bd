"""Batches of shards through a model into rows of a table: pictures, texts, and both fused."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional as F

from align.fusion.head import FusionHead, Modality
from align.model import DualEncoder
from shards.batch import Batch

STAGES = {"read": "read and decode", "image": "image", "text": "text", "write": "write"}
"""Where the time of an embedding goes."""


class RowEncoder:
    """Encodes batches, and keeps count of where the time goes.

    A row is the model's own `encode_image` or `encode_text`, with the head's `forward` for fused
    rows, or the unit-length mean of the two where there is no head. Texts that are equal within a
    batch are encoded once.

    Args:
        model: moved to the device.
        rows: of `image`, `text`, `fused`.
        head: of this model; None = the mean.
        device: where to compute.
        precision: `fp32`, or `bf16` for matrix products.

    Attributes:
        seconds: spent on `image` and on `text` since they were last cleared.
        cut: texts that were longer than the model's context since then.
    """

    def __init__(
        self,
        model: DualEncoder,
        rows: Sequence[str],
        *,
        head: FusionHead | None = None,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.head = head.to(self.device).eval() if head is not None else None
        self.rows = tuple(rows)
        self.precision = precision
        self.seconds: dict[str, float] = {}
        self.cut = 0

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within it batches can be encoded; weights are rounded once for all of them."""
        lower = self.precision == "bf16"
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=lower),
        ):
            yield

    def encode(self, batch: Batch) -> dict[str, Float32[np.ndarray, "rows dim"]]:
        """The rows of a batch, by kind."""
        clock, both = _Clock(self.device), "fused" in self.rows
        images = self._images(batch) if both or "image" in self.rows else None
        clock.mark("image")
        texts = self._texts(batch.captions) if both or "text" in self.rows else None
        found = {}
        if images is not None and "image" in self.rows:
            found["image"] = images.pooled
        if texts is not None and "text" in self.rows:
            found["text"] = texts.pooled
        if images is not None and texts is not None and both:
            found["fused"] = self._fused(images, texts)
        clock.mark("text")
        embedded = {name: rows.float().cpu().numpy() for name, rows in found.items()}
        for stage, spent in clock.seconds().items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
        return embedded

    @property
    def _wants_tokens(self) -> bool:
        return self.head is not None and self.head.needs == "tokens"

    def _images(self, batch: Batch) -> Modality:
        features = self.model.image_features(batch.images.to(self.device))
        pooled = self.model.project_image(features.pooled)
        if not self._wants_tokens:
            return Modality(pooled)
        return Modality(pooled, features.tokens.float(), features.mask)

    def _texts(self, captions: Sequence[str]) -> Modality:
        place = {text: row for row, text in enumerate(dict.fromkeys(captions))}
        distinct = list(place)
        tokens = self.model.tokenize(distinct)
        if tokens.truncated:
            full = (tokens.mask.sum(dim=1) == self.model.tokenizer.context_length).tolist()
            long = [text for text, is_full in zip(distinct, full, strict=True) if is_full]
            cut = {text for text in long if self.model.tokenize([text]).truncated}
            self.cut += sum(caption in cut for caption in captions)
        tokens = tokens.to(self.device)
        rows = torch.tensor([place[caption] for caption in captions], device=self.device)
        if not self._wants_tokens:
            pooled = self.model.project_text(self.model.text.pool(tokens.ids, tokens.mask))
            return Modality(pooled[rows])
        features = self.model.text_features(tokens.ids, tokens.mask)
        pooled = self.model.project_text(features.pooled)
        return Modality(pooled[rows], features.tokens.float()[rows], features.mask[rows])

    def _fused(self, images: Modality, texts: Modality) -> Float[Tensor, "rows dim"]:
        if self.head is None:
            return F.normalize(images.pooled + texts.pooled, dim=-1)
        return self.head(images, texts).embedding


class _Clock:
    """Where the time of one batch goes; a GPU's own, which works on while the host prepares."""

    def __init__(self, device: torch.device) -> None:
        self._started = time.perf_counter()
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def mark(self, stage: str) -> None:
        """All since the last mark was this stage."""
        self._marks.append((stage, self._now()))

    def seconds(self) -> dict[str, float]:
        """The time by stage; call it when the results are there."""
        apart = [
            (stage, before.elapsed_time(now) if self._on_gpu else now - before)
            for (_, before), (stage, now) in pairwise(self._marks)
        ]
        whole = time.perf_counter() - self._started
        scale = whole / max(sum(spent for _, spent in apart), 1e-9)
        return {stage: spent * scale for stage, spent in apart}

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def precision_for(asked: str, device: torch.device | str) -> str:
    """The precision that `auto` stands for on a device: bf16 where it has products of its own."""
    if asked != "auto":
        return asked
    kind = torch.device(device).type
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        native = kind == "cpu" and bool(capabilities.get("amx_bf16"))
    return "bf16" if native else "fp32"

"""InfoNCE: the contrastive loss of CLIP, with any number of positives a row."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from align.gather import gather_rows, logsumexp_over_ranks
from align.losses.loss import ContrastiveLoss
from align.losses.tiles import (
    Gradients,
    Positives,
    Tiles,
    in_full_precision,
    refuse_second_derivative,
)


class InfoNCE(ContrastiveLoss):
    r"""Symmetric InfoNCE with a learnable temperature and any number of positives a row.

    With similarities $s_{ij} = e^{t}\, x_i \cdot y_j$ over all pairs of the global batch of $N$,
    and $P(i)$ the columns that are right for row $i$,

    $$L = \frac{1}{2N} \sum_i \Big[ \frac{-1}{|P(i)|} \sum_{p \in P(i)}
        \log \frac{e^{s_{ip}}}{\sum_j e^{s_{ij}}} \Big] + \text{the same over columns}.$$

    With one positive a row this is CLIP's loss (Radford et al. 2021, arXiv 2103.00020, figure 3);
    with several it is the supervised form (Khosla et al. 2020, arXiv 2004.11362, equation 2;
    UniCL, Yang et al. 2022, arXiv 2204.03610): two captions of one concept are not each other's
    negatives.

    Memory grows with $N$, not with $N^2$: similarities are computed tile by tile, once for both
    directions in the forward pass and once more in the backward pass, in fp32 or better, which
    makes four products of matrices in all where the plain way has six. The gradient cannot be
    derived a second time.

    Every process gives its own rows and returns its share of the loss times the number of
    processes, so that averaging gradients over processes, as data-parallel training does, gives
    the gradient of the loss of the whole batch: weights and temperature alike. A process compares
    its own images with the texts of all, so that texts and their gradients travel and images do
    not: of $R$ processes with $n$ rows of $d$ numbers, each receives $4 (R-1) n d$ bytes forwards
    and as many backwards, and sums over columns of $16 R n$ bytes at most; 29 MB each way and
    0.3 MB for 8 processes with 2048 rows of 512.

    Args:
        temperature: initial $e^{-t}$.
        min_temperature: the learned temperature never falls below.
        label_smoothing: share of each row's target spread evenly over all columns.

    Example:
        >>> loss = InfoNCE()(images, texts)                      # row i belongs to row i
        >>> loss = InfoNCE()(images, texts, labels)              # equal label = right
    """

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        min_temperature: float = 0.01,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(temperature=temperature, min_temperature=min_temperature)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"InfoNCE needs 0 <= label_smoothing < 1, got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def forward(
        self,
        image: Float[Tensor, "batch dim"],
        text: Float[Tensor, "batch dim"],
        labels: Int[Tensor, " batch"] | None = None,
        samples: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of the global batch, in nats; see `ContrastiveLoss.forward`."""
        del samples
        self.refuse_uneven(image, text, labels)
        with torch.autocast(image.device.type, enabled=False):
            image, text = in_full_precision(image, text)
            return _InfoNCE.apply(  # pyright: ignore[reportReturnType]
                image,
                gather_rows(text),
                self.scale().to(image.dtype),
                Positives(len(image), labels),
                self.label_smoothing,
            )


@dataclass(frozen=True)
class LogSums:
    """Logarithms of the sums of exponentials over rows and over columns.

    Attributes:
        of_rows: natural logarithms, over this process's columns and all others'.
        of_columns: likewise, over this process's rows only.
        shift: what may be subtracted from any similarity so that one exponential serves both its
            row and its column; None = there is no such number.
    """

    of_rows: Float[Tensor, " rows"]
    of_columns: Float[Tensor, " columns"]
    shift: Float[Tensor, ""] | None


# Exponentials neither overflow nor vanish up to 87 in fp32, and 708 in fp64. This leaves room above
# for sums of many terms, and below for terms that may vanish beside a sum that has not.
_REACH = {torch.float32: 60.0, torch.float64: 600.0}


def log_sums(tiles: Tiles) -> LogSums:
    r"""$\log \sum_j e^{s_{ij}}$ for every row and $\log \sum_i e^{s_{ij}}$ for every column.

    One exponential serves both where no similarity is further than a float reaches above a common
    shift, and no row or column lies wholly further below: as good as always, since for unit rows at
    scale 100 it takes a row whose nearest column has a cosine under -0.2. Otherwise every row and
    column has a maximum of its own.
    """
    reach = _REACH[tiles.rows.dtype]
    lengths = [torch.linalg.vector_norm(one, dim=1).max() for one in (tiles.rows, tiles.columns)]
    shift = (tiles.scale * lengths[0] * lengths[1] - reach).clamp(min=0)
    of_rows = tiles.rows.new_zeros(len(tiles.rows))
    of_columns = tiles.rows.new_zeros(len(tiles.columns))
    for here in tiles.row_spans:
        for there, tile, _ in tiles.beside(here):
            tile.sub_(shift).exp_()
            of_rows[here] += tile.sum(dim=1)
            of_columns[there] += tile.sum(dim=0)
    if torch.minimum(of_rows.min(), of_columns.min()).log() < -reach:
        return _separate_log_sums(tiles)
    return LogSums(of_rows.log_().add_(shift), of_columns.log_().add_(shift), shift)


def _separate_log_sums(tiles: Tiles) -> LogSums:
    of_rows = tiles.rows.new_full((len(tiles.rows),), -torch.inf)
    of_columns = tiles.rows.new_full((len(tiles.columns),), -torch.inf)
    for here in tiles.row_spans:
        for there, tile, _ in tiles.beside(here):
            of_rows[here] = torch.logaddexp(of_rows[here], tile.logsumexp(dim=1))
            of_columns[there] = torch.logaddexp(of_columns[there], tile.logsumexp(dim=0))
    return LogSums(of_rows, of_columns, None)


class _InfoNCE(torch.autograd.Function):
    """The loss of some rows against all columns; ranks hold the other rows."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, positives: Positives, smoothing: float
    ) -> Tensor:
        tiles = Tiles(image, text, scale)
        sums = log_sums(tiles)
        of_columns = logsumexp_over_ranks(sums.of_columns)
        target = positives.score(tiles, mean=True) * (1 - smoothing)
        if smoothing:
            target += smoothing * scale * (image.sum(dim=0) @ text.mean(dim=0))
        ctx.save_for_backward(image, text, scale, sums.of_rows, of_columns, sums.shift)
        ctx.positives, ctx.smoothing = positives, smoothing
        return ((sums.of_rows.sum() + of_columns[positives.own].sum()) / 2 - target) / len(image)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        image, text, scale, of_rows, of_columns, shift = ctx.saved_tensors
        rows, columns, own = ctx.needs_input_grad[:3]
        with torch.autocast(image.device.type, enabled=False):
            tiles = Tiles(image, text, scale)
            found = Gradients(tiles, rows=rows, columns=columns, scale=own)
            ctx.positives.subtract(found, share=1 - ctx.smoothing, mean=True)
            if ctx.smoothing:
                _subtract_evenly(found, ctx.smoothing)
            _add_shares(found, LogSums(of_rows, of_columns, shift))
            of_scale = found.finish(gradient * scale / len(image)) / scale
        return (
            found.of_rows if rows else None,
            found.of_columns,
            of_scale if own else None,
            None,
            None,
        )


def _add_shares(found: Gradients, sums: LogSums) -> None:
    """Half of each pair's share in its row's sum of exponentials, and half of that in its column's.

    Shares are exponentials themselves, and once more one serves for both.
    """
    tiles = found.tiles
    if sums.shift is None:
        for here in tiles.row_spans:
            for there, tile, room in tiles.beside(here):
                torch.sub(tile, sums.of_columns[there], out=room).exp_()
                tile.sub_(sums.of_rows[here, None]).exp_().add_(room).mul_(0.5)
                found.add(here, there, tile)
        return
    by_row = (sums.shift - sums.of_rows).exp_().mul_(0.5)[:, None]
    by_column = (sums.shift - sums.of_columns).exp_().mul_(0.5)
    for here in tiles.row_spans:
        for there, tile, room in tiles.beside(here):
            torch.add(by_row[here], by_column[there], out=room)
            found.add(here, there, tile.sub_(sums.shift).exp_().mul_(room))


def _subtract_evenly(found: Gradients, share: float) -> None:
    """What label smoothing gives to every pair alike."""
    tiles = found.tiles
    if found.of_rows is not None:
        found.of_rows.sub_(tiles.columns.mean(dim=0), alpha=share)
    if found.of_columns is not None:
        found.of_columns.sub_(tiles.rows.sum(dim=0), alpha=share / len(tiles.columns))

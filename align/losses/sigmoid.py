"""The sigmoid loss: every pair of the batch is a yes or a no by itself."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from align.gather import gather_rows
from align.losses.loss import ContrastiveLoss
from align.losses.tiles import (
    Gradients,
    Positives,
    Tiles,
    in_full_precision,
    refuse_second_derivative,
)


class Sigmoid(ContrastiveLoss):
    r"""Pairwise sigmoid loss with a learnable temperature and a learnable bias.

    With $s_{ij} = e^{t}\, x_i \cdot y_j + b$ over all pairs of the global batch of $N$, and
    $z_{ij} = 1$ where row $i$ and column $j$ are right for each other, else $-1$,

    $$L = \frac{1}{N} \sum_{ij} \log\big(1 + e^{-z_{ij} s_{ij}}\big).$$

    As SigLIP has it (Zhai et al. 2023, arXiv 2303.15343, equation 1 and algorithm 1, whence the
    initial temperature and bias: at first nearly all pairs are taken for wrong, as they are). Where
    `InfoNCE` shares a row's target among several right columns, each of them is a yes of its own
    here.

    Memory grows with $N$, not with $N^2$: similarities are computed tile by tile, in fp32 or
    better, and gradients in the same pass, which makes three products of matrices in all. The
    gradient cannot be derived a second time.

    Every process gives its own rows and returns its share of the loss times the number of
    processes, so that averaging gradients over processes, as data-parallel training does, gives
    the gradient of the loss of the whole batch: weights, temperature and bias alike. Only texts and
    their gradients travel: of $R$ processes with $n$ rows of $d$ numbers, each receives
    $4 (R-1) n d$ bytes forwards and as many backwards; 29 MB each way for 8 processes with 2048
    rows of 512.

    Args:
        temperature: initial $e^{-t}$.
        min_temperature: the learned temperature never falls below.
        bias: initial $b$.

    Example:
        >>> loss = Sigmoid()(images, texts)                      # row i belongs to row i
        >>> loss = Sigmoid()(images, texts, labels)              # equal label = right
    """

    def __init__(
        self, *, temperature: float = 0.1, min_temperature: float = 0.005, bias: float = -10.0
    ) -> None:
        super().__init__(temperature=temperature, min_temperature=min_temperature)
        self.logit_bias = nn.Parameter(torch.tensor(float(bias)))

    def forward(
        self,
        image: Float[Tensor, "batch dim"],
        text: Float[Tensor, "batch dim"],
        labels: Int[Tensor, " batch"] | None = None,
        samples: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of the global batch, in nats; see `ContrastiveLoss.forward`."""
        del samples
        assert self.logit_bias is not None
        self.refuse_uneven(image, text, labels)
        with torch.autocast(image.device.type, enabled=False):
            image, text = in_full_precision(image, text)
            return _Sigmoid.apply(  # pyright: ignore[reportReturnType]
                image,
                gather_rows(text),
                self.scale().to(image.dtype),
                self.logit_bias.to(image.dtype),
                Positives(len(image), labels),
            )


class _Sigmoid(torch.autograd.Function):
    """The loss of some rows against all columns; ranks hold the other rows."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, positives: Positives
    ) -> Tensor:
        tiles = Tiles(image, text, scale)
        ctx.save_for_backward(image, text, scale, bias)
        ctx.positives = positives
        ctx.derived = None
        if any(ctx.needs_input_grad):
            total, ctx.derived = _derive(tiles, bias, positives, ctx.needs_input_grad)
        else:
            totals = tiles.rows.new_zeros(len(tiles.row_spans))
            for at, here in enumerate(tiles.row_spans):
                for _, tile, _ in tiles.beside(here):
                    totals[at] += F.softplus(tile.add_(bias)).sum()
            total = totals.sum()
        right = positives.score(tiles, mean=False) + bias * positives.pairs()
        return (total - right) / len(image)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        image, text, scale, bias = ctx.saved_tensors
        rows, _, own, own_bias = ctx.needs_input_grad[:4]
        with torch.autocast(image.device.type, enabled=False):
            # What the forward pass derived is handed over once, and not kept beside its multiple.
            derived, ctx.derived = ctx.derived, None
            if derived is None:
                tiles = Tiles(image, text, scale)
                _, derived = _derive(tiles, bias, ctx.positives, ctx.needs_input_grad)
            found, of_bias = derived
            of_scale = found.finish(gradient * scale / len(image)) / scale
            of_bias = gradient * of_bias / len(image)
        return (
            found.of_rows if rows else None,
            found.of_columns,
            of_scale if own else None,
            of_bias if own_bias else None,
            None,
        )


def _derive(
    tiles: Tiles, bias: Tensor, positives: Positives, wanted: tuple[bool, ...]
) -> tuple[Tensor, tuple[Gradients, Tensor]]:
    """The sum of log(1 + e^s); gradients of rows and columns, and of the bias, but for a factor."""
    found = Gradients(tiles, rows=wanted[0], columns=wanted[1], scale=wanted[2])
    positives.subtract(found, share=1.0, mean=False)
    # A sum for each row of tiles: one for all would lose more to rounding.
    totals, weights = tiles.rows.new_zeros(2, len(tiles.row_spans))
    for at, here in enumerate(tiles.row_spans):
        for there, tile, room in tiles.beside(here):
            torch.ops.aten.softplus.out(tile.add_(bias), out=room)
            totals[at] += room.sum()
            weights[at] += tile.sigmoid_().sum()
            found.add(here, there, tile)
    return totals.sum(), (found, weights.sum() - positives.pairs())

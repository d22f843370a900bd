"""Model and loss in one module, and a step of it in pieces that is exact.

A batch is worked through in pieces where its activations would not fit: first every piece is
embedded and forgotten, then the loss of all rows is derived with respect to the embeddings, then
every piece is embedded again and carries its share of that derivative home (gradient caching, Gao
et al. 2021, arXiv 2101.06983). The embeddings are 2 * rows * dim numbers; the activations are those
of one piece. Each piece has a seed of its own for what is drawn at random, the same both times.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from align.gather import gather_labels, gather_rows
from align.losses.loss import ContrastiveLoss
from align.model import DualEncoder

_SIMILARITIES_AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class Pairs:
    """Pictures and their captions, as the model takes them.

    Attributes:
        images: pictures.
        ids: token ids of their captions.
        mask: `True` on real tokens.
        labels: rows of equal label are right for each other.
        samples: ids of the samples.
    """

    images: UInt8[Tensor, "batch 3 height width"]
    ids: Int[Tensor, "batch tokens"]
    mask: Bool[Tensor, "batch tokens"]
    labels: Int[Tensor, " batch"]
    samples: Int[Tensor, " batch"]

    def piece(self, number: int, of: int) -> "Pairs":
        """Rows `number, number + of, ...`."""
        parts = (self.images, self.ids, self.mask, self.labels, self.samples)
        return Pairs(*(part[number::of] for part in parts))


@dataclass(frozen=True)
class Derivative:
    """What the loss of all rows says to those of one piece.

    Attributes:
        image: gradient with respect to the piece's rows.
        text: likewise.
        parameters: gradients of the loss's own parameters by name; told to one piece of all.
    """

    image: Float[Tensor, "batch dim"]
    text: Float[Tensor, "batch dim"]
    parameters: dict[str, Float[Tensor, ""]]


@dataclass(frozen=True)
class Rows:
    """Unit-length embeddings of pictures and of texts, and where asked for the loss of them."""

    image: Float[Tensor, "batch dim"]
    text: Float[Tensor, "batch dim"]
    loss: Float[Tensor, ""] | None = None


class ContrastiveObjective(nn.Module):
    """A batch of pairs in; its embeddings and something to derive out.

    All ways through it are calls of the module itself, so that what wraps it for distribution sees
    them: its parameters, the temperature among them, have their gradients averaged over processes.

    Args:
        model: the dual encoder.
        loss: of (image rows, text rows, labels, samples).
    """

    def __init__(self, model: DualEncoder, loss: ContrastiveLoss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        # What a loss keeps of every sample is large, and the same on all processes by itself.
        own = [f"loss.{name}" for name, _ in loss.named_buffers()]
        self._ddp_params_and_buffers_to_ignore = own

    def forward(
        self, pairs: Pairs, *, want_loss: bool = True, derivative: Derivative | None = None
    ) -> Rows:
        """Embeddings, and something to derive with respect to every parameter.

        Args:
            pairs: the batch, or a piece of it.
            want_loss: whether `pairs` is all there is, and its loss is wanted.
            derivative: what the loss of all pieces says to this one; `Rows.loss` is then the scalar
                with the very gradient that the loss has through these rows (and no loss at all).
        """
        image, text = self.model(pairs.images, pairs.ids, pairs.mask)
        if derivative is not None:
            return Rows(image, text, self._carried(image, text, derivative))
        if not want_loss:
            return Rows(image, text)
        return Rows(image, text, self.loss(image, text, pairs.labels, pairs.samples))

    def _carried(self, image: Tensor, text: Tensor, derivative: Derivative) -> Float[Tensor, ""]:
        with torch.autocast(image.device.type, enabled=False):
            total = (image.to(derivative.image.dtype) * derivative.image).sum()
            total = total + (text.to(derivative.text.dtype) * derivative.text).sum()
            own = dict(self.loss.named_parameters())
            for name, gradient in derivative.parameters.items():
                total = total + own[name] * gradient
        return total


@dataclass(frozen=True)
class StepOutput:
    """What a step found out: the loss (this process's share), and its rows.

    Attributes:
        loss: as `ContrastiveLoss` returns it, detached.
        image: embeddings of this process's rows, in the order of the pieces.
        text: likewise.
        labels: likewise.
    """

    loss: Float[Tensor, ""]
    image: Float[Tensor, "batch dim"]
    text: Float[Tensor, "batch dim"]
    labels: Int[Tensor, " batch"]

    def batch_accuracy(self) -> Float[Tensor, ""]:
        """Share of this process's pictures whose nearest text of the global batch is right.

        Every process must ask: texts and labels travel once more.
        """
        texts, labels = gather_rows(self.text), gather_labels(self.labels)
        rows = max(1, _SIMILARITIES_AT_A_TIME // len(texts))
        right = [
            labels[(image @ texts.T).argmax(dim=1)] == own
            for image, own in zip(self.image.split(rows), self.labels.split(rows), strict=True)
        ]
        return torch.cat(right).float().mean()


def derive(
    objective: ContrastiveObjective,
    pieces: Sequence[Pairs],
    *,
    seeds: Sequence[int],
    wrapped: Callable[..., Rows] | None = None,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    silence: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> StepOutput:
    """The loss of a batch given in pieces, and its gradient in every parameter's `.grad`.

    N processes with k pieces each give the loss and all gradients that one process gives with the
    N * k pieces, to rounding, whatever is drawn at random within a piece: loss and gradients are
    those of the whole global batch, temperature and bias included.

    With several processes each piece of a rank costs the rows' exchange once, not once per piece;
    gradients are exchanged once, with the last piece.

    Args:
        objective: the module itself.
        pieces: this process's rows; more than one costs a second forward pass of the towers.
        seeds: of what is drawn at random in each piece.
        wrapped: the module as it is called, such as its `DistributedDataParallel`; itself unless
            stated.
        backward: derives a scalar; may scale it.
        autocast: the precision that the towers run in.
        silence: within it, `wrapped` does not exchange gradients.
    """
    call = objective if wrapped is None else wrapped
    if len(pieces) == 1:
        torch.manual_seed(seeds[0])
        with autocast():
            rows = call(pieces[0])
        assert rows.loss is not None
        backward(rows.loss)
        return StepOutput(
            rows.loss.detach(), rows.image.detach(), rows.text.detach(), pieces[0].labels
        )
    parts: list[Rows] = []
    with torch.no_grad(), _kept(objective.model):
        for piece, seed in zip(pieces, seeds, strict=True):
            torch.manual_seed(seed)
            with autocast():
                parts.append(call(piece, want_loss=False))
    image = torch.cat([part.image for part in parts]).requires_grad_()
    text = torch.cat([part.text for part in parts]).requires_grad_()
    labels = torch.cat([piece.labels for piece in pieces])
    loss = objective.loss(image, text, labels, torch.cat([piece.samples for piece in pieces]))
    own = {name: one for name, one in objective.loss.named_parameters() if one.requires_grad}
    of_image, of_text, *of_own = torch.autograd.grad(loss, [image, text, *own.values()])
    sizes = [len(piece.labels) for piece in pieces]
    shares = zip(pieces, seeds, of_image.split(sizes), of_text.split(sizes), strict=True)
    for number, (piece, seed, image_share, text_share) in enumerate(shares):
        is_last = number == len(pieces) - 1
        share = Derivative(
            image_share, text_share, dict(zip(own, of_own, strict=True)) if is_last else {}
        )
        torch.manual_seed(seed)
        with nullcontext() if is_last else silence():
            with autocast():
                carried = call(piece, derivative=share).loss
            assert carried is not None
            backward(carried)
    return StepOutput(loss.detach(), image.detach(), text.detach(), labels)


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Has running statistics forget what they see: the same pieces come once more."""
    before = [buffer.clone() for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, was in zip(module.buffers(), before, strict=True):
            buffer.copy_(was)

"""The global contrastive loss: for small batches, which it compares with the whole data set."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.autograd.function import once_differentiable

from align.gather import gather_labels, gather_rows, world_size
from align.losses.loss import ContrastiveLoss

_NUMBERS_AT_A_TIME = 2**22
"""Similarities that exist at once: 16 MB in fp32."""
_MOST_VISITS = 255
"""What a byte counts to."""


@dataclass(frozen=True)
class _Learnt:
    """What a step learnt about its samples, those of all processes."""

    samples: Int[Tensor, " total"]
    log_means: Float[Tensor, "total 2"]
    visits: UInt8[Tensor, " total"]


class GlobalContrastive(ContrastiveLoss):
    r"""Robust global contrastive loss with one learnable temperature, for small batches.

    InfoNCE compares a pair with the rest of its batch; this compares it with the data set. For
    sample $i$ let $g_i$ be the mean over the texts of other labels in the global batch

    $$g_i = \frac{1}{|N(i)|} \sum_{j \in N(i)} e^{(x_i \cdot y_j - x_i \cdot y_i) / \tau},$$

    and $u_i \leftarrow (1 - \gamma_i)\, u_i + \gamma_i\, g_i$ its moving average over the sample's
    visits, an estimate of the same mean over the whole data set; $h_i$ and $v_i$ likewise for text
    $i$ and all pictures. Then

    $$L = \frac{\tau}{2N} \sum_i \big[ \log(\epsilon + u_i) + \log(\epsilon + v_i) \big]
        + \rho \tau.$$

    Its gradient takes what earlier batches left in $u$ for constant, and its scale from all of
    $u$: $\nabla g_i / (\epsilon + u_i)$ stands for the gradient of the logarithm, without
    $\gamma_i$. This is FastCLIP-v3 (Wei et al. 2024, arXiv 2407.01445, RGCL-g and algorithm 1),
    halved so that both directions are averaged as in `InfoNCE`; the estimators are those of SogCLR
    (Yuan et al. 2022, arXiv 2202.12387), the robust term is that of iSogCLR (Qiu et al. 2023, arXiv
    2305.11965): $\rho$ bounds how far the weights of the negatives may be from equal, as a
    Kullback-Leibler divergence, and $\tau$ is its multiplier. The loss can fall below zero.

    The inner rate falls along half a cosine over a sample's visits, as the authors' does over
    epochs: $\gamma_i = \gamma + (1 - \gamma)(1 + \cos(\pi e_i / E)) / 2$ after $e_i$ visits, and
    $\gamma$ from $E$ visits on. The first visit has rate 1: $u_i$ begins at its first value. Where
    it is 1 throughout the gradient is that of the batch alone.

    Rows of equal labels are never each other's negatives. A row without negatives counts zero and
    leaves its estimate as it was. A sample that is in a batch twice has the mean of both values.

    Estimators are kept as logarithms, since at low temperatures they leave the range of fp32; with
    the count of visits 9 bytes a sample, on the device of the loss: 9 MB a million. `forward`
    changes none of them; `commit` does. They are buffers, so checkpoints hold them, and are the
    same on every process. In evaluation the rate is 1 and nothing is kept.

    The matrix of all similarities never exists: rows are taken in slices whose similarities are
    computed again on the way back. Beside the rows themselves every process receives 24 bytes for
    each row of the others: label, id and two values.

    Args:
        samples: size of the data set; ids lie in 0 ... samples - 1.
        temperature: initial temperature.
        min_temperature: the learned temperature never falls below.
        gamma: rate of the moving averages in the end; 1 = nothing is remembered.
        gamma_visits: visits of a sample over which the rate falls from 1 to `gamma`; the authors
            advise half of the epochs.
        rho: greatest divergence; higher ends at a lower temperature. The authors take 6.5 for 2.7
            million samples and 8.5 for 9 million.
        eps: keeps pairs that are far from all others from mattering as much as the rest.

    Example:
        >>> loss = GlobalContrastive(samples=9_000)
        >>> loss(images, texts, labels, ids).backward()
        >>> loss.commit()                                # once the step was taken
    """

    keeps_samples: ClassVar[bool] = True
    image_log_mean: Float[Tensor, " samples"]
    text_log_mean: Float[Tensor, " samples"]
    visits: UInt8[Tensor, " samples"]

    def __init__(
        self,
        *,
        samples: int,
        temperature: float = 0.07,
        min_temperature: float = 0.01,
        gamma: float = 0.2,
        gamma_visits: int = 1,
        rho: float = 6.5,
        eps: float = 1e-14,
    ) -> None:
        super().__init__(temperature=temperature, min_temperature=min_temperature)
        for is_right, needs in (
            (samples >= 1, f"samples >= 1, the size of the data set, got {samples}"),
            (0 < gamma <= 1, f"0 < gamma <= 1, got {gamma}"),
            (
                1 <= gamma_visits <= _MOST_VISITS,
                f"1 <= gamma_visits <= {_MOST_VISITS}, got {gamma_visits}",
            ),
            (0 <= rho < math.inf, f"a finite rho >= 0, got {rho}"),
            (0 < eps < math.inf, f"a finite eps > 0, got {eps}"),
        ):
            if not is_right:
                raise ValueError(f"GlobalContrastive needs {needs}")
        self.gamma, self.gamma_visits = gamma, gamma_visits
        self.rho, self.log_eps = rho, math.log(eps)
        self.register_buffer("image_log_mean", torch.zeros(samples))
        self.register_buffer("text_log_mean", torch.zeros(samples))
        self.register_buffer("visits", torch.zeros(samples, dtype=torch.uint8))
        self._learnt: _Learnt | None = None

    def forward(
        self,
        image: Float[Tensor, "batch dim"],
        text: Float[Tensor, "batch dim"],
        labels: Int[Tensor, " batch"] | None = None,
        samples: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of the global batch; see `ContrastiveLoss.forward`.

        Raises:
            ValueError: in training, without the samples' ids.
        """
        self.refuse_uneven(image, text, labels)
        with torch.autocast(image.device.type, enabled=False):
            exact = torch.promote_types(image.dtype, torch.float32)
            image, text = image.to(exact), text.to(exact)
            first = dist.get_rank() * len(image) if world_size() > 1 else 0
            scale = self.scale()
            found = self._log_batch_means(image, text, labels, first, scale)
            alone = found == -math.inf
            known = found.detach()
            self._learnt = self._learn(known, samples) if self.training else None
            if self._learnt is not None:
                known = self._learnt.log_means[first : first + len(image)]
            # Nothing is derived through the average: its part in the gradient is the weight.
            found, known = found.masked_fill(alone, 0.0), known.masked_fill(alone, 0.0)
            log_sums = known.logaddexp(known.new_tensor(self.log_eps))
            weights = (found.detach() - log_sums).exp()
            temperature = 1 / scale
            carried = temperature.detach() * weights * (found - found.detach())
            rows = (temperature * log_sums + carried).masked_fill(alone, 0.0)
            return rows.sum(dim=1).mean() / 2 + self.rho * temperature

    def commit(self) -> None:
        """Keep what the last `forward` in training learnt; see `ContrastiveLoss.commit`."""
        if self._learnt is None:
            return
        samples, means = self._learnt.samples, self._learnt.log_means
        self.image_log_mean[samples] = means[:, 0].to(self.image_log_mean.dtype)
        self.text_log_mean[samples] = means[:, 1].to(self.text_log_mean.dtype)
        self.visits[samples] = self._learnt.visits
        self._learnt = None

    def forget_samples(self) -> None:
        """Drop the estimators for good: what is left can only evaluate."""
        del self.image_log_mean, self.text_log_mean, self.visits
        self._learnt = None
        self.eval()

    def _log_batch_means(
        self,
        image: Float[Tensor, "batch dim"],
        text: Float[Tensor, "batch dim"],
        labels: Int[Tensor, " batch"] | None,
        first: int,
        scale: Float[Tensor, ""],
    ) -> Float[Tensor, "batch 2"]:
        """Logarithms of this batch's means, of pictures and of texts; -inf without negatives."""
        images, texts = gather_rows(image), gather_rows(text)
        if labels is None:
            columns = torch.arange(len(images), device=image.device)
            labels = columns[first : first + len(image)]
        else:
            columns = gather_labels(labels)
        both = (image, text, texts), (text, image, images)
        found = [_LogMeans.apply(*rows, labels, columns, scale) for rows in both]
        return torch.stack(found, dim=1)  # pyright: ignore

    @torch.no_grad()
    def _learn(
        self, found: Float[Tensor, "batch 2"], samples: Int[Tensor, " batch"] | None
    ) -> _Learnt:
        """The moving averages as they will be, for the rows of all processes."""
        if samples is None:
            raise ValueError("GlobalContrastive needs the ids of the samples when it trains")
        samples, found = gather_labels(samples), gather_rows(found)
        found = _same_for_equal(samples, found)
        known = torch.stack([self.image_log_mean[samples], self.text_log_mean[samples]], dim=1)
        known, visits = known.to(found.dtype), self.visits[samples]
        progress = (visits.to(found.dtype) / self.gamma_visits).clamp(max=1)[:, None]
        gamma = 1 - (1 - self.gamma) * (1 - (math.pi * progress).cos()) / 2
        mixed = (known + (-gamma).log1p()).logaddexp(found + gamma.log())
        heard = found != -math.inf
        return _Learnt(
            samples,
            torch.where(heard, mixed, known),
            (visits.int() + heard[:, 0]).clamp(max=_MOST_VISITS).to(torch.uint8),
        )


class _LogMeans(torch.autograd.Function):
    """Logarithm of each row's mean over its negatives of exp(scale (row . other - row . mate)).

    Only a slice of the matrix exists at once; on the way back it is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        mates: Tensor,
        others: Tensor,
        labels: Tensor,
        columns: Tensor,
        scale: Tensor,
    ) -> Tensor:
        own = (rows * mates).sum(dim=1)
        log_sums, counts = torch.empty_like(own), torch.empty_like(own)
        for part in _slices(len(rows), len(others)):
            right = labels[part, None] == columns
            counts[part] = len(others) - right.sum(dim=1).to(own.dtype)
            log_sums[part] = _exponents(rows, own, others, right, scale, part).logsumexp(dim=1)
        ctx.save_for_backward(rows, mates, others, labels, columns, scale, own, log_sums)
        return log_sums - counts.clamp(min=1).log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore
        rows, mates, others, labels, columns, scale, own, log_sums = ctx.saved_tensors
        gradient = gradient.masked_fill(log_sums == -math.inf, 0.0)[:, None]
        log_sums = log_sums.masked_fill(log_sums == -math.inf, 0.0)
        of_rows, of_others = torch.empty_like(rows), torch.zeros_like(others)
        for part in _slices(len(rows), len(others)):
            right = labels[part, None] == columns
            weights = _exponents(rows, own, others, right, scale, part)
            weights.sub_(log_sums[part, None]).exp_().mul_(gradient[part])
            of_rows[part] = weights @ others
            of_others.addmm_(weights.T, rows[part])
        of_scale = (rows * of_rows).sum() - (gradient[:, 0] * own).sum()
        of_rows = scale * (of_rows - gradient * mates)
        return of_rows, -scale * gradient * rows, scale * of_others, None, None, of_scale


def _slices(rows: int, columns: int) -> list[slice]:
    at_a_time = max(1, _NUMBERS_AT_A_TIME // columns)
    return [slice(start, start + at_a_time) for start in range(0, rows, at_a_time)]


def _exponents(
    rows: Float[Tensor, "batch dim"],
    own: Float[Tensor, " batch"],
    others: Float[Tensor, "total dim"],
    right: Bool[Tensor, "rows total"],
    scale: Float[Tensor, ""],
    part: slice,
) -> Float[Tensor, "rows total"]:
    made = rows[part] @ others.T
    return made.sub_(own[part, None]).mul_(scale).masked_fill_(right, -math.inf)


def _same_for_equal(
    samples: Int[Tensor, " total"], log_values: Float[Tensor, "total 2"]
) -> Float[Tensor, "total 2"]:
    """Gives rows of one sample the logarithm of the mean of their values, those of -inf apart."""
    order = samples.argsort(stable=True)
    ordered = samples[order]
    number = torch.zeros_like(samples)
    number[order[1:]] = (ordered[1:] != ordered[:-1]).long().cumsum(dim=0)
    heard = log_values != -math.inf
    none = torch.zeros_like(log_values)
    peaks = (none - math.inf).scatter_reduce(
        0, number[:, None].expand_as(log_values), log_values, "amax"
    )
    peaks = peaks.masked_fill(peaks == -math.inf, 0.0)
    sums = none.index_add(0, number, (log_values - peaks[number]).exp())
    counts = none.index_add(0, number, heard.to(log_values.dtype))
    means = peaks + sums.log() - counts.clamp(min=1).log()
    return means[number]

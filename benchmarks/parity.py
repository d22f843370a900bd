"""One process or many, one piece or several: the same loss and the same gradients.

    python -m benchmarks.parity

Two small real towers (a vision transformer and BERT, float64) see one global batch of 64 pairs,
spread over 1, 2 and 4 processes (gloo, `DistributedDataParallel`) that work through it in 1 or 4
pieces each (`align.objective.derive`). The reference is one process that encodes the same pieces
and derives the loss of all rows in a single graph, with the whole matrix of similarities: plain
autograd, no gather, no caching, no tiles. Each piece draws its dropout from a seed of its own in
both.

The error of the loss is relative; that of the gradients is `|g - reference| / |reference|` over
each parameter, the worst of all parameters, temperature and bias included. (A gradient that is
zero by the formula, such as that of a bias that a softmax takes out, is set against the length of
all gradients.) The last line is JSON; the exit code is 1 where an error is above 1e-6.
"""

import argparse
import copy
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from align.losses import build_loss
from align.losses.loss import ContrastiveLoss
from align.model import DualEncoder, DualEncoderConfig, Tower
from align.objective import ContrastiveObjective, Pairs, derive
from align.tokenizer import Tokenizer

ROWS, PIECES, DROPOUTS, RANKS = 64, (1, 4), (0.0, 0.5), (1, 2, 4)
LOSSES = {
    "InfoNCE": ("infonce", False),
    "InfoNCE, several positives": ("infonce", True),
    "Sigmoid": ("sigmoid", False),
    "Sigmoid, several positives": ("sigmoid", True),
}
"""Of each row of the table: the loss, and whether rows share their concept with others."""

SAME = 1e-6
"""What an error may be for the command to succeed."""
_ZERO = 1e-12
"""Of the length of all gradients: below it, one is rounding alone."""
_WORDS = ["red", "green", "blue", "round", "square", "small", "large", "old", "new", "dark"]
_VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Case:
    """What is compared."""

    loss: str
    pieces: int
    dropout: float


@dataclass(frozen=True)
class Parity:
    """How far many processes are from one."""

    loss: str
    ranks: int
    pieces: int
    dropout: float
    loss_error: float
    gradient_error: float


def cases() -> list[Case]:
    """All of them, for any number of processes."""
    return [Case(*one) for one in product(LOSSES, PIECES, DROPOUTS)]


def make_objective(loss: str, dropout: float) -> ContrastiveObjective:
    """Two small towers in float64, the same ones every time."""
    model = copy.deepcopy(_towers(dropout))
    return ContrastiveObjective(model, build_loss(loss)).double().train()


@cache
def _towers(dropout: float) -> DualEncoder:
    torch.manual_seed(0)
    image = {**_VIT, "proj_drop_rate": dropout, "attn_drop_rate": dropout}
    text = {
        **_BERT,
        "intermediate_size": 48,
        "max_position_embeddings": 24,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    config = DualEncoderConfig(
        image=Tower("timm:vit_tiny_patch16_224", image),
        text=Tower("hf:bert", text),
        dim=16,
        image_size=32,
        context_length=16,
    )
    model = DualEncoder(config, Tokenizer.train(_WORDS, vocabulary_size=90, context_length=16))
    with torch.no_grad():  # so that nothing is zero or alike
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def make_pairs(model: DualEncoder, *, several: bool, rows: int = ROWS) -> Pairs:
    """Noise for pictures, words for captions; where asked for, rows that share their concept."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (rows, 3, 32, 32), generator=generator, dtype=torch.uint8)
    texts = [" ".join((_WORDS * 2)[row % 7 : row % 7 + row % 11]) for row in range(rows)]
    labels = torch.arange(rows)
    if several:
        labels = torch.randint(0, rows // 3, (rows,), generator=generator)
    tokens = model.tokenize(texts)
    return Pairs(images, tokens.ids, tokens.mask, labels, torch.arange(rows))


def plain_loss(loss: ContrastiveLoss, image: Tensor, text: Tensor, labels: Tensor) -> Tensor:
    """InfoNCE, or the sigmoid loss where it has a bias, by the whole matrix."""
    similarity = loss.logit_scale.exp() * image @ text.T
    right = (labels[:, None] == labels[None, :]).to(similarity.dtype)
    if loss.logit_bias is not None:
        return -F.logsigmoid((2 * right - 1) * (similarity + loss.logit_bias)).sum() / len(image)
    target = right / right.sum(dim=1, keepdim=True)
    both = [
        (target * logits.log_softmax(dim=1)).sum(dim=1) for logits in (similarity, similarity.T)
    ]
    return -torch.cat(both).mean()


def reference(
    objective: ContrastiveObjective, pieces: Sequence[Pairs], of: Callable[..., Tensor] = plain_loss
) -> dict[str, Tensor]:
    """Loss and gradients of one process and one graph; `of` is the loss that is derived."""
    parts = []
    for seed, piece in enumerate(pieces):
        torch.manual_seed(seed)
        parts.append(objective.model(piece.images, piece.ids, piece.mask))
    image, text = (torch.cat(part) for part in zip(*parts, strict=True))
    loss = of(objective.loss, image, text, torch.cat([one.labels for one in pieces]))
    loss.backward()
    return {"": loss.detach(), **gradients(objective)}


def spread(objective: ContrastiveObjective, pairs: Pairs, pieces: int) -> dict[str, Tensor]:
    """The same of this process and those beside it, each with its pieces."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    numbers = [rank + ranks * piece for piece in range(pieces)]
    mine = [pairs.piece(number, ranks * pieces) for number in numbers]
    if ranks == 1:
        loss = derive(objective, mine, seeds=numbers).loss
    else:
        wrapped = DistributedDataParallel(objective)
        loss = derive(objective, mine, seeds=numbers, wrapped=wrapped, silence=wrapped.no_sync).loss
        dist.all_reduce(loss)
    return {"": loss / ranks, **gradients(objective)}


def gradients(objective: ContrastiveObjective) -> dict[str, Tensor]:
    """By name of the parameter, of those that have one."""
    return {
        name: one.grad.clone() for name, one in objective.named_parameters() if one.grad is not None
    }


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """Relative error of the loss, and the largest one of a parameter's gradient.

    Raises:
        ValueError: another set of parameters has gradients.
    """
    if found.keys() != expected.keys():
        raise ValueError(f"gradients of other parameters: {found.keys() ^ expected.keys()}")
    of_loss = ((found[""] - expected[""]).abs() / expected[""].abs()).item()
    names = [name for name in expected if name]
    whole = torch.stack([expected[name].norm() for name in names]).norm()
    worst = 0.0
    for name in names:
        length = expected[name].norm()
        difference = (found[name] - expected[name]).norm()
        worst = max(worst, (difference / (length if length > _ZERO * whole else whole)).item())
    return of_loss, worst


def on_rank(rank: int, ranks: int, folder: str) -> None:
    """All cases on one of several processes; what they give is left in the folder."""
    for number, case in enumerate(cases()):
        name, several = LOSSES[case.loss]
        objective = make_objective(name, case.dropout)
        found = spread(objective, make_pairs(objective.model, several=several), case.pieces)
        torch.save(found, Path(folder) / f"{ranks}_{number}_{rank}.pt")


def compared(ranks: int, folder: str) -> list[Parity]:
    """What `on_rank` left there, of all ranks, beside the reference."""
    rows = []
    for number, case in enumerate(cases()):
        name, several = LOSSES[case.loss]
        objective = make_objective(name, case.dropout)
        pairs = make_pairs(objective.model, several=several)
        total = ranks * case.pieces
        expected = reference(objective, [pairs.piece(one, total) for one in range(total)])
        worst = [
            errors(torch.load(Path(folder) / f"{ranks}_{number}_{rank}.pt"), expected)
            for rank in range(ranks)
        ]
        largest = [max(column) for column in zip(*worst, strict=True)]
        rows.append(Parity(case.loss, ranks, case.pieces, case.dropout, *largest))
    return rows


def _process(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting_{ranks}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    on_rank(rank, ranks, folder)
    dist.destroy_process_group()


def measured(ranks: int) -> list[Parity]:
    """The rows of the table for so many processes, which are started here."""
    with tempfile.TemporaryDirectory() as folder:
        if ranks == 1:
            on_rank(0, 1, folder)
        else:
            start_processes(_process, (ranks, folder), nprocs=ranks, start_method="spawn")
        return compared(ranks, folder)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'loss':<28}{'ranks':>6}{'pieces':>8}{'dropout':>9}{'loss error':>13}{'gradients':>13}")
    rows: list[Parity] = []
    for ranks in given.ranks:
        for row in measured(ranks):
            rows.append(row)
            print(
                f"{row.loss:<28}{row.ranks:>6}{row.pieces:>8}{row.dropout:>9}"
                f"{row.loss_error:>13.1e}{row.gradient_error:>13.1e}",
                flush=True,
            )
    last: dict[str, Any] = {
        "configurations": len(rows),
        "worst_loss_error": max(row.loss_error for row in rows),
        "worst_gradient_error": max(row.gradient_error for row in rows),
        "rows": [asdict(row) for row in rows],
        "cores": multiprocessing.cpu_count(),
        "torch": torch.__version__,
    }
    print(json.dumps(last))
    if max(last["worst_loss_error"], last["worst_gradient_error"]) > SAME:
        sys.exit(1)


if __name__ == "__main__":
    main()

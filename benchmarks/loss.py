"""Our losses and their backward pass beside OpenCLIP's: memory and time.

    python -m benchmarks.loss

Memory is what loss and backward add at their highest to what was there before, gradients included:
each side in a fresh process of its own, warmed up on 64 rows; the resident set on a CPU, what is
allocated on a GPU. Time is that of loss and backward, in turns within one process, ours first in
every other round; ratios are medians over the rounds. The last line is JSON.

| figure | what it is |
|---|---|
| `peak_mb`, `open_clip_peak_mb` | memory of InfoNCE and of `ClipLoss`, in units of 2^20 bytes |
| `time_ratio` | time of InfoNCE over that of `ClipLoss` |
| `sigmoid_...` | the same of `Sigmoid` and `SigLipLoss` |
| `peak_mb_65536` | memory of InfoNCE at another batch, where OpenCLIP's takes 64 GB or more |
| `gradient_difference` | norm of the difference to OpenCLIP's gradients, over their norm |
| `bf16_gradient_error` | the same to float64's, of rows in bf16 under autocast at scale 100 |
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from align.losses import InfoNCE, Sigmoid

SIDES = ("ours", "open_clip")
PREFIX = {"infonce": "", "sigmoid": "sigmoid_"}
MB = 2**20


@dataclass(frozen=True)
class Batch:
    """Unit-length rows whose gradients are wanted."""

    image: Float[Tensor, "rows dim"]
    text: Float[Tensor, "rows dim"]

    @classmethod
    def drawn(cls, rows: int, dim: int, device: torch.device, *, seed: int = 0) -> "Batch":
        """A text has a cosine of about 0.16 with its image, and none with the rest."""
        generator = torch.Generator().manual_seed(seed)
        image = F.normalize(torch.randn(rows, dim, generator=generator), dim=-1)
        noise = F.normalize(torch.randn(rows, dim, generator=generator), dim=-1)
        text = F.normalize(image + 6 * noise, dim=-1)
        return cls(*(one.to(device).requires_grad_() for one in (image, text)))

    def gradients(self, loss: Callable[["Batch"], Tensor]) -> tuple[Tensor, ...]:
        """Of both, in float64 and flat."""
        found = torch.autograd.grad(loss(self), [self.image, self.text])
        return tuple(one.double().flatten() for one in found)


def loss_of(name: str, side: str, device: torch.device) -> Callable[[Batch], Tensor]:
    """A loss of either side; OpenCLIP's is told the temperature and bias that ours begins with."""
    ours = {"infonce": InfoNCE, "sigmoid": Sigmoid}[name]().to(device)
    if side == "ours":
        return lambda batch: ours(batch.image, batch.text)
    if name == "infonce":
        clip = open_clip.loss.ClipLoss()
        return lambda batch: clip(batch.image, batch.text, ours.scale())
    siglip = open_clip.loss.SigLipLoss()
    return lambda batch: siglip(batch.image, batch.text, ours.scale(), ours.logit_bias)


def once(loss: Callable[[Batch], Tensor], batch: Batch) -> float:
    """Seconds of one loss and backward."""
    batch.image.grad = batch.text.grad = None
    wait(batch.image.device)
    started = time.perf_counter()
    loss(batch).backward()
    wait(batch.image.device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(name: str, side: str, rows: int, dim: int, device: torch.device) -> int:
    """Memory that one loss and backward adds; to be asked in a fresh process."""
    loss = loss_of(name, side, device)
    once(loss, Batch.drawn(64, dim, device))
    batch = Batch.drawn(rows, dim, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        once(loss, batch)
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set starts afresh
    before = resident("VmRSS")
    once(loss, batch)
    return resident("VmHWM") - before


def resident(kind: str) -> int:
    """A line of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {kind}")


def peak_elsewhere(name: str, side: str, rows: int, chosen: argparse.Namespace) -> float:
    """The same in a process of its own, in MB."""
    command = [sys.executable, "-m", "benchmarks.loss", "--peak-of", name, side]
    command += ["--rows", str(rows), "--dim", str(chosen.dim), "--device", chosen.device]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout) / MB


def compare_times(
    name: str, batch: Batch, *, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each side, in turns, after one each to warm up."""
    losses = {side: loss_of(name, side, device) for side in SIDES}
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for loss in losses.values():
        once(loss, batch)
    for turn in range(rounds):
        for side in SIDES if turn % 2 else reversed(SIDES):
            found[side].append(once(losses[side], batch))
    return found


def apart(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Norm of the difference over the norm."""
    exact = torch.cat(expected)
    return ((torch.cat(found) - exact).norm() / exact.norm()).item()


def bf16_gradient_errors(dim: int, device: torch.device) -> dict[str, float]:
    """How far each side's gradients of 2048 bf16 rows under autocast are from float64's."""
    drawn = Batch.drawn(2048, dim, device)
    rows = [one.detach().bfloat16() for one in (drawn.image, drawn.text)]
    low = Batch(*(one.clone().requires_grad_() for one in rows))
    exact = Batch(*(one.double().requires_grad_() for one in rows))
    ours, theirs = InfoNCE(temperature=0.01).to(device), open_clip.loss.ClipLoss()
    scale = ours.scale().detach()
    expected = exact.gradients(lambda batch: theirs(batch.image, batch.text, scale.double()))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        return {
            "bf16_gradient_error": apart(
                low.gradients(lambda batch: ours(batch.image, batch.text)), expected
            ),
            "open_clip_bf16_gradient_error": apart(
                low.gradients(lambda batch: theirs(batch.image, batch.text, scale)), expected
            ),
        }


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--large", type=int, default=65536, help="batch of ours alone; 0 = none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--losses", nargs="+", choices=PREFIX, default=list(PREFIX))
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    chosen = options()
    device = torch.device(chosen.device)
    if chosen.peak_of:
        name, side = chosen.peak_of
        print(peak_bytes(name, side, chosen.rows, chosen.dim, device))
        return
    figures = {}
    batch = Batch.drawn(chosen.rows, chosen.dim, device)
    print(f"{chosen.rows} pairs of {chosen.dim} numbers in fp32 on {device}")
    print(f"{'loss and backward':<24} {'peak MB':>9} {'median s':>9} {'min':>9} {'max':>9}")
    for name in chosen.losses:
        peaks = {side: peak_elsewhere(name, side, chosen.rows, chosen) for side in SIDES}
        found = compare_times(name, batch, rounds=chosen.rounds, device=device)
        for side, taken in found.items():
            median = statistics.median(taken)
            print(
                f"{side + ' ' + name:<24} {peaks[side]:9.0f} {median:9.2f} "
                f"{min(taken):9.2f} {max(taken):9.2f}"
            )
        prefix = PREFIX[name]
        figures[f"{prefix}peak_mb"] = peaks["ours"]
        figures[f"{prefix}open_clip_peak_mb"] = peaks["open_clip"]
        pairs = zip(found["ours"], found["open_clip"], strict=True)
        figures[f"{prefix}time_ratio"] = statistics.median(ours / peer for ours, peer in pairs)
        figures[f"{prefix}gradient_difference"] = apart(
            *(batch.gradients(loss_of(name, side, device)) for side in SIDES)
        )
        if chosen.large:
            key = f"{prefix}peak_mb_{chosen.large}"
            figures[key] = peak_elsewhere(name, "ours", chosen.large, chosen)
    figures.update(bf16_gradient_errors(chosen.dim, device))
    for name, value in figures.items():
        print(f"{name:<32} {value:12.3g}")
    cuda = device.type == "cuda"
    machine = {
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if cuda else str(device),
    }
    print(json.dumps({**{k: float(f"{v:.4g}") for k, v in figures.items()}, **machine}))


if __name__ == "__main__":
    main()

"""What a run takes on 1 to 512 GPUs, by arithmetic: `python -m benchmarks.scaling`.

    python -m benchmarks.scaling --preset vit-b-32 --gpu a100

Nothing here runs on a GPU. Parameters, floating-point operations and the bytes that a forward pass
keeps for its backward pass are those of the preset's real model, counted on tensors without memory;
the rest follows from the assumptions below and from what the makers say (`GPUS`).
`docs/scaling.md` is made of what this prints. The last line is JSON.

- `UTILISATION`: the towers reach 12 to 30 % of the GPU's bf16 peak. 12 % is the best that OpenCLIP
  published for ViT-B/32 (850 samples/s on an A100; 16 % for B/16); 30 % is a guess at what towers
  of this size can reach.
- `FP32_UTILISATION`: the loss, in fp32, reaches this share of the fp32 peak.
- `LINK_UTILISATION`: exchanges reach this share of the link; they have no latencies.
- `OVERLAP`: the exchange of gradients hides behind this share of the last piece's backward pass;
  that of embeddings hides behind nothing. The loss is InfoNCE.
- `SLACK`: a GPU keeps so many times the activations that were counted, by fragments and norms in
  fp32.
- `PROGRAM`: bytes of libraries, contexts and NCCL's buffers.
- Captions have 12 tokens on average and one in forty is cut, as in `benchmarks.encode`.
- Data comes as fast as it is wanted: that is for `align doctor` to say.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from benchmarks.scaling_counts import Counts, between, count
from pipelines.schemas.presets import presets

UTILISATION = (0.12, 0.30)
FP32_UTILISATION = 0.6
LINK_UTILISATION = 0.7
OVERLAP = 0.8
SLACK = 1.25
PROGRAM = 2e9
ROOM = 0.9
"""Share of a GPU's memory that a piece may fill."""
PER_MACHINE = 8
BATCHES = {1: 4096, 8: 16384, 64: 32768, 512: 131072}
"""Global batch by number of GPUs."""
TILE = 4096
"""Side of the tiles of the loss on a GPU (`align.losses.tiles`), of which two are held."""
LOSS_PRODUCTS = 4
"""Matrix products of a process's rows with those of all: similarities twice, two gradients."""
SAMPLES = (12.8e6, 1.28e9)


@dataclass(frozen=True)
class Gpu:
    """What its maker says of a GPU, and of the machines that it stands in.

    Attributes:
        memory: bytes.
        bf16: floating-point operations a second, dense.
        fp32: likewise, without tensor cores.
        bandwidth: bytes a second from its memory.
        link: bytes a second to the others of its machine, in one direction.
        network: bytes a second to other machines, in one direction; its share of the machine's.
    """

    memory: float
    bf16: float
    fp32: float
    bandwidth: float
    link: float
    network: float


GPUS = {
    # NVLink 600 GB/s both ways; one port of 200 Gb/s for each GPU, as in a DGX A100.
    "a100": Gpu(80e9, 312e12, 19.5e12, 2.0e12, 300e9, 25e9),
    # NVLink 900 GB/s both ways; one port of 400 Gb/s for each GPU, as in a DGX H100.
    "h100": Gpu(80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    # PCIe 4.0 x16, no NVLink; one port of 100 Gb/s for the machine.
    "rtx4090": Gpu(24e9, 165e12, 82.6e12, 1.0e12, 25e9, 1.56e9),
}


@dataclass(frozen=True)
class Run:
    """How a model is trained.

    Attributes:
        gpus: how many.
        batch: global batch.
        micro: `micro_batch_size`; 0 = the largest power of two that fits.
        checkpointing: `gradient_checkpointing`.
        sharded: `shard_weights`.
        text_chunks: as in the configuration.
    """

    gpus: int
    batch: int
    micro: int = 0
    checkpointing: bool = False
    sharded: bool = False
    text_chunks: int = 4

    @property
    def rows(self) -> int:
        """Of each GPU."""
        return self.batch // self.gpus

    @property
    def pieces(self) -> int:
        """That each GPU works its rows through in."""
        return max(1, self.rows // self.micro)


def activations(counts: Counts, run: Run) -> float:
    """Bytes that one row keeps for its backward pass."""
    tokens = counts.tokens(run.text_chunks)
    towers = (
        (counts.image_held, counts.image_blocks, counts.image_between),
        (between(counts.text_held, tokens), counts.text_blocks, counts.text_between * tokens),
    )
    if not run.checkpointing:
        return SLACK * sum(held for held, _, _ in towers)
    return SLACK * sum(held / blocks + blocks * inside for held, blocks, inside in towers)


def memory(counts: Counts, run: Run) -> dict[str, float]:
    """Bytes on each GPU, by what they are for."""
    whole, share = 4.0 * counts.parameters, 1 / run.gpus if run.sharded else 1.0
    several = run.gpus > 1
    sharded_gradients = run.sharded and run.pieces == 1
    # Pictures and texts of its own, all texts, and the gradients of all these.
    embeddings = 4.0 * counts.dim * (4 * run.rows + (2 * run.batch if several else 0))
    return {
        "weights": whole * share + whole / 2,  # and their bf16 copies
        "gradients": whole * (share if sharded_gradients else 1.0)
        + (whole if several and not run.sharded else 0.0),  # and DDP's buckets
        "AdamW": 2 * whole * share,
        "activations": min(run.micro, run.rows) * activations(counts, run),
        "embeddings": embeddings,
        "tiles": 8.0 * min(TILE, run.rows) * min(TILE, run.batch),
        "program": PROGRAM,
    }


def fitted(counts: Counts, gpu: Gpu, run: Run) -> Run:
    """The run in the largest pieces that fit; pieces of one row where nothing does."""
    if run.micro:
        return run
    micro = run.rows
    while micro > 1:
        tried = replace(run, micro=micro)
        if sum(memory(counts, tried).values()) <= ROOM * gpu.memory:
            return tried
        micro //= 2
    return replace(run, micro=1)


def exchanged(counts: Counts, run: Run) -> dict[str, float]:
    """Bytes that each GPU receives in a step, and sends as well, by what they are for."""
    others, part = run.gpus - 1, (run.gpus - 1) / run.gpus
    whole = 4.0 * counts.parameters
    chunks = 1 if counts.fixed_length is not None else run.text_chunks
    gathered = whole + 4.0 * counts.text_parameters * (chunks - 1)
    passes = 2 if run.pieces == 1 else 3 * run.pieces
    rows = 4.0 * counts.dim * run.rows * others
    return {
        "weights": part * gathered * passes if run.sharded else 0.0,
        "gradients": part * whole * (1 if run.sharded else 2),  # a ring adds up, then hands round
        "texts": rows,  # see `align.losses.InfoNCE`
        "their gradients": rows,
        "labels and sums": 8.0 * run.rows * others + 16.0 * part * run.batch,
    }


@dataclass(frozen=True)
class Step:
    """Seconds of a step at one utilisation.

    Attributes:
        towers: their computing.
        loss: its computing.
        optimizer: AdamW, bound by memory.
        waiting: exchanges that hide behind nothing.
    """

    towers: float
    loss: float
    optimizer: float
    waiting: float

    @property
    def whole(self) -> float:
        """All in all."""
        return self.towers + self.loss + self.optimizer + self.waiting


def bus(gpu: Gpu, gpus: int) -> float:
    """Bytes a second that a ring through all GPUs brings to each of them.

    A ring enters and leaves each machine once, and as many rings run at a time as it has GPUs, each
    through a port of its own: together they are as fast as all ports, or as the links inside.
    """
    inside = gpu.link if gpus <= PER_MACHINE else min(gpu.link, PER_MACHINE * gpu.network)
    return inside * LINK_UTILISATION


def step(counts: Counts, gpu: Gpu, run: Run, utilisation: float) -> Step:
    """How a step spends its time."""
    forward = counts.image_flops + between(counts.text_flops, counts.tokens(run.text_chunks))
    speed = gpu.bf16 * utilisation
    again = (run.pieces > 1) + run.checkpointing  # forward passes beyond the first
    towers = run.rows * forward * (3 + again) / speed
    share = 1 / run.gpus if run.sharded else 1.0
    products = LOSS_PRODUCTS * 2.0 * run.rows * run.batch * counts.dim
    moved, rate = exchanged(counts, run), bus(gpu, run.gpus)
    last = OVERLAP * min(run.micro, run.rows) * forward * 2 / speed
    waiting = max(0.0, moved["gradients"] / rate - last)
    waiting += max(0.0, moved["weights"] / rate - OVERLAP * towers)
    waiting += sum(moved[one] for one in ("texts", "their gradients", "labels and sums")) / rate
    return Step(
        towers=towers,
        loss=products / (gpu.fp32 * FP32_UTILISATION),
        # Weight, gradient and two moments are read, all but the gradient written.
        optimizer=7 * 4.0 * counts.parameters * share / gpu.bandwidth,
        waiting=waiting,
    )


# --- what is printed ---


def two(value: float) -> str:
    """Two significant digits: more would not be believed."""
    if value >= 100:
        scale = 10 ** (len(str(int(value))) - 2)
        return f"{round(value / scale) * scale:,.0f}"
    return f"{value:.2g}" if value else "0"


def duration(seconds: float) -> str:
    """A time one can imagine."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{two(seconds / size)} {unit}"
    return f"{two(seconds)} s"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def of_model(counts: Counts) -> list[str]:
    """What was counted."""
    tokens = counts.tokens(4)
    text = between(counts.text_flops, tokens)
    rows = [
        ("parameters", f"{counts.parameters / 1e6:.1f} M"),
        ("operations of a picture, forwards", f"{two(counts.image_flops / 1e9)} G"),
        (f"of a caption at {two(tokens)} tokens with padding", f"{two(text / 1e9)} G"),
        ("of a pair, forwards and backwards", f"{two(3 * (counts.image_flops + text) / 1e9)} G"),
        ("kept of a pair for the backward pass", f"{two(activations(counts, Run(1, 1)) / 1e6)} MB"),
        (
            "the same with gradient_checkpointing",
            f"{two(activations(counts, Run(1, 1, checkpointing=True)) / 1e6)} MB",
        ),
    ]
    return table(("counted", ""), rows)


def of_memory(counts: Counts, gpu: Gpu, runs: Sequence[Run]) -> list[str]:
    """Gigabytes on each GPU."""
    parts = list(memory(counts, runs[0]))
    rows = []
    for run in (fitted(counts, gpu, run) for run in runs):
        held = memory(counts, run)
        matrix = 4.0 * run.rows * run.batch
        size = [f"{run.gpus}", f"{run.batch:,}", f"{run.rows:,}", f"{min(run.micro, run.rows):,}"]
        cells = [two(held[part] / 1e9) for part in parts]
        rows.append((*size, *cells, two(sum(held.values()) / 1e9), two(matrix / 1e9)))
    head = ("GPUs", "batch", "rows each", "piece", *parts, "all, GB", "a matrix, not tiles")
    return table(head, rows)


def of_exchange(counts: Counts, gpu: Gpu, runs: Sequence[Run]) -> list[str]:
    """Megabytes to each GPU in a step, and what that takes."""
    rows = []
    for run in (fitted(counts, gpu, run) for run in runs):
        moved = exchanged(counts, run)
        total = sum(moved.values())
        cells = [two(moved[part] / 1e6) for part in moved if part != "weights"]
        link = two(bus(gpu, run.gpus) / 1e9) if run.gpus > 1 else "-"
        ms = two(1000 * total / bus(gpu, run.gpus))
        rows.append((f"{run.gpus}", *cells, two(total / 1e6), link, ms))
    parts = [part for part in exchanged(counts, fitted(counts, gpu, runs[0])) if part != "weights"]
    return table(("GPUs", *parts, "all, MB", "GB/s", "ms, not overlapped"), rows)


def of_speed(counts: Counts, gpu: Gpu, runs: Sequence[Run]) -> list[str]:
    """Samples a second, and how long a run takes, from the lower utilisation to the higher."""
    rows = []
    for run in (fitted(counts, gpu, run) for run in runs):
        steps = [step(counts, gpu, run, utilisation) for utilisation in UTILISATION]
        rates = [run.batch / one.whole for one in steps]
        shares = [
            " to ".join(f"{100 * share(one) / one.whole:.0f}" for one in steps) + " %"
            for share in (lambda one: one.loss, lambda one: one.waiting)
        ]
        times = [" to ".join(duration(n / rate) for rate in rates) for n in SAMPLES]
        cells = [" to ".join(two(1000 * one.whole) for one in steps)]
        rows.append((f"{run.gpus}", *cells, " to ".join(map(two, rates)), *shares, *times))
    head = ("GPUs", "ms a step", "samples/s", "in the loss", "waiting for others")
    return table((*head, "12.8 M samples", "1.28 B samples"), rows)


def of_knobs(counts: Counts, gpu: Gpu, base: Run) -> list[str]:
    """What each key changes on 8 GPUs."""
    base = replace(base, micro=base.rows)
    piece = max(1, base.rows // 4)
    variants = {
        "none": base,
        f"micro_batch_size={piece}": replace(base, micro=piece),
        "gradient_checkpointing=true": replace(base, checkpointing=True),
        "shard_weights=true": replace(base, sharded=True),
        "text_chunks=1": replace(base, text_chunks=1),
        f"micro_batch_size={piece} shard_weights=true": replace(base, micro=piece, sharded=True),
    }
    rows = []
    for name, run in variants.items():
        held, moved = sum(memory(counts, run).values()), sum(exchanged(counts, run).values())
        rates = [run.batch / step(counts, gpu, run, one).whole for one in UTILISATION]
        cells = two(held / 1e9), two(moved / 1e9), " to ".join(map(two, rates))
        rows.append((f"`{name}`", *cells))
    return table(("key", "GB on each GPU", "GB exchanged a step", "samples/s"), rows)


def report(preset: str, gpu: str, batch: int | None = None) -> list[tuple[str, list[str]]]:
    """All tables with what they are called; `batch` stands for all of `BATCHES`."""
    counts, kind = count(preset), GPUS[gpu]
    runs = [Run(gpus, batch or usual) for gpus, usual in BATCHES.items()]
    return [
        ("Counted", of_model(counts)),
        ("Memory of each GPU, GB", of_memory(counts, kind, runs)),
        ("To each GPU in a step, MB", of_exchange(counts, kind, runs)),
        ("Time", of_speed(counts, kind, runs)),
        (f"Keys, on 8 GPUs and a batch of {runs[1].batch:,}", of_knobs(counts, kind, runs[1])),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=presets(), default="vit-b-32")
    parser.add_argument("--gpu", choices=list(GPUS), default="a100")
    parser.add_argument("--batch", type=int, help="global batch; a multiple of 512")
    chosen = parser.parse_args()
    if chosen.batch is not None and (chosen.batch < 512 or chosen.batch % 512):
        parser.error(f"--batch {chosen.batch}: must be a multiple of 512, the most GPUs")
    for title, lines in report(chosen.preset, chosen.gpu, chosen.batch):
        print(f"{title} ({chosen.preset}, {chosen.gpu}):\n", *lines, "", sep="\n")
    counts, gpu = count(chosen.preset), GPUS[chosen.gpu]
    figures = {}
    for gpus, usual in BATCHES.items():
        run = fitted(counts, gpu, Run(gpus, chosen.batch or usual))
        rates = [run.batch / step(counts, gpu, run, one).whole for one in UTILISATION]
        figures[gpus] = {
            "memory_gb": sum(memory(counts, run).values()) / 1e9,
            "exchanged_mb": sum(exchanged(counts, run).values()) / 1e6,
            "samples_per_second": rates,
        }
    print(json.dumps({"counts": asdict(counts), "gpus": figures}))


if __name__ == "__main__":
    main()

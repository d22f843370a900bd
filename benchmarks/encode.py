"""A training step of our dual encoder beside OpenCLIP's, on the same model; and loading a bundle.

    python -m benchmarks.encode

Both sides have the weights of one OpenCLIP model (read through `align.load`), the same pictures and
the same captions, whose lengths spread as captions do: a dozen tokens on the average, one in forty
cut at 77. A step is forward, contrastive loss and backward, in turns, ours first in every other
round. OpenCLIP gets what its trainer hands it, normalised float32 pictures and ids padded to the
context; ours gets uint8 pictures and ids padded to the longest, and normalises and trims itself.
Ratios are medians over the rounds. The last line is JSON.

| figure | what it is |
|---|---|
| `step_ratio` | our samples per second over OpenCLIP's |
| `max_difference` | greatest difference between the two sides' embeddings, both in float32 |
| `max_difference_timed` | the same in the precision that was timed, where rounding differs |
| `gradient_difference` | norm of the difference of all gradients over their norm, in float32 |
| `load_s` | seconds that loading the demo's kind of bundle takes after `import torch` |
| `load_open_clip_s` | the same for a bundle with OpenCLIP's ViT-B/32, 151 M weights |
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

import align
from align.losses import InfoNCE
from align.objective import ContrastiveObjective
from align.objective import Pairs as ObjectivePairs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def caption_lengths(rows: int, context: int, *, seed: int = 0) -> Int[np.ndarray, " rows"]:
    """Lengths in tokens, start and end included: log-normal with mean 12, one in forty at the end.

    Those of Conceptual Captions and of COCO lie as closely around 12; the long tail is that of
    captions from the web.
    """
    draw = np.random.default_rng(seed)
    lengths = np.exp(draw.normal(np.log(9.5), 0.35, rows)).round().clip(4, context)
    lengths[:: max(1, min(rows, 40))] = context
    return draw.permutation(lengths.astype(np.int64))


class Pairs:
    """Pictures and token ids of one batch, as each side takes them."""

    def __init__(self, rows: int, size: int, context: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.from_numpy(caption_lengths(rows, context))
        ids = torch.randint(1, 40_000, (rows, context), generator=generator)
        places = torch.arange(context)
        ids[:, 0] = 49406
        ids[places == lengths[:, None] - 1] = 49407
        mask = places < lengths[:, None]
        self.images: UInt8[Tensor, "rows 3 size size"] = torch.randint(
            0, 256, (rows, 3, size, size), generator=generator, dtype=torch.uint8
        ).to(device)
        mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN, device=device).view(3, 1, 1)
        std = torch.tensor(open_clip.OPENAI_DATASET_STD, device=device).view(3, 1, 1)
        self.pixels: Float[Tensor, "rows 3 size size"] = (self.images / 255 - mean) / std
        self.padded = (ids * mask).to(device)
        longest = int(lengths.max())
        self.ids = self.padded[:, :longest].contiguous()
        self.mask = mask[:, :longest].contiguous().to(device)
        self.labels = torch.arange(rows, device=device)
        self.mean_length = lengths.float().mean().item()


class Sides:
    """One model twice: as OpenCLIP runs it, and as we do."""

    def __init__(self, name: str, rows: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.peer: Any = open_clip.create_model(name)
        with tempfile.TemporaryDirectory() as folder:
            write_open_clip_folder(self.peer, name, Path(folder))
            model = align.load(folder)
        self.device = device
        size = model.config.image_size
        self.pairs = Pairs(rows, size, model.config.context_length, device)
        self.ours = ContrastiveObjective(model, InfoNCE()).to(device).train()
        self.peer = self.peer.to(device).train()
        self.peer_loss = open_clip.ClipLoss()

    def embed_ours(self) -> tuple[Tensor, Tensor]:
        """Rows of pictures and of texts."""
        return self.ours.model(self.pairs.images, self.pairs.ids, self.pairs.mask)

    def embed_peer(self) -> tuple[Tensor, Tensor]:
        """Likewise, by OpenCLIP."""
        image, text, *_ = self.peer(self.pairs.pixels, self.pairs.padded)
        return image, text

    def step_ours(self) -> None:
        """Forward, loss and backward."""
        pairs = self.pairs
        whole = ObjectivePairs(pairs.images, pairs.ids, pairs.mask, pairs.labels, pairs.labels)
        loss = self.ours(whole).loss
        loss.backward()

    def step_peer(self) -> None:
        """Likewise, by OpenCLIP."""
        image, text, scale, *_ = self.peer(self.pairs.pixels, self.pairs.padded)
        self.peer_loss(image, text, scale).backward()

    def seconds(self, step: Callable[[], None], module: nn.Module, dtype: torch.dtype) -> float:
        """Wall time of one step."""
        module.zero_grad(set_to_none=True)
        self._wait()
        started = time.perf_counter()
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            step()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def max_difference(self, dtype: torch.dtype) -> float:
        """Greatest difference of any number in any embedding."""
        self.ours.eval()
        self.peer.eval()
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            pairs = zip(self.embed_ours(), self.embed_peer(), strict=True)
            found = max((a.float() - b.float()).abs().max().item() for a, b in pairs)
        self.ours.train()
        self.peer.train()
        return found

    def gradient_difference(self) -> float:
        """How far all gradients, taken as one vector, lie from OpenCLIP's, as a share."""
        for step, module in ((self.step_ours, self.ours), (self.step_peer, self.peer)):
            module.zero_grad(set_to_none=True)
            step()
        theirs = {name: p.grad for name, p in self.peer.named_parameters()}
        apart, whole = 0.0, 0.0
        for name, parameter in self.ours.named_parameters():
            expected, found = theirs.pop(peer_name(name, theirs)), parameter.grad
            assert expected is not None
            assert found is not None
            expected = expected.T if name.endswith("_projection.weight") else expected
            apart += (found - expected).double().square().sum().item()
            whole += expected.double().square().sum().item()
        assert not theirs, f"not ours: {', '.join(theirs)}"
        return (apart / whole) ** 0.5


def peer_name(ours: str, theirs: Container[str]) -> str:
    """What OpenCLIP calls a parameter of our objective."""
    if ours == "loss.logit_scale":
        return "logit_scale"
    if ours == "model.image_projection.weight":
        return "visual.proj"
    if ours == "model.text_projection.weight":
        ours = "model.text.text.text_projection"
    name = ours.removeprefix("model.image.").removeprefix("model.text.text.")
    return name if name in theirs else f"text.{name}"


def write_open_clip_folder(model: Any, name: str, folder: Path) -> None:
    """What `open_clip.create_model("local-dir:FOLDER")` reads."""
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")


def compare_steps(sides: Sides, dtype: torch.dtype, *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each side's steps, in turns, after one each to warm up."""
    kinds: dict[str, tuple[Callable[[], None], nn.Module]] = {
        "ours": (sides.step_ours, sides.ours),
        "peer": (sides.step_peer, sides.peer),
    }
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for step, module in kinds.values():
        sides.seconds(step, module, dtype)
    for turn in range(rounds):
        order = list(kinds) if turn % 2 else list(reversed(kinds))
        for name in order:
            found[name].append(sides.seconds(*kinds[name], dtype))
    return found


_LOAD = """
import sys, time
import torch
started = time.perf_counter()
import align
align.load(sys.argv[1])
print(time.perf_counter() - started)
"""


def load_seconds(bundle: Path, *, runs: int) -> float:
    """Seconds from `import torch` to a loaded bundle, in fresh processes; the median."""
    command = [sys.executable, "-c", _LOAD, str(bundle)]
    taken = [
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(runs + 1)
    ]
    return statistics.median(taken[1:])


def bundles(folder: Path) -> dict[str, Path]:
    """A bundle of the demo's kind, and one with OpenCLIP's towers."""
    from pipelines.cli import shipped
    from pipelines.config import build, read_yaml
    from pipelines.schemas import DemoConfig
    from pipelines.training import make_model

    demo = build(DemoConfig, read_yaml(shipped("demo")), origin="the demo").pretrain.model
    letters = np.random.default_rng(0).integers(97, 123, (4000, 6), dtype=np.uint8)
    words = [bytes(row).decode() for row in letters]
    tokenizer = align.Tokenizer.train(words, vocabulary_size=1500, context_length=24)
    tower = align.Tower("open_clip:ViT-B-32")
    large = align.DualEncoderConfig(tower, tower)
    models = {
        "load_s": make_model(demo, tokenizer),
        "load_open_clip_s": align.DualEncoder(large, align.Tokenizer.clip()),
    }
    for name, model in models.items():
        align.save(model, folder / name)
    return {name: folder / name for name in models}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    found = {
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
        return {**found, "device": torch.cuda.get_device_name(device), "peak_mib": round(peak)}
    return {**found, "amx_bf16": torch.cpu._is_amx_tile_supported()}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", default="ViT-B-32", help="any model with OpenCLIP's own towers")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--precision", default="bf16", choices=DTYPES)
    parser.add_argument("--batch-size", type=int, default=1024 if cuda else 32)
    parser.add_argument("--chunks", type=int, default=4, help="that our texts are cut into")
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-load", action="store_true", help="leave out loading of bundles")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    device, dtype = torch.device(chosen.device), DTYPES[chosen.precision]
    sides = Sides(chosen.model, chosen.batch_size, device)
    sides.ours.model.text.chunks = chosen.chunks
    figures = {
        "max_difference": sides.max_difference(torch.float32),
        "max_difference_timed": sides.max_difference(dtype),
        "gradient_difference": sides.gradient_difference(),
    }
    if chosen.compile:
        sides.ours.model.image.compile()
        sides.ours.model.text.compile()
    found = compare_steps(sides, dtype, rounds=chosen.rounds)
    print(
        f"{chosen.model}, {chosen.precision}, {chosen.batch_size} pairs on {device}, "
        f"captions of {sides.pairs.mean_length:.1f} tokens on the average"
    )
    print(f"{'samples per second':<24} {'median':>9} {'min':>9} {'max':>9}")
    for name, seconds in found.items():
        rates = [chosen.batch_size / one for one in seconds]
        print(f"{name:<24} {statistics.median(rates):9.2f} {min(rates):9.2f} {max(rates):9.2f}")
        figures[f"{name}_samples_per_s"] = statistics.median(rates)
    pairs = zip(found["peer"], found["ours"], strict=True)
    figures["step_ratio"] = statistics.median(peer / ours for peer, ours in pairs)
    if not chosen.no_load:
        with tempfile.TemporaryDirectory() as folder:
            for name, bundle in bundles(Path(folder)).items():
                figures[name] = load_seconds(bundle, runs=5)
    for name, value in figures.items():
        print(f"{name:<24} {value:12.3g}")
    print(json.dumps({**{k: float(f"{v:.4g}") for k, v in figures.items()}, **machine(device)}))


if __name__ == "__main__":
    main()

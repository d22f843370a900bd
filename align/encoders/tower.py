"""What every tower promises, whatever library it comes from."""

import difflib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from align.encoders.chunks import plan_chunks
from align.encoders.statistics import count_once
from align.folders import damage


@dataclass(frozen=True)
class Features:
    """What a tower says of a batch, in the tower's own widths.

    Attributes:
        pooled: one vector a row.
        tokens: the vectors it was pooled from (positions of the image, tokens of the text).
        mask: `True` where a token is real; padding is `False` and must not be read.
    """

    pooled: Float[Tensor, "batch width"]
    tokens: Float[Tensor, "batch tokens token_width"]
    mask: Bool[Tensor, "batch tokens"]


@dataclass(frozen=True)
class Vocabulary:
    """What a text tower has to know of its tokenizer.

    Attributes:
        size: number of ids.
        pad_id: stands behind the end of shorter texts.
        end_id: the last id of every text, where there is one.
    """

    size: int
    pad_id: int
    end_id: int | None = None


class TowerModule(nn.Module, ABC):
    """What image and text towers have in common.

    Attributes:
        name: the prefixed name that builds the tower, such as `timm:resnet50`.
        width: of the pooled vector.
        token_width: of the tokens.
    """

    name: str
    width: int
    token_width: int
    _compiled_encode: Any = None
    _holds: Sequence[RemovableHandle] = ()

    @property
    @abstractmethod
    def body(self) -> nn.Module:
        """The library's own module, which holds the blocks."""

    @abstractmethod
    def encode(self, *args: Any, **kwargs: Any) -> Features:
        """Encode a batch as it is."""

    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """Options that rebuild the tower under `name` without weights, and without a hub."""

    def layer_groups(self) -> list[list[str]]:
        """Names of the parameters from input to output: the stem, each block, what follows.

        Blocks are the modules of the kind that makes the longest run. What stands between two of
        them, such as the step from one stage to the next, goes with the later one, and tables of
        embeddings go with the stem.
        """
        blocks = _blocks(self)
        inside = {key: at for at, block in enumerate(blocks, 1) for key in _within(self, block)}
        tables = tuple(
            f"{name}." for name, part in self.named_modules() if isinstance(part, nn.Embedding)
        )
        groups: list[list[str]] = [[] for _ in range(len(blocks) + 2)]
        reached = 0
        for key, _ in self.named_parameters():
            reached = inside.get(key, reached)
            if key in inside:
                groups[reached].append(key)
            else:
                groups[0 if not reached or key.startswith(tables) else reached + 1].append(key)
        return [group for group in groups if group]

    def blocks(self) -> list[nn.Module]:
        """The modules, in lists and sequences, of the kind that makes the longest run."""
        return [self.get_submodule(name) for name in _blocks(self)]

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Keep no activations inside the blocks; compute them again on the way back.

        Loss, gradients and the statistics of batch normalisation are those without.

        Raises:
            ValueError: the architecture cannot.
        """
        try:
            self._checkpoint_gradients(enabled)
        except (AssertionError, AttributeError, NotImplementedError, ValueError) as error:
            raise ValueError(f"{self.name} has no gradient checkpointing") from error
        for handle in self._holds:
            handle.remove()
        self._holds = count_once(self) if enabled else ()

    @abstractmethod
    def _checkpoint_gradients(self, enabled: bool) -> None: ...

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile `encode` in place, with the options of `torch.compile`.

        Names of weights stay as they were; a copy of the tower is not compiled.
        """
        self._compiled_encode = torch.compile(self.encode, *args, **options)

    def _encode(self, *given: Tensor) -> Features:
        if self._compiled_encode is None:
            return self.encode(*given)
        with warnings.catch_warnings():  # the compiler asks embeddings made outside for a gradient
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            return self._compiled_encode(*given)

    def __getstate__(self) -> dict[str, Any]:
        # What was compiled belongs to this very tower: its copy would go on computing with it.
        state = super().__getstate__()
        state.pop("_compiled_encode", None)
        return state


_LEAST_DEVIATION = 1e-6
"""Of pixel values in [0, 1]; divided by less, they would no longer be numbers."""


class ImageTower(TowerModule):
    """Pictures to vectors.

    Pictures come as uint8 and are scaled and normalised here, on the device:
    `(x / 255 - mean) / std` for each channel.

    Args:
        mean: per channel, of pixel values in [0, 1].
        std: likewise.

    Attributes:
        picture_size: side of the pictures that the tower was built for; None = any.

    Raises:
        ValueError: there are not three numbers of each, or a deviation is not above zero.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    picture_size: int | None = None

    def __init__(self, mean: Iterable[float], std: Iterable[float]) -> None:
        super().__init__()
        try:
            self.statistics = {"mean": [float(x) for x in mean], "std": [float(x) for x in std]}
        except (TypeError, ValueError) as error:
            raise ValueError(f"mean and std take a number for each channel ({error})") from error
        for key, values in self.statistics.items():
            if len(values) != 3 or not all(map(math.isfinite, values)):
                raise ValueError(f"{key} {values}: it takes a number for each of 3 channels")
            if key == "std" and min(values) <= _LEAST_DEVIATION:
                raise ValueError(f"std {values}: it takes deviations above 0 ({_LEAST_DEVIATION})")
        for key, values in self.statistics.items():
            buffer = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) * 255
            self.register_buffer(f"pixel_{key}", buffer, persistent=False)

    @abstractmethod
    def encode(self, pixels: Float[Tensor, "batch 3 height width"]) -> Features:
        """Encode normalised pixels."""

    def forward(self, images: UInt8[Tensor, "batch 3 height width"]) -> Features:
        """Encode a batch of pictures."""
        pixels = (images.float() - self.pixel_mean) / self.pixel_std
        return self._encode(pixels.contiguous(memory_format=torch.channels_last))

    def check_size(self, size: int) -> None:
        """See whether the tower takes square pictures of this size.

        Raises:
            ValueError: it does not.
        """
        training, zeros = self.training, torch.zeros(1, 3, size, size, dtype=torch.uint8)
        try:
            with torch.no_grad():
                self.eval()(zeros.to(self.pixel_mean.device))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{self.name} does not take pictures of {size} px ({damage(error)}); "
                "choose another model.image_size"
            ) from error
        finally:
            self.train(training)


class TextTower(TowerModule):
    """Token ids to vectors.

    A batch is cut into chunks of like length, and each is encoded without the padding that it
    does not need: the results are those of the whole batch, at a fraction of the work.

    Attributes:
        vocabulary_size: ids it has embeddings for.
        max_length: longest text, in tokens.
        pad_id: what stands where the mask is `False`; None = anything.
        pad_is_an_entry: whether `pad_id` means padding to the tower even where the mask is `True`.
        end_id: the id that must end every text; None = none.
        chunks: how many chunks a batch is cut into, at most; small batches are cut in two, since
            each chunk goes through all weights once more.
        fixed_length: the length that every text is padded to, where padding is part of the
            mathematics (SigLIP attends to it); None = padding is invisible.
    """

    vocabulary_size: int
    max_length: int
    pad_id: int | None = None
    pad_is_an_entry: bool = False
    end_id: int | None = None
    chunks: int = 4
    fixed_length: int | None = None

    @abstractmethod
    def encode(
        self,
        ids: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        embedded: Float[Tensor, "batch tokens embedding"] | None = None,
    ) -> Features:
        """Encode a batch as it is.

        Args:
            ids: token ids.
            mask: `True` on real tokens.
            embedded: rows of the tower's embedding table for the ids, where they were looked up.
        """

    def embed(self, ids: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens embedding"] | None:
        """Rows of the embedding table, or None where `encode` has to look them up itself."""
        del ids
        return None

    def forward(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> Features:
        """Encode a batch of token ids; the tokens come back at the width they came in."""
        parts, order = self._encode_chunks(ids, mask)
        tokens = torch.cat([_widen(part.tokens, ids.shape[1]) for part in parts])
        return Features(torch.cat([part.pooled for part in parts])[order], tokens[order], mask)

    def pool(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch width"]:
        """What `forward` calls `pooled`, without bringing the tokens together."""
        parts, order = self._encode_chunks(ids, mask)
        return torch.cat([part.pooled for part in parts])[order]

    def _encode_chunks(self, ids: Tensor, mask: Tensor) -> tuple[list[Features], Any]:
        """The chunks, encoded, and where each row of the batch went."""
        if self.pad_id is not None:
            ids = ids.masked_fill(~mask, self.pad_id)
        if self.fixed_length is not None:
            missing = max(0, self.fixed_length - ids.shape[1])
            ids = nn.functional.pad(ids, (0, missing), value=self.pad_id or 0)
            whole = self._encode(ids, nn.functional.pad(mask, (0, missing)))
            return [whole], slice(None)
        positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        lengths = (positions * mask).amax(dim=1).clamp(min=1).tolist() if mask.numel() else []
        plan = plan_chunks(lengths, min(self.chunks, max(2, len(lengths) // 64)))
        if len(plan) == 1:
            width = plan[0].length
            return [self._encode(ids[:, :width], mask[:, :width])], slice(None)
        cut = []
        for chunk in plan:
            rows = torch.tensor(chunk.rows, device=ids.device)
            cut.append((ids[rows, : chunk.length], mask[rows, : chunk.length]))
        parts = [
            self._encode(*inputs, *embedded)
            for inputs, embedded in zip(cut, self._embed_once([x for x, _ in cut]), strict=True)
        ]
        places = torch.tensor([row for chunk in plan for row in chunk.rows], device=ids.device)
        return parts, places.argsort()

    def _embed_once(self, chunks: list[Tensor]) -> list[tuple[Tensor, ...]]:
        """The embeddings of all chunks by one look-up: the gradient of each is a whole table."""
        table = None
        if torch.is_grad_enabled():
            table = self.embed(torch.cat([ids.flatten() for ids in chunks]))
        if table is None:
            return [()] * len(chunks)
        rows = table.split([ids.numel() for ids in chunks])
        return [(part.view(*ids.shape, -1),) for part, ids in zip(rows, chunks, strict=True)]

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile `encode` in place, for any number of texts of any length."""
        super().compile(*args, **{"dynamic": True, **options})


def _widen(tokens: Float[Tensor, "batch tokens width"], length: int) -> Tensor:
    """Padded with zeros, or cut, to a length."""
    if tokens.shape[1] == length:
        return tokens
    return nn.functional.pad(tokens, (0, 0, 0, length - tokens.shape[1]))


def _blocks(module: nn.Module) -> list[str]:
    """Names of all modules, in lists and sequences, of the kind that makes the longest run."""
    runs = [
        (name, part, type(part[0]))
        for name, part in module.named_modules()
        if isinstance(part, nn.ModuleList | nn.Sequential)
        and len({type(child) for child in part}) == 1
        and any(True for _ in part.parameters())
    ]
    if not runs:
        return []
    kind = max(runs, key=lambda run: len(run[1]))[2]
    return [
        f"{name}.{at}" if name else str(at)
        for name, part, kinds in runs
        if kinds is kind
        for at in range(len(part))
    ]


def _within(module: nn.Module, name: str) -> list[str]:
    return [f"{name}.{key}" for key, _ in module.get_submodule(name).named_parameters()]


def refuse_small(name: str, size: int | None, patch: Any) -> None:
    """See whether a picture holds a patch: without one, a class token would be all there is.

    Raises:
        ValueError: it does not.
    """
    sides = patch if isinstance(patch, Sequence) else [patch]
    if size is not None and patch is not None and size < max(sides):
        raise ValueError(f"{name}: pictures of {size} px are smaller than a patch, {max(sides)} px")


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Errors that a library meets on its way to published weights, as one clear line.

    Raises:
        ValueError: instead of them.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{what}: {damage(error)}") from error


def near(name: str, known: Iterable[str]) -> str:
    """Like names, for the end of a message."""
    found = difflib.get_close_matches(name, list(known), n=3)
    return f" (near: {', '.join(found)})" if found else ""

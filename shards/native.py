"""torchvision's decoders for plain pictures, watched against Pillow's.

They give the same pixels in about two thirds of the time, as they write RGB where Pillow keeps four
bytes a pixel. Only what is plain is handed to them: JPEG in gray or RGB, and WebP that is nothing
but one picture. They are never the judge: what they refuse, Pillow decodes or names the reason. PNG
is Pillow's alone, as torchvision 0.29 ends the whole process on some damaged ones.
"""

import contextlib
import threading
import warnings
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

with contextlib.suppress(ImportError):
    import torchvision.io  # noqa: F401

# The operators are called by name: the functions of torchvision.io around them warn, as of 0.29,
# that they will go one day. From then on Pillow decodes everything.
_OPERATORS = {
    "JPEG": "decode_jpeg",
    "MPO": "decode_jpeg",  # a JPEG with further ones behind it
    "WEBP": "decode_webp",
}
_PLAIN_WEBP = (b"VP8 ", b"VP8L")
_RGB, _RGB_ALPHA = 3, 4  # values of torchvision.io.ImageReadMode


class NativeDecoders:
    """Decodes plain pictures without Pillow; safe to share between threads.

    The first pictures of each format are decoded by Pillow too. If one of them differs in a single
    value (another build of a codec may round otherwise), that format is left to Pillow from then
    on, and a warning says so: a resumed run must see what a run that was never stopped sees.

    Args:
        checks: Pictures of each format that are compared.

    Attributes:
        states: What decodes the formats that were compared or given up, and why: for reports.
    """

    def __init__(self, *, checks: int = 8) -> None:
        self.states: dict[str, str] = {}
        self._lock = threading.Lock()
        self._left = dict.fromkeys(_OPERATORS, checks)
        self._operators: dict[str, Callable[..., torch.Tensor]] = {}
        for kind, name in _OPERATORS.items():
            try:
                self._operators[kind] = getattr(torch.ops.image, name)
            except AttributeError:
                self.states[kind] = "Pillow, as torchvision has no decoder"

    def decode(
        self,
        data: bytes,
        opened: Image.Image,
        pillow: Callable[[], UInt8[ndarray, "height width 3"]],
    ) -> UInt8[ndarray, "height width 3"]:
        """The pixels of a picture as they are stored, laid on white where it is transparent.

        Args:
            data: The encoded picture.
            opened: The same, with its header read by Pillow.
            pillow: Decodes it by Pillow; called where the picture is not plain, is refused, or is
                one of those that are compared.

        Raises:
            Exception: Whatever `pillow` raises.
        """
        kind = opened.format or ""
        operator = self._operators.get(kind)
        mode = _plain_mode(data, opened)
        if operator is None or mode is None:
            return pillow()
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        upright = () if kind == "WEBP" else (False,)
        try:
            found = operator(encoded, mode, *upright).permute(1, 2, 0).numpy()
        except RuntimeError:
            return pillow()
        if found.shape[:2] != (opened.height, opened.width):
            return pillow()
        if mode == _RGB_ALPHA:
            found = _on_white(found)
        if not self._left[kind]:
            return found
        expected = pillow()
        self._compare(kind, found, expected)
        return expected

    def _compare(
        self,
        kind: str,
        found: UInt8[ndarray, "height width 3"],
        expected: UInt8[ndarray, "height width 3"],
    ) -> None:
        """Counts one comparison, and gives the format up where the pictures differ."""
        difference = np.abs(found.astype(np.int16) - expected)
        largest, mean = int(difference.max()), float(difference.mean())
        with self._lock:
            if kind not in self._operators:
                return
            if not largest:
                self._left[kind] = max(0, self._left[kind] - 1)
                self.states[kind] = "torchvision"
                return
            del self._operators[kind]
            self.states[kind] = f"Pillow, as torchvision's differ by {largest} (mean {mean:.2f})"
        warnings.warn(
            f"{kind} pictures are decoded by Pillow from now on, which is slower: torchvision's "
            f"differ from Pillow's by up to {largest} of 255 (mean {mean:.2f})",
            RuntimeWarning,
            stacklevel=2,
        )


NATIVE = NativeDecoders()
"""The decoders of this process."""


def _plain_mode(data: bytes, opened: Image.Image) -> int | None:
    """How a plain picture is to be read; None for all others."""
    if opened.format == "WEBP" and data[12:16] not in _PLAIN_WEBP:
        return None  # frames, metadata: torchvision skips damage in these that Pillow minds
    return {"RGB": _RGB, "L": _RGB, "RGBA": _RGB_ALPHA}.get(opened.mode)


def _on_white(pixels: UInt8[ndarray, "height width 4"]) -> UInt8[ndarray, "height width 3"]:
    """Lays a transparent picture onto white, rounded as Pillow's `alpha_composite` rounds."""
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    if alpha.min() == 255:
        return colour
    share = alpha.astype(np.uint16)
    mixed = colour * share + 255 * (255 - share) + 128
    return ((mixed + (mixed >> 8)) >> 8).astype(np.uint8)

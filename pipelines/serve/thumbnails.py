"""Small pictures of rows, made when they are asked for and kept while there is room."""

import io
import threading
from collections import OrderedDict

from PIL import Image

from pipelines.serve.indexes import ServedIndex
from pipelines.serve.limits import Refused

SIDES = (16, 2048)
"""Least and largest length of a picture's longer side, in pixels."""
_QUALITY = 82


class Thumbnails:
    """Pictures as WebP files; many threads may ask.

    Args:
        max_bytes: Of what is kept; what was not asked for the longest gives way.
    """

    def __init__(self, max_bytes: int = 64 << 20) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def kept(self, served: ServedIndex, row_id: int, side: int) -> bytes | None:
        """The picture of a row, where it was made before."""
        key = (served.name, row_id, side)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def made(self, served: ServedIndex, row_id: int, side: int) -> bytes:
        """The picture of a row, its longer side at most so long; small ones stay as they are.

        Raises:
            Refused: The shards are gone, or the picture in them is damaged (404).
        """
        try:
            picture = served.pictures[row_id]
        except (ValueError, OSError, LookupError):  # its line names folders of the server
            raise Refused(404, f"no picture of row {row_id}: its shard cannot be read") from None
        data = encoded(picture, side)
        with self._lock:
            if (served.name, row_id, side) not in self._kept:
                self._kept[served.name, row_id, side] = data
                self._bytes += len(data)
            while self._bytes > self._max_bytes:
                self._bytes -= len(self._kept.popitem(last=False)[1])
        return data


def encoded(picture: Image.Image, side: int) -> bytes:
    """A picture, scaled down, as WebP."""
    small = picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    sink = io.BytesIO()
    small.save(sink, "WEBP", quality=_QUALITY, method=1)
    return sink.getvalue()

"""Work that makes much and throws little away, done while the garbage collector rests."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_rests() -> Iterator[None]:
    """Keep the cyclic garbage collector from looking for garbage inside a `with` block.

    The libraries behind towers make half a million objects while they are imported, which all
    stay; looking through them again and again is a fifth of the time that a bundle takes to load.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

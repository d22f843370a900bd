"""Dual encoders that put pictures and texts into one space, their objective, and fusion heads.

Tensors in, tensors out: nothing here reads a shard, a YAML file or an index. The public face is
small, and importing it is cheap; torch comes with the first name used.

    >>> import align
    >>> model = align.load("runs/demo/bundle")
    >>> pictures = model.encode_image([picture])            # Float[Tensor, "1 dim"], unit length
    >>> texts = model.encode_text(["red heart", "a dog"])   # Float[Tensor, "2 dim"], unit length
    >>> (pictures @ texts.T).argmax(dim=1)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from align.quick import collector_rests

if TYPE_CHECKING:
    from align.bundle import load, push_to_hub, save
    from align.interop import export
    from align.losses import InfoNCE
    from align.model import DualEncoder, DualEncoderConfig, Tower
    from align.tokenizer import Tokenizer

__all__ = [
    "DualEncoder",
    "DualEncoderConfig",
    "InfoNCE",
    "Tokenizer",
    "Tower",
    "export",
    "load",
    "push_to_hub",
    "save",
]

_HOMES = {
    "DualEncoder": "align.model",
    "DualEncoderConfig": "align.model",
    "InfoNCE": "align.losses",
    "Tokenizer": "align.tokenizer",
    "Tower": "align.model",
    "export": "align.interop",
    "load": "align.bundle",
    "push_to_hub": "align.bundle",
    "save": "align.bundle",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'align' has no attribute {name!r}; it has {sorted(_HOMES)}")
    with collector_rests():
        return getattr(import_module(_HOMES[name]), name)

"""Image and text towers by prefixed name: timm, Hugging Face, OpenCLIP, and folders of theirs.

- `timm:resnet50` is what `timm.create_model("resnet50")` builds, without its classifier;
- `hf:bert` is a Hugging Face encoder built from its configuration alone, `hf:bert-base-uncased`,
  a hub id or a local folder in the hub's format, one that is known there;
- `open_clip:ViT-B-32` is that tower of OpenCLIP's model;
- `local:FOLDER` is the tower in a bundle of ours, or in a folder that one of these libraries wrote.

Options go to the library as they are, so that a new architecture needs no code here. Naming a
library costs nothing: it is imported when a tower of its kind is built.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.encoders.tower import ImageTower, TextTower

IMAGE_LIBRARIES = {
    "timm": "align.encoders.timm_tower:TimmImageEncoder",
    "hf": "align.encoders.huggingface_image:HuggingFaceImageEncoder",
    "open_clip": "align.encoders.open_clip_tower:OpenCLIPImageEncoder",
    "local": "align.encoders.local:local_image_tower",
}
TEXT_LIBRARIES = {
    "hf": "align.encoders.huggingface_text:HuggingFaceTextEncoder",
    "open_clip": "align.encoders.open_clip_tower:OpenCLIPTextEncoder",
    "local": "align.encoders.local:local_text_tower",
}

LOOKED_UP = frozenset({"hf", "open_clip"})
"""Libraries that look for a name in folders and on a hub unless the option `config` holds all that
it stands for; with any other, a name without a slash or a colon stands for itself."""


def build_image_tower(spec: str, **options: Any) -> "ImageTower":
    """The image tower that a prefixed name such as `timm:resnet10t` stands for.

    Args:
        spec: `library:name`, a library of `IMAGE_LIBRARIES`.
        options: passed to the library; `image_size` is for backbones built for one size.

    Raises:
        ValueError: no prefix, an unknown one, or what the library refuses.
    """
    return _build(spec, IMAGE_LIBRARIES, options)


def build_text_tower(spec: str, **options: Any) -> "TextTower":
    """The text tower that a prefixed name such as `hf:bert` stands for.

    Args:
        spec: `library:name`, a library of `TEXT_LIBRARIES`.
        options: passed to the library.

    Raises:
        ValueError: no prefix, an unknown one, or what the library refuses.
    """
    return _build(spec, TEXT_LIBRARIES, options)


def _build(spec: str, libraries: Mapping[str, str], options: dict[str, Any]) -> Any:
    library, separator, name = spec.partition(":")
    if not separator or library not in libraries or not name:
        raise ValueError(
            f"tower {spec!r} must start with one of "
            f"{', '.join(f'{known}:' for known in libraries)}, as in "
            f"{next(iter(libraries))}:NAME"
        )
    module, _, attribute = libraries[library].partition(":")
    return getattr(import_module(module), attribute)(name, **options)

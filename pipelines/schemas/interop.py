"""What `export` and `import` can be told."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from align.interop import EXPORTS
from pipelines.config import Config
from pipelines.schemas.values import Place


def _known(name: str) -> str:
    if name not in EXPORTS:
        raise ValueError(f"unknown format {name!r}; known: {', '.join(EXPORTS)}")
    return name


OVERWRITE = "Replace a model of the same format that the folder holds."


class ExportConfig(Config):
    """A model for another library, compared with what that library makes of it."""

    positional: ClassVar[tuple[str, ...]] = ("bundle", "out")

    bundle: Place = Field(description="A bundle: folder or hub id; or what `align import` takes.")
    out: Path = Field(description="Folder to write.")
    to: Annotated[str, AfterValidator(_known)] = Field(
        description=f"The format: {', '.join(EXPORTS)}."
    )
    overwrite: bool = Field(default=False, description=OVERWRITE)


class ImportConfig(Config):
    """A model of OpenCLIP or Hugging Face as a bundle, with equal logits."""

    positional: ClassVar[tuple[str, ...]] = ("source", "out")

    source: Place = Field(
        description="open_clip:NAME@TAG, hf:OWNER/NAME, or a folder in the format of either."
    )
    out: Path = Field(description="Folder of the bundle.")
    overwrite: bool = Field(default=False, description=OVERWRITE)

"""Models by the place a user names, with the fingerprint that tables, indexes and heads keep."""

from dataclasses import dataclass
from pathlib import Path

from align import interop
from align.bundle import fingerprint, load
from align.identity import weights_fingerprint
from align.model import DualEncoder


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to encode.

    Attributes:
        model: in evaluation mode.
        fingerprint: of its weights, vocabulary and configuration.
        place: what the user named; absolute where it is a folder.
    """

    model: DualEncoder
    fingerprint: str
    place: str


def open_model(place: str) -> OpenModel:
    """Load a bundle, or a model of OpenCLIP or Hugging Face by name or folder.

    Raises:
        ValueError: as `align.load`.
    """
    model = load(place)
    return OpenModel(model, model_fingerprint(model, place), whereabouts(place))


def model_fingerprint(model: DualEncoder, place: str) -> str:
    """The fingerprint of a model that was loaded from a place: of the bundle, or of its weights."""
    return weights_fingerprint(model) if interop.is_foreign(place) else fingerprint(place)


def whereabouts(place: str) -> str:
    """A local place, so that it is found from any working directory; ids and URLs stay as they are.

    A pattern of shards is local where its folder is.
    """
    path = Path(place)
    there = path.exists() or ("{" in path.name and path.parent.exists())
    return str(path.resolve()) if there else place

"""Records out of caption files: COCO's, and Karpathy's splits of Flickr and COCO."""

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.damage import BadSample
from shards.sources.record import (
    Record,
    Source,
    identity,
    keeps,
    offers,
    picture_keys,
    read_file,
)

_FIRST_LOOKED_FOR = 20


@dataclass
class Described:
    """A picture and its captions, as a file tells them."""

    file: str
    fields: dict[str, Any]
    captions: list[str] = field(default_factory=list)


class AnnotationSource(Source):
    """The pictures that a JSON file describes, each with all its captions.

    What else the file says of a picture goes to `fields`, and its name as `file`.

    Args:
        path: The file.
        root: The folder that the names of pictures start from; the file's own unless stated.
        where: Keeps the pictures in whose entry each field has the value, or one of the values,
            given.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is of another format, no picture is left, or the pictures are not there.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        root: Path | str | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> None:
        self._path = Path(path)
        self._root = Path(root) if root is not None else self._path.parent
        content = _load(self._path)
        if not self.fits(content):
            raise ValueError(f"{path} holds no captions of this format: {_outline(content)}")
        try:
            every = self.described(content)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: an entry is malformed ({error!r})") from None
        self._pictures = [one for one in every if keeps(where or {}, one.fields)]
        if not self._pictures:
            there = f" where {where}; {offers(where, [o.fields for o in every])}" if where else ""
            raise ValueError(f"{path} describes no picture{there}")
        first = [self._root / one.file for one in self._pictures[:_FIRST_LOOKED_FOR]]
        if not any(place.is_file() for place in first):
            raise ValueError(
                f"{path}: there is no picture {first[0]}; set root to the folder that the names "
                "start from"
            )
        self._keys = picture_keys([one.file for one in self._pictures])
        options = {"root": root, "where": where}
        self.identity = identity(type(self).__name__, options, [self._path])

    @classmethod
    def recognises(cls, place: str) -> bool:
        """A `.json` file with the keys of this format; costs reading it."""
        path = Path(place)
        if path.suffix.lower() != ".json" or not path.is_file():
            return False
        try:
            return cls.fits(_load(path))
        except ValueError:
            return False

    @classmethod
    @abstractmethod
    def fits(cls, content: Any) -> bool:
        """Whether the content of a JSON file is of this format."""

    @classmethod
    @abstractmethod
    def described(cls, content: Any) -> list[Described]:
        """The pictures in the order of the file."""

    def __len__(self) -> int:
        return len(self._pictures)

    def record(self, index: int) -> Record:
        """A picture with all its captions."""
        one, key, origin = self._pictures[index], self._keys[index], self._path.name
        try:
            image = read_file(self._root / one.file)
        except BadSample as fault:
            return Record(key, b"", None, origin=origin, fault=fault)
        fields = {**one.fields, "file": one.file}
        several = one.captions if len(one.captions) > 1 else []
        first = one.captions[0] if one.captions else None
        return Record(key, image, first, fields, origin, captions=several)


class CocoSource(AnnotationSource):
    """COCO's `captions_*.json`: `images` with `id` and `file_name`, `annotations` with captions."""

    @classmethod
    def fits(cls, content: Any) -> bool:
        """Whether there are pictures and captions."""
        return _has_lists(content, "images", "annotations") and any(
            isinstance(one, dict) and "caption" in one for one in content["annotations"][:1000]
        )

    @classmethod
    def described(cls, content: Any) -> list[Described]:
        """The pictures in the order of `images`, captions in that of `annotations`."""
        pictures = {
            one["id"]: Described(
                one["file_name"], {k: v for k, v in one.items() if k not in {"id", "file_name"}}
            )
            for one in content["images"]
        }
        for number, one in pictures.items():
            one.fields["image_id"] = number
        for one in content["annotations"]:
            if one["image_id"] in pictures:
                pictures[one["image_id"]].captions.append(str(one["caption"]))
        return list(pictures.values())


class FlickrSource(AnnotationSource):
    """Karpathy's `dataset_*.json`: `images` with `filename`, `split` and `sentences`."""

    @classmethod
    def fits(cls, content: Any) -> bool:
        """Whether there are pictures with sentences."""
        return _has_lists(content, "images") and any(
            isinstance(one, dict) and "sentences" in one for one in content["images"][:1000]
        )

    @classmethod
    def described(cls, content: Any) -> list[Described]:
        """The pictures in the order of `images`."""
        taken = {"filename", "filepath", "sentences", "sentids"}
        return [
            Described(
                f"{one['filepath']}/{one['filename']}" if one.get("filepath") else one["filename"],
                {name: value for name, value in one.items() if name not in taken},
                [str(sentence["raw"]) for sentence in one["sentences"]],
            )
            for one in content["images"]
        ]


def _has_lists(content: object, *names: str) -> bool:
    return isinstance(content, dict) and all(isinstance(content.get(n), list) for n in names)


def _outline(content: object) -> str:
    if isinstance(content, dict):
        return f"its keys are {', '.join(list(content)[:8])}"
    return f"it holds a {type(content).__name__}"


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None

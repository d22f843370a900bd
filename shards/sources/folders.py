"""Records out of folders: pictures with texts beside them, and pictures sorted into classes."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.damage import BadSample, Reason
from shards.sources.record import (
    PICTURES,
    Record,
    Source,
    identity,
    picture_keys,
    plain,
    read_file,
)


class FolderSource(Source):
    """The pictures below a folder as records, sorted by path.

    `cat.jpg` takes its caption from the list `captions` in `cat.json`, else from `cat.txt`, else
    from `caption` in `cat.json`; the rest of `cat.json` goes to `fields`, and so does the path, as
    `file`. Nothing is read before it is asked for.

    Args:
        folder: Searched with all folders below it; hidden files and folders are passed over.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no picture.
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)
        beside: list[Path] = []
        others: list[str] = []
        self._paths: list[Path] = []
        for path in _files_below(self._folder):
            if path.suffix.lower() in PICTURES:
                self._paths.append(path)
            elif path.suffix in {".txt", ".json"}:
                beside.append(path)
            else:
                others.append(path.name)
        if not self._paths:
            raise ValueError(f"{folder} holds no picture ({', '.join(PICTURES)}){_instead(others)}")
        self._names = [path.relative_to(self._folder).as_posix() for path in self._paths]
        self._keys = picture_keys(self._names)
        self.identity = identity("folder", {}, [*self._paths, *beside])

    @classmethod
    def recognises(cls, place: str) -> bool:
        """Any folder."""
        return Path(place).is_dir()

    def __len__(self) -> int:
        return len(self._paths)

    def record(self, index: int) -> Record:
        """A picture with what lies beside it."""
        path, name, key = self._paths[index], self._names[index], self._keys[index]
        origin = str(self._folder)
        try:
            fields = _json_beside(path)
            several = fields.pop("captions", None)
            several = several if isinstance(several, list) else []
            caption = fields.pop("caption", None)
            text = path.with_suffix(".txt")
            if text.is_file():
                # Bytes that are not UTF-8 survive as surrogates, to be found and told in packing.
                caption = read_file(text).decode("utf-8", "surrogateescape")
            image = read_file(path)
        except BadSample as fault:
            return Record(key, b"", None, origin=origin, fault=fault)
        texts = [one for one in several if isinstance(one, str)]
        caption = caption if isinstance(caption, str) else None
        return Record(key, image, caption, {**fields, "file": plain(name)}, origin, captions=texts)


class ClassSource(Source):
    """Pictures sorted into a folder for each class, as records.

    The caption is made from the class's name; the name itself goes to `fields` as `class`, and its
    number among the sorted names becomes the member `cls`, which readers of classification data
    look for.

    Args:
        folder: Holds one folder of pictures for each class.
        template: Makes a caption of a name; `{}` stands for it, with blanks for underscores.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no classes, or the template has no place for a name.
    """

    def __init__(self, folder: Path | str, *, template: str = "a photo of a {}") -> None:
        self._folder = Path(folder)
        if template.count("{}") != 1 or "{" in template.replace("{}", ""):
            raise ValueError(f"template={template!r} must hold {{}} once, where the name goes")
        self._template = template
        self._paths = [
            path
            for path in _files_below(self._folder)
            if path.suffix.lower() in PICTURES and path.parent != self._folder
        ]
        self._names = [path.relative_to(self._folder).as_posix() for path in self._paths]
        self._keys = picture_keys(self._names)
        self.classes = sorted({self._class(path) for path in self._paths})
        self._numbers = {name: number for number, name in enumerate(self.classes)}
        if not self.classes:
            raise ValueError(f"{folder} holds no class: no folder with a picture in it")
        self.identity = identity("classes", {"template": template}, self._paths)

    @classmethod
    def recognises(cls, place: str) -> bool:
        """Pictures in folders one below the place, none beside those, and no texts anywhere."""
        folder = Path(place)
        if not folder.is_dir():
            return False
        found = False
        for path in _files_below(folder):
            depth = len(path.relative_to(folder).parts)
            is_picture = path.suffix.lower() in PICTURES
            if (is_picture and depth != 2) or (depth > 1 and path.suffix in {".txt", ".json"}):
                return False
            found = found or is_picture
        return found

    def __len__(self) -> int:
        return len(self._paths)

    def record(self, index: int) -> Record:
        """A picture with the caption of its class."""
        path, name, key = self._paths[index], self._names[index], self._keys[index]
        label = self._class(path)
        origin = str(self._folder)
        try:
            image = read_file(path)
        except BadSample as fault:
            return Record(key, b"", None, origin=origin, fault=fault)
        return Record(
            key,
            image,
            self._template.replace("{}", label.replace("_", " ")),
            {"class": plain(label), "file": plain(name)},
            origin,
            members={"cls": str(self._numbers[label]).encode()},
        )

    def _class(self, path: Path) -> str:
        return path.relative_to(self._folder).parts[0]


def _files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, sorted by path; what is hidden is passed over.

    Links to folders are followed, each folder once, so that a loop ends.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; name the folder of the pictures")
    found: list[Path] = []
    seen: set[Path] = set()
    for parent, folders, names in os.walk(folder, onerror=_fail, followlinks=True):
        if (here := Path(parent).resolve()) in seen:
            folders.clear()
            continue
        seen.add(here)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    yield from sorted(found)


def _fail(error: OSError) -> None:
    """A folder that cannot be looked into ends the walk: its pictures would be missing."""
    raise error


def _instead(names: list[str]) -> str:
    """What there is in place of pictures, as its name may be what was meant."""
    more = ", ..." if len(names) > 3 else ""
    return f"; there is {', '.join(names[:3])}{more}" if names else ""


def _json_beside(path: Path) -> dict[str, Any]:
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return {}
    try:
        fields = json.loads(read_file(beside))
    except (ValueError, RecursionError) as error:
        raise BadSample(Reason.BAD_JSON, f"{beside.name}: {error}") from None
    if not isinstance(fields, dict):
        raise BadSample(Reason.BAD_JSON, f"{beside.name} holds a {type(fields).__name__}")
    return fields

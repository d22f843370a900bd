"""What is packed: a picture with its captions, and the law that every source of them obeys."""

import hashlib
import json
import os
import re
import stat
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, overload

from shards.damage import BadSample, Problem, Reason

MAX_KEY = 80
"""Characters of a key; with its extension it must fit the 100 bytes of a tar header."""

PICTURES = (".webp", ".jpg", ".jpeg", ".png", ".gif", ".bmp")
"""Endings of files that are taken for pictures."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_UNFIT = re.compile(r"[^A-Za-z0-9_-]+")
# No picture is larger; a path in a table may name anything, a disk image or an endless device.
_MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Record:
    """One picture with its text, not yet packed.

    Attributes:
        key: Names the record: letters, digits, `_` and `-` (see `safe_key`).
        image: The encoded picture; its format is told by its first bytes.
        caption: Its text, or None if it has none.
        fields: Everything else that is known of it; must be JSON. The name `captions` belongs to
            the captions.
        origin: Where it came from, for messages.
        fault: Why the source could not read all of it, if so.
        captions: All its texts, where it has several; `caption` is then not looked at.
        members: Further files of the sample by extension, such as `{"cls": b"7"}`.
    """

    key: str
    image: bytes
    caption: str | None
    fields: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    fault: BadSample | None = None
    captions: Sequence[str] = ()
    members: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def texts(self) -> tuple[str, ...]:
        """Its captions, none, one or several."""
        if self.captions:
            return tuple(self.captions)
        return () if self.caption is None else (self.caption,)


class Source(Sequence[Record]):
    """Records in a fixed order, read when they are asked for; safe to share between threads.

    A record that cannot be read comes with its `fault`, so that it is told and not lost.

    Attributes:
        problems: What was found bad and has no place in the order.
        identity: Names the source and what lies in it; where it changes, the records may have.
        many: Whether it takes several places at once.
    """

    many: ClassVar[bool] = False
    problems: tuple[Problem, ...] = ()
    identity: str

    @classmethod
    def recognises(cls, place: str) -> bool:
        """Whether a place looks like one of this format; does not raise for damage."""
        del place
        return False

    @abstractmethod
    def record(self, index: int) -> Record:
        """The record at a place of the order, from 0 on."""

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return [self.record(number) for number in range(len(self))[index]]
        return self.record(range(len(self))[index])


def safe_key(name: str) -> str:
    """Turns a name into a key without dots, slashes and blanks, which tools for shards trip over.

    Runs of other characters become one `-`. If anything but slashes was replaced, or the name is
    too long, a hash of it is added, so that different names stay different.

        >>> safe_key("cats/0001"), safe_key("noto-1f600"), safe_key("a b")
        ('cats-0001', 'noto-1f600', 'a-b-c8687a08')
    """
    key = _UNFIT.sub("-", name.strip("/"))
    if not key or len(key) > MAX_KEY or _UNFIT.search(name.replace("/", "-")):
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        key = f"{key[: MAX_KEY - 9]}-{digest}"
    return key


def picture_keys(names: Sequence[str]) -> list[str]:
    """Keys for picture files by their paths, without the ending where that leaves them different.

    >>> picture_keys(["cats/1.jpg", "dog.jpg", "dog.png"])
    ['cats-1', 'dog-jpg-dc8db6b1', 'dog-png-7894056b']
    """
    keys = [safe_key(_stem(name)) for name in names]
    counts = Counter(keys)
    return [
        key if counts[key] == 1 else safe_key(name) for key, name in zip(keys, names, strict=True)
    ]


def template_key(template: str, values: Mapping[str, Any]) -> str:
    """The key that a template such as `"{vendor}-{codepoints}"` makes of a record's values.

    Raises:
        ValueError: If the template asks for what there is not.
    """
    try:
        return safe_key(template.format(**values))
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(
            f"key={template!r} cannot be made ({error!r}); there is {', '.join(map(str, values))}"
        ) from None


def _stem(name: str) -> str:
    stem, dot, ending = name.rpartition(".")
    return stem if dot and f".{ending.lower()}" in PICTURES else name


def read_file(path: Path) -> bytes:
    """The bytes of a picture, or of a text beside one.

    Raises:
        BadSample: If there is no such file, or it is too large for either.
    """
    try:
        # Not blocking: a path may name a pipe that nobody writes to.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            facts = os.fstat(stream.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise BadSample(Reason.UNREADABLE, f"{path} is no file")
            if facts.st_size > _MAX_BYTES:
                raise BadSample(Reason.TOO_MANY_BYTES, f"{facts.st_size} bytes")
            return stream.read()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in a path
        cause = error.strerror if isinstance(error, OSError) else error
        raise BadSample(Reason.UNREADABLE, f"{path}: {cause}") from None


def plain(text: str) -> str:
    """A text without surrogates, which stand for bytes that are not UTF-8."""
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def keeps(where: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether a record with these values is one that `where` keeps."""
    return all(
        values.get(name) in (wanted if isinstance(wanted, list | tuple | set) else [wanted])
        for name, wanted in where.items()
    )


def offers(where: Mapping[str, Any], entries: Iterable[Mapping[str, Any]]) -> str:
    """What there is in the fields of a filter that left nothing."""
    found: dict[str, dict[str, None]] = {name: {} for name in where}
    for entry in entries:
        for name, values in found.items():
            if name in entry and len(values) <= 8:
                values[str(entry[name])] = None
    return "; ".join(
        f"{name} is one of {', '.join(list(values)[:8])}{', ...' if len(values) > 8 else ''}"
        if values
        else f"there is no {name}"
        for name, values in found.items()
    )


def identity(kind: str, options: Mapping[str, Any], files: Iterable[Path]) -> str:
    """Names a source: its format, its options, and name, size and time of each of its files."""
    digest = hashlib.sha256(json.dumps([kind, options], default=str, sort_keys=True).encode())
    for path in files:
        line = f"\0{path.absolute()}"
        with suppress(OSError):  # a link that leads nowhere is told when it is read
            facts = path.stat()
            line += f"\0{facts.st_size}\0{facts.st_mtime_ns}"
        digest.update(line.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()

"""What is inside a tar file: its members, and the samples they form, by one walk over the headers.

The walk never stops at damage. After a header that does not check out it searches on, block by
block, for the next one that does, so a flipped bit costs one member and not the rest of the shard;
everything that was passed over is told as a `Problem`.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from shards.damage import Problem, Reason

_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
_FILE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_NAME_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
# Long names and extended headers are small; a larger one is damage and is not read into memory.
_MAX_EXTENDED_BYTES = 1 << 20
_PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")


@dataclass(frozen=True)
class Member:
    """One regular file in a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


@dataclass
class TarSample:
    """The members that share a key.

    Attributes:
        key: The name up to the dot at which it was split, folders included.
        spans: Offset and size of each field; a field is what follows that dot, in lower case.
    """

    key: str
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass
class TarContent:
    """Everything one walk over a tar file finds out.

    Attributes:
        name: The tar's file name.
        samples: In the order of their first member.
        problems: What was damaged, unsafe, or passed over.
        bytes: Size of the file.
        headers: SHA-256 of all headers: names, sizes and times, without reading the contents.
        sha256: SHA-256 of the whole file, where somebody took it; the walk does not.
        version: What `Storage.version` said before the walk, where somebody asked.
    """

    name: str
    samples: list[TarSample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    bytes: int = 0
    headers: str = ""
    sha256: str = ""
    version: str = ""

    def tell(self, reason: Reason, key: str, detail: str) -> None:
        """Notes a problem."""
        self.problems.append(Problem(self.name, key, reason, detail))


def read_tar(source: Path | BinaryIO, name: str = "") -> TarContent:
    """Walks over the headers of an uncompressed tar file and groups its members into samples.

    A name is split into key and field at its first dot, as webdataset does (`a.jpg` and `a.seg.png`
    are one sample), unless no neighbour with the same stem has a plain extension: `img.v1.0001.jpg`
    and `img.v1.0002.jpg` are two samples, split at the last dot, which webdataset silently merges.
    Members of one sample that do not lie side by side are brought together and told as a problem.

    Args:
        source: The tar file, or a stream of it that can seek.
        name: What the shard is called, where a stream does not say it.
    """
    content = TarContent(source.name if isinstance(source, Path) else name)
    with source.open("rb", buffering=1 << 16) if isinstance(source, Path) else source as stream:
        members = _Walk(stream, content).members()
        named = ((_split(member.name), member) for member in members)
        grouping = _Grouping(content)
        for _, run in groupby(named, key=lambda pair: pair[0][0]):
            pairs = list(run)
            plain = any("." not in name for (_, name), _ in pairs)
            for (key, name), member in pairs:
                if not plain:
                    *middle, name = name.split(".")
                    key = ".".join([key, *middle])
                grouping.add(key, name.lower(), member)
    return content


def unsafe(name: str) -> str:
    """Why a member name must not be used, or an empty string for a good one.

    A name must not lead out of a folder it may later be written to, and must be printable text.
    """
    if not name.isprintable():
        return "not printable text"
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or re.match(r"[A-Za-z]:", name):
        return "leads out of its folder"
    return ""


def _split(name: str) -> tuple[str, str]:
    """Key and field of a member name, split at the first dot after the last slash."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


@dataclass
class _Grouping:
    """Puts members into samples, one after the other."""

    content: TarContent
    by_key: dict[str, TarSample] = field(default_factory=dict)
    current: TarSample | None = None

    def add(self, key: str, name: str, member: Member) -> None:
        sample = self.by_key.get(key)
        if sample is None or name in sample.spans:
            if sample is not None:
                self.content.tell(Reason.DUPLICATE_KEY, key, f"a second {name!r}, a sample apart")
            sample = self.by_key[key] = TarSample(key)
            self.content.samples.append(sample)
        elif sample is not self.current:
            self.content.tell(Reason.SPLIT_SAMPLE, key, f"{name!r} lies apart; brought together")
        sample.spans[name] = (member.offset, member.size)
        self.current = sample


class _Walk:
    """One walk over a tar file, header by header."""

    def __init__(self, stream: BinaryIO, content: TarContent) -> None:
        self.stream = stream
        self.content = content
        self.end = content.bytes = stream.seek(0, 2)

    def members(self) -> Iterator[Member]:
        """Yields the usable members; on the way fills in problems and the hash of the headers."""
        digest = hashlib.sha256()
        offset, lost_from, closed = 0, -1, False
        extended: dict[str, str] = {}
        while offset < self.end:
            block = self._read(offset, _BLOCK)
            if block == _ZEROS[: len(block)]:
                closed = True
                offset += _BLOCK
                continue
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                body, size = offset + _BLOCK, int(extended.get("size", header.size))
                if size < 0:
                    raise tarfile.HeaderError("negative size")
            except (tarfile.HeaderError, ValueError):
                lost_from, closed = (offset if lost_from < 0 else lost_from), False
                offset += _BLOCK
                continue
            self._tell_lost(lost_from, offset)
            lost_from, closed = -1, False
            digest.update(block)
            if header.type in _NAME_TYPES + _PAX_TYPES:
                extended.update(self._extended(header.type, body, header.size))
                offset = _next_header(body, header.size)
                continue
            if header.type in _FILE_TYPES:
                member = Member(extended.get("path", header.name), body, size)
                if self._usable(member):
                    yield member
            elif header.type != tarfile.DIRTYPE:
                self.content.tell(Reason.NOT_A_FILE, "", f"{header.name!r} is a link or a device")
            extended = {}
            has_body = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
            offset = _next_header(body, size if has_body else 0)
        self._tell_lost(lost_from, self.end)
        if not closed and lost_from < 0:
            self.content.tell(Reason.TRUNCATED, "", f"cut off at byte {self.end}: no end marker")
        self.content.headers = digest.hexdigest()

    def _read(self, offset: int, size: int) -> bytes:
        self.stream.seek(offset)
        return self.stream.read(size)

    def _extended(self, kind: bytes, body: int, size: int) -> dict[str, str]:
        """What a long-name or PAX header says of the member that follows: `path` and `size`."""
        data = self._read(body, min(size, _MAX_EXTENDED_BYTES))
        if kind == tarfile.GNUTYPE_LONGNAME:
            return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
        found: dict[str, str] = {}
        start = 0
        while kind in _PAX_TYPES and (record := _PAX_RECORD.match(data, start)):
            stop = start + int(record[1])
            if record[2] in (b"path", b"size") and stop > record.end():
                value = data[record.end() : stop - 1].decode("utf-8", "surrogateescape")
                found[record[2].decode()] = value
            start = max(stop, record.end())
        return found

    def _usable(self, member: Member) -> bool:
        """Whether a member belongs to a sample; tells the reason where one might be missed."""
        if reason := unsafe(member.name):
            self.content.tell(Reason.UNSAFE_NAME, "", f"{member.name!r} {reason}")
            return False
        stem, extension = _split(member.name)
        base = PurePosixPath(stem).name
        hidden = stem.endswith("/") or not stem
        meta = base.startswith("__") and base.endswith("__")
        return bool(extension) and not hidden and not meta

    def _tell_lost(self, start: int, stop: int) -> None:
        if start >= 0:
            self.content.tell(
                Reason.BAD_HEADER, "", f"bytes {start} to {stop} were passed over: no valid header"
            )


def _next_header(body: int, size: int) -> int:
    """Where the header after a body of `size` bytes lies."""
    return body + (size + _BLOCK - 1) // _BLOCK * _BLOCK

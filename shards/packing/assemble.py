"""Shards out of records: what goes into each member, and several shards written at a time."""

import hashlib
import json
import re
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from shards.atomic import replacing
from shards.damage import BadSample, Problem, Reason, TooMuchDamageError
from shards.decode import Limits, decode_caption, decode_fields
from shards.manifest import CAPTION_FIELD, JSON_FIELD
from shards.packing.recode import Recode, Recoded, recode
from shards.packing.work import WorkFolder
from shards.sources import MAX_KEY, Record
from shards.sources.record import plain
from shards.tar import TarContent, read_tar

_FIT_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY}}}")
_Members = dict[str, str | bytes]


@dataclass(frozen=True)
class Rules:
    """What a shard is made by.

    Attributes:
        limits: What a record may ask for.
        recoding: What becomes of pictures.
        strict: Stop at the first bad record.
        rows: Whether to note a row for each record, for sidecars.
    """

    limits: Limits
    recoding: Recode
    strict: bool
    rows: bool

    def members(self, record: Record) -> tuple[_Members, Recoded]:
        """What goes into the tar, after everything that the loader will do to it succeeded."""
        if record.fault is not None:
            raise record.fault
        picture = recode(record.image, self.recoding, limits=self.limits)
        if not record.texts:
            raise BadSample(Reason.NO_CAPTION, "none was given")
        captions = self._captions(record)
        fields = {name: value for name, value in record.fields.items() if name != "captions"}
        members: _Members = {"__key__": record.key, **record.members}
        members[picture.extension] = picture.data
        members[CAPTION_FIELD] = captions[0].encode("utf-8", "surrogatepass")
        if len(captions) > 1:
            fields["captions"] = captions
            lines = "\n".join(" ".join(caption.split()) for caption in captions)
            members[CAPTION_FIELD] = lines.encode("utf-8", "surrogatepass")
        if fields:
            text = json.dumps(fields, ensure_ascii=False, sort_keys=True, default=str)
            data = text.encode("utf-8", "surrogatepass")
            decode_fields(data, limits=self.limits)
            members[JSON_FIELD] = data
        return members, picture

    def _captions(self, record: Record) -> list[str]:
        """The captions that are not empty; at least one."""
        captions: list[str] = []
        empty: BadSample | None = None
        for caption in record.texts:
            try:
                decode_caption(caption.encode("utf-8", "surrogatepass"), limits=self.limits)
                captions.append(caption)
            except BadSample as bad:
                if bad.reason != Reason.EMPTY_CAPTION:
                    raise
                empty = bad
        if empty is not None and not captions:
            raise empty
        return captions


@dataclass
class WrittenShard:
    """A shard that is whole.

    Attributes:
        number: Its place among all that are written.
        content: The walk over it.
        note: What the work folder notes of it.
    """

    number: int
    content: TarContent
    note: dict[str, Any]

    @property
    def problems(self) -> list[Problem]:
        """Its bad records."""
        return [
            Problem(**{**one, "reason": Reason(one["reason"])}) for one in self.note["problems"]
        ]


class _Stopped(Exception):  # noqa: N818 - tells a thread to end, and is never seen
    """Another shard failed, or somebody pressed Ctrl-C."""


class ShardWriter:
    """Writes shards, several at a time, and gives them in order.

    Args:
        work: Where to; shards that are finished there are taken as they are.
        rules: What they are made by.
        done: Called with a number of records whenever these are done, from any thread.
    """

    def __init__(self, work: WorkFolder, rules: Rules, done: Callable[[int], None]) -> None:
        self._work, self._rules, self._done = work, rules, done
        self._stop = threading.Event()

    def all(self, batches: Iterator[Iterable[Record]], workers: int) -> Generator[WrittenShard]:
        """The shards in order, each whole; after an error, or closed, all threads end at once.

        Args:
            batches: The records of each shard.
            workers: Threads, which may take batches in any order; 0 writes in this one.
        """
        numbered = enumerate(batches)
        if workers == 0:
            yield from (self._shard(number, batch) for number, batch in numbered)
            return
        pool = ThreadPoolExecutor(workers, "pack")
        pending: deque[Future[WrittenShard]] = deque()
        try:
            for number, batch in numbered:
                pending.append(pool.submit(self._shard, number, batch))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BaseException:
            self._stop.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _shard(self, number: int, records: Iterable[Record]) -> WrittenShard:
        path = self._work.shard(number)
        note = self._work.finished(number)
        if note is None:
            note = self._write(path, records)
            self._work.finish(number, note)
        else:
            self._done(note["records"])
        return WrittenShard(number, read_tar(path), note)

    def _write(self, path: Path, records: Iterable[Record]) -> dict[str, Any]:
        """Writes a shard, whole or not at all."""
        problems: list[Problem] = []
        rows: list[dict[str, Any]] = []
        seen = 0
        with (
            replacing(path) as stream,
            TarWriter(stream, encoder=False, mtime=0, user="", group="") as tar,
        ):
            for record in records:
                seen += 1
                if self._stop.is_set():
                    raise _Stopped
                if not _FIT_KEY.fullmatch(record.key):
                    raise ValueError(
                        f"the key {record.key!r} is unfit: at most {MAX_KEY} letters, digits, "
                        "_ and -"
                    )
                picture = bad = None
                try:
                    members, picture = self._rules.members(record)
                    tar.write(members)
                except BadSample as found:
                    bad = found
                    problems.append(Problem(record.origin, record.key, bad.reason, bad.detail))
                    if self._rules.strict:
                        raise too_strict(problems[0]) from None
                if self._rules.rows:
                    rows.append(_row(record, picture, bad))
                self._done(1)
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            md5 = hashlib.file_digest(stream, "md5").hexdigest()
        return {
            "bytes": path.stat().st_size,
            "sha256": sha256,
            "md5": md5,
            "records": seen,
            "problems": [problem.as_dict() for problem in problems],
            "rows": rows,
        }


def _row(record: Record, picture: Recoded | None, bad: BadSample | None) -> dict[str, Any]:
    """What img2dataset would note of a record."""
    width, height = picture.size if picture else (None, None)
    original_width, original_height = picture.original if picture else (None, None)
    file = record.fields.get("file")
    return {
        "url": plain(file if isinstance(file, str) else record.origin),
        "caption": plain(record.texts[0]) if record.texts else None,
        "key": record.key,
        "status": "failed_to_resize" if bad else "success",
        "error_message": plain(str(bad)) if bad else None,
        "width": width,
        "height": height,
        "original_width": original_width,
        "original_height": original_height,
        "sha256": hashlib.sha256(record.image).hexdigest() if record.image else None,
    }


def too_strict(problem: Problem) -> TooMuchDamageError:
    """The error that ends a strict pack."""
    return TooMuchDamageError(f"{problem}; strict packing stops here")

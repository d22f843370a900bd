"""What is inside the samples: every one decoded as the loader would, and told as plain numbers."""

import hashlib
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt64
from numpy import ndarray
from PIL import Image

from shards.audit.survey import Spread
from shards.captions import CaptionRule
from shards.damage import BadSample, Problem, Reason
from shards.decode import Limits, decode_image, sniff_extension
from shards.manifest import CAPTION_FIELD, JSON_FIELD, Manifest
from shards.order import hash64
from shards.prefetch import ordered_map
from shards.read import ShardReader

SKETCH_SIDE = 32
"""Side of the small picture that is made of every picture."""

_DRAW = 0x64726177  # keeps this draw apart from others over the same counters
_CHUNK = 32
_SAME_FORMAT = {"jpeg": "jpg"}


@dataclass(frozen=True)
class Sight:
    """One sample, looked at.

    Attributes:
        problem: Why the loader cannot use it, if so; what else is known of it is told all the same.
        captions: Its captions.
        format: The picture's format, by its first bytes.
        misnamed: Whether the picture's name says another format.
        width: Pixels, upright; 0 without a picture.
        height: Pixels, upright; 0 without a picture.
        bytes: Size of the encoded picture.
        sketch: The picture at 32 x 32.
        file_digest: 64 bits of a hash of the encoded picture.
        pixel_digest: 64 bits of a hash of the decoded picture.
    """

    problem: Problem | None = None
    captions: tuple[str, ...] = ()
    format: str = ""
    misnamed: bool = False
    width: int = 0
    height: int = 0
    bytes: int = 0
    sketch: UInt8[ndarray, "32 32 3"] | None = None
    file_digest: int = 0
    pixel_digest: int = 0


def draw(manifest: Manifest, count: int, *, seed: int = 0) -> Int64[ndarray, " n"]:
    """At most `count` samples, drawn at random without repeats, sorted; the same every time."""
    bits = hash64(seed, _DRAW, np.arange(len(manifest)))
    return np.sort(np.argsort(bits, kind="stable")[:count]).astype(np.int64)


def examine(
    manifest: Manifest,
    samples: Int64[ndarray, " n"],
    *,
    workers: int = 0,
    limits: Limits | None = None,
    captions: CaptionRule | None = None,
) -> Iterator[list[tuple[int, Sight]]]:
    """Looks at samples, some at a time, in their order.

    A sample has a problem exactly where the loader would find it bad, and for the same reason.

    Args:
        manifest: The data set.
        samples: Sample ids.
        workers: Background threads that decode.
        limits: What a sample may ask for.
        captions: Where captions stand.

    Yields:
        Samples with what was seen, a few dozen at a time.
    """
    eye = _Eye(manifest, limits or Limits(), captions or CaptionRule())
    chunks = (samples[start : start + _CHUNK] for start in range(0, len(samples), _CHUNK))

    def look(chunk: ndarray) -> list[tuple[int, Sight]]:
        return [(sample, eye.look(sample)) for sample in chunk.tolist()]

    stream = ordered_map(look, chunks, workers=workers, ahead=2 * workers)
    try:
        yield from stream
    finally:
        stream.close()
        eye.reader.close()


class _Eye:
    """Looks at one sample at a time; safe to share between threads."""

    def __init__(self, manifest: Manifest, limits: Limits, captions: CaptionRule) -> None:
        self.manifest = manifest
        self.limits = limits
        self.captions = captions
        self.reader = ShardReader(manifest, max_bytes=limits.image_bytes)

    def look(self, sample: int) -> Sight:
        manifest = self.manifest
        choice = int(manifest.image_choice[sample])
        if choice < 0:
            bad = BadSample(Reason.NO_IMAGE, "none of its members is a picture")
            return Sight(self._problem(sample, bad))
        name = manifest.image_fields[choice]
        try:
            members = self.reader.read(sample, (name, CAPTION_FIELD, JSON_FIELD))
        except BadSample as bad:
            return Sight(self._problem(sample, bad))
        captions: list[str] = []
        problem = None
        try:
            captions, _ = self.captions.read(members, self.limits)
        except BadSample as bad:
            problem = self._problem(sample, bad)
        data = members[name]
        about: dict[str, Any] = {"captions": tuple(captions), "bytes": len(data)}
        try:
            pixels = decode_image(data, limits=self.limits)
        except BadSample as bad:
            return Sight(problem or self._problem(sample, bad), **about)
        kind = sniff_extension(data) or ""
        return Sight(
            problem,
            **about,
            format=kind,
            misnamed=kind != _SAME_FORMAT.get(name, name),
            width=pixels.shape[1],
            height=pixels.shape[0],
            sketch=_sketch(pixels),
            file_digest=_digest(data),
            pixel_digest=_digest(repr(pixels.shape).encode(), np.ascontiguousarray(pixels)),
        )

    def _problem(self, sample: int, bad: BadSample) -> Problem:
        return self.manifest.problem(sample, bad.reason, bad.detail)


class Prospect:
    """Collects what was seen into arrays: some dozen bytes a sample, and no pictures.

    Args:
        samples: How many samples will be seen.

    Attributes:
        ids: Their sample ids, in the order in which they were seen.
        has_picture: Which of them have a picture that can be decoded.
        file_digests: Of their encoded pictures.
        pixel_digests: Of their decoded pictures.
        problems: What is wrong with the bad ones, by sample id.
    """

    def __init__(self, samples: int) -> None:
        self.seen = 0
        self.ids: Int64[ndarray, " n"] = np.zeros(samples, np.int64)
        self.has_picture: Bool[ndarray, " n"] = np.zeros(samples, bool)
        self.file_digests: UInt64[ndarray, " n"] = np.zeros(samples, np.uint64)
        self.pixel_digests: UInt64[ndarray, " n"] = np.zeros(samples, np.uint64)
        self.problems: dict[int, Problem] = {}
        self._sizes = np.zeros((samples, 3), np.int64)
        self._formats: Counter[str] = Counter()
        self._misnamed = 0
        self._captions_of: array[int] = array("q")
        self._caption_digests: array[int] = array("Q")
        self._characters: array[int] = array("q")
        self._words: array[int] = array("q")
        self._scripts: Counter[str] = Counter()
        self._per_picture: Counter[int] = Counter()

    def add(self, sample: int, sight: Sight) -> None:
        """Takes in one sample."""
        row, self.seen = self.seen, self.seen + 1
        self.ids[row] = sample
        if sight.problem is not None:
            self.problems[sample] = sight.problem
        if sight.sketch is not None:
            self.has_picture[row] = True
            self.file_digests[row] = sight.file_digest
            self.pixel_digests[row] = sight.pixel_digest
            self._sizes[row] = sight.width, sight.height, sight.bytes
            self._formats[sight.format] += 1
            self._misnamed += sight.misnamed
        if sight.captions:
            self._per_picture[len(sight.captions)] += 1
        for caption in sight.captions:
            self._captions_of.append(row)
            self._caption_digests.append(_digest(plain_caption(caption).encode()))
            self._characters.append(len(caption))
            self._words.append(len(caption.split()))
            self._scripts[script(caption)] += 1

    @property
    def sizes(self) -> Int64[ndarray, "n 3"]:
        """Width, height and bytes of each picture that can be decoded."""
        return self._sizes[self.has_picture]

    @property
    def characters(self) -> Int64[ndarray, " c"]:
        """Length of each caption."""
        return np.array(self._characters, np.int64)

    @property
    def words(self) -> Int64[ndarray, " c"]:
        """Words of each caption, as white space parts them."""
        return np.array(self._words, np.int64)

    @property
    def caption_digests(self) -> UInt64[ndarray, " c"]:
        """64 bits of a hash of each caption, case and white space apart."""
        return np.array(self._caption_digests, np.uint64)

    @property
    def caption_rows(self) -> Int64[ndarray, " c"]:
        """The row, among those seen, that each caption belongs to."""
        return np.array(self._captions_of, np.int64)

    def repeated_captions(self, most: int) -> list[tuple[int, int, int]]:
        """The captions met most often: how often, a sample that has it, and which of its own."""
        digests = self.caption_digests
        _, first, counts = np.unique(digests, return_index=True, return_counts=True)
        order = np.lexsort((first, -counts))[:most]
        rows = self.caption_rows
        return [
            (int(counts[k]), int(self.ids[rows[first[k]]]),
             int(first[k] - np.searchsorted(rows, rows[first[k]])))
            for k in order if counts[k] > 1
        ]  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """All of it as plain numbers, for JSON."""
        width, height, size = self.sizes.T
        return {
            "seen": self.seen,
            "bad": len(self.problems),
            "reasons": dict(
                Counter(problem.reason.value for problem in self.problems.values()).most_common()
            ),
            "pictures": {
                "count": int(self.has_picture.sum()),
                "formats": dict(self._formats.most_common()),
                "under_another_formats_name": self._misnamed,
                "width": asdict(Spread.of(width)),
                "height": asdict(Spread.of(height)),
                "shorter_side": asdict(Spread.of(np.minimum(width, height))),
                "aspect": asdict(Spread.of(width / np.maximum(height, 1))),
                "bytes": asdict(Spread.of(size)),
            },
            "captions": {
                "count": len(self._characters),
                "distinct": len(np.unique(self.caption_digests)),
                "per_picture": {str(k): n for k, n in sorted(self._per_picture.items())},
                "characters": asdict(Spread.of(self.characters)),
                "words": asdict(Spread.of(self.words)),
                "scripts": dict(self._scripts.most_common()),
            },
        }


def plain_caption(caption: str) -> str:
    """A caption as two are compared: case and runs of white space do not count."""
    return " ".join(caption.casefold().split())


def script(caption: str) -> str:
    """The script that most letters of a caption belong to, as Unicode names it.

    The first word of a letter's Unicode name stands for its script, which is the script for all
    but a few rare letters.

        >>> script("red heart"), script("красное сердце"), script("赤いハート"), script("100 %")
        ('latin', 'cyrillic', 'katakana', 'none')
    """
    if caption.isascii():
        return "latin" if any(map(str.isalpha, caption)) else "none"
    letters = Counter(filter(None, map(_script_of, caption)))
    return letters.most_common(1)[0][0] if letters else "none"


@lru_cache(maxsize=1 << 16)
def _script_of(character: str) -> str:
    """The script of a letter; empty for anything else."""
    if not character.isalpha():
        return ""
    return unicodedata.name(character, "unnamed").partition(" ")[0].partition("-")[0].lower()


def _sketch(pixels: UInt8[ndarray, "h w 3"]) -> UInt8[ndarray, "32 32 3"]:
    small = Image.fromarray(pixels).resize(
        (SKETCH_SIDE, SKETCH_SIDE), Image.Resampling.BOX, reducing_gap=2.0
    )
    return np.asarray(small)


def _digest(*parts: Any) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


def captions_of(
    manifest: Manifest, samples: Sequence[int], *, captions: CaptionRule | None = None
) -> list[list[str]]:
    """The captions of some samples, as they are written; empty for a bad one."""
    rule = captions or CaptionRule()
    reader = ShardReader(manifest)
    found: list[list[str]] = []
    for sample in samples:
        try:
            members = reader.read(int(sample), (CAPTION_FIELD, JSON_FIELD))
            found.append(rule.read(members, Limits())[0])
        except BadSample:
            found.append([])
    reader.close()
    return found

"""What a check-up looks at in the data: some samples of every shard, and what becomes of them."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from align.tokenizer import Tokenizer
from pipelines.captions import CaptionWriter
from pipelines.checkup.report import CheckUp, percent, several, size
from pipelines.pairs import chosen
from pipelines.schemas import PretrainConfig
from pipelines.schemas.values import samples_of
from shards.captions import CaptionRule
from shards.damage import BadSample, Problem, Reason
from shards.decode import Limits, decode_fields, decode_image
from shards.manifest import CAPTION_FIELD, IMAGE_FIELDS, JSON_FIELD, Manifest
from shards.prefetch import ordered_map
from shards.read import ShardReader

_PER_SHARD, _IN_ALL = 2, 256
# Places far away are asked for several samples at a time.
_REMOTE_WORKERS = 8
_VOCABULARY_SAMPLES, _VOCABULARY_SHARDS = 20_000, 32
_EXAMPLES = 3
_WHERE_SAMPLES = 2000
_VALIDATION_SHARDS, _VALIDATION_SECONDS = 16, 5.0
_FEW = 0.01
_MANY = 0.2


@dataclass(frozen=True)
class Seen:
    """One good sample: what it says, and the shorter side of its picture."""

    row: int
    key: str
    captions: list[str]
    fields: dict[str, Any]
    side: int


@dataclass
class Look:
    """Samples spread over the shards of a data set, read and decoded.

    Attributes:
        manifest: The data set.
        seen: The good samples.
        bad: What is wrong with the others, by row.
    """

    manifest: Manifest
    seen: list[Seen] = field(default_factory=list)
    bad: dict[int, Problem] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Samples looked at."""
        return len(self.seen) + len(self.bad)

    @property
    def shards(self) -> list[int]:
        """Numbers of the shards that were looked into."""
        return sorted({*self._shards_of([one.row for one in self.seen] + list(self.bad))})

    @property
    def bad_share(self) -> float:
        """Estimate of the share of bad samples; a shard counts by its size."""
        good = Counter(self._shards_of([one.row for one in self.seen]))
        bad = Counter(self._shards_of(list(self.bad)))
        looked = good + bad
        sizes = {number: self.manifest.shards[number].samples for number in looked}
        expected = sum(sizes[number] * bad[number] / looked[number] for number in bad)
        return expected / max(1, sum(sizes.values()))

    @property
    def dead_shards(self) -> list[str]:
        """Shards of which no sample could be used."""
        good = {*self._shards_of([one.row for one in self.seen])}
        return [
            self.manifest.shards[number].name
            for number in sorted({*self._shards_of(list(self.bad))} - good)
        ]

    def reasons(self) -> str:
        """Bad samples by reason, as `3 x no caption, 1 x truncated`."""
        return _counts(self.bad.values())

    def _shards_of(self, rows: Sequence[int]) -> list[int]:
        return self.manifest.shard_numbers[np.array(rows, np.int64)].tolist()


def look(manifest: Manifest, rule: CaptionRule, *, shards: int, seconds: float) -> Look:
    """Read and decode samples of many shards: first one of each, then more.

    Args:
        manifest: The data set.
        rule: Where captions stand.
        shards: Shards to look into at most, spread evenly.
        seconds: When to stop, done or not.
    """
    filled = np.flatnonzero([shard.samples for shard in manifest.shards])
    spread = np.linspace(0, len(filled) - 1, min(shards, len(filled)))
    numbers = filled[np.unique(spread.round().astype(int))].tolist()
    found = Look(manifest)
    reader = ShardReader(manifest)

    def one(row: int) -> Seen | Problem:
        try:
            return _seen(manifest, reader, rule, row)
        except BadSample as bad:
            return manifest.problem(row, bad.reason, bad.detail)

    rows = _rows(manifest, numbers)
    local = all(storage.folder is not None for storage in manifest.storages)
    workers = 0 if local else _REMOTE_WORKERS
    until = time.perf_counter() + seconds
    results = ordered_map(one, rows, workers=workers, ahead=2 * workers)
    try:
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, Problem):
                found.bad[row] = result
            else:
                found.seen.append(result)
            if time.perf_counter() > until:
                break
    finally:
        results.close()
        reader.close()
    return found


def _rows(manifest: Manifest, shards: Sequence[int]) -> list[int]:
    """Rows of the samples to look at: the first of every shard, the last, and some between."""
    sizes = np.array([shard.samples for shard in manifest.shards], np.int64)
    starts = np.cumsum(sizes) - sizes
    each = max(_PER_SHARD, -(-_IN_ALL // len(shards)))
    turns: dict[int, None] = {}
    for turn in [0, each - 1, *range(1, each - 1)]:
        for number in shards:
            turns[int(starts[number] + turn * (sizes[number] - 1) // (each - 1))] = None
    return list(turns)


def _seen(manifest: Manifest, reader: ShardReader, rule: CaptionRule, row: int) -> Seen:
    choice = int(manifest.image_choice[row])
    if choice < 0:
        raise BadSample(Reason.NO_IMAGE, "none of its members is a picture")
    name = manifest.image_fields[choice]
    members = reader.read(row, (name, CAPTION_FIELD, JSON_FIELD))
    captions, fields = rule.read(members, Limits())
    pixels = decode_image(members[name])
    return Seen(row, manifest.keys[row].as_py(), captions, fields, min(pixels.shape[:2]))


def check_samples(check: CheckUp, config: PretrainConfig, found: Look) -> None:
    """Shards and samples: what there is, what cannot be used, what was left out before."""
    manifest = found.manifest
    total = sum(shard.bytes for shard in manifest.shards)
    check.ok(
        "data",
        f"{several(len(manifest), 'sample')} in {several(len(manifest.shards), 'shard')}, "
        f"{size(total)}; fields {', '.join(manifest.fields)}; "
        f"fingerprint {manifest.fingerprint[:12]}",
    )
    _check_bad(check, config, found)
    if manifest.problems:
        check.note(
            "left out",
            f"known before and no part of the order: {_counts(manifest.problems)}; first: "
            f"{manifest.problems[0]}",
            "align inspect lists them all and repairs what can be repaired",
        )
    _check_keys(check, manifest)


def _check_bad(check: CheckUp, config: PretrainConfig, found: Look) -> None:
    looked = (
        f"{several(found.count, 'sample')} of {several(len(found.shards), 'shard')} read and "
        "decoded"
    )
    check.numbers["bad_share"] = found.bad_share
    if not found.bad:
        check.ok("samples", f"{looked}, all good")
        return
    first = next(iter(found.bad.values()))
    text = f"{looked}; {found.reasons()}, about {percent(found.bad_share)} of all; first: {first}"
    verify = "align inspect --verify finds every one and has them left out"
    if config.strict:
        check.problem("samples", text, f"strict stops at the first; {verify}")
    elif found.bad_share > config.max_bad_fraction:
        most = percent(config.max_bad_fraction)
        check.problem("samples", text, f"max_bad_fraction stops the run at {most}; {verify}")
    else:
        check.note("samples", text, f"others take their place; {verify}")
    if dead := found.dead_shards:
        check.note(
            "shards",
            f"{len(dead)} of {len(found.shards)} gave no sample: {', '.join(dead[:_EXAMPLES])}"
            + (", ..." if len(dead) > _EXAMPLES else ""),
            "fetch or pack them again",
        )


def _check_keys(check: CheckUp, manifest: Manifest) -> None:
    """Names with dots: several pictures under one key, or keys that other readers would merge."""
    pictures = [name for name in manifest.fields if name.rpartition(".")[2] in IMAGE_FIELDS]
    per_sample = np.zeros(len(manifest), np.int64)
    for name in pictures:
        per_sample += manifest.spans[name][0] >= 0
    merged = np.flatnonzero(per_sample > 1)
    if len(merged):
        key = manifest.keys[int(merged[0])].as_py()
        check.note(
            "keys",
            f"{several(len(merged), 'sample')} with several pictures ({', '.join(pictures[:6])}), "
            f"of which one is used; they look merged; first: {key!r}",
            "if each is a sample of its own, give them names without dots: align pack does",
        )
        return
    rows = np.unique(np.linspace(0, len(manifest) - 1, _WHERE_SAMPLES).astype(np.int64))
    keys = manifest.keys.take(rows).to_pylist()
    dotted = [key for key in keys if "." in PurePosixPath(key).name]
    if dotted:
        check.note(
            "keys",
            f"{percent(len(dotted) / len(keys))} of the keys have dots, such as {dotted[0]!r}; "
            "they are told apart here, but other readers merge them",
            "align pack writes keys without dots",
        )


def sampled(manifest: Manifest) -> Manifest:
    """A data set small enough to train a vocabulary on in seconds: runs of samples, spread."""
    if len(manifest) <= _VOCABULARY_SAMPLES:
        return manifest
    sizes = np.array([shard.samples for shard in manifest.shards], np.int64)
    starts, filled = np.cumsum(sizes) - sizes, np.flatnonzero(sizes)
    spread = np.linspace(0, len(filled) - 1, min(_VOCABULARY_SHARDS, len(filled)))
    numbers = filled[np.unique(spread.round().astype(int))]
    rows = np.zeros(len(manifest), bool)
    for number in numbers.tolist():
        run = min(int(sizes[number]), _VOCABULARY_SAMPLES // len(numbers))
        rows[starts[number] : starts[number] + run] = True
    return manifest.kept(rows, problems=(), note="sampled")


def check_captions(
    check: CheckUp, config: PretrainConfig, found: Look, writer: CaptionWriter
) -> list[str]:
    """Captions as the text tower gets them; returns them, written by the templates."""
    ids = np.array([one.row for one in found.seen], np.int64)
    firsts = [one.captions[0] for one in found.seen]
    texts = writer(firsts, [one.fields for one in found.seen], ids=ids, epochs=np.zeros_like(ids))
    some = np.unique(np.linspace(0, len(texts) - 1, _EXAMPLES).astype(int)).tolist()
    shown = ", ".join(_short(texts[place]) for place in some)
    average = np.mean([len(one.captions) for one in found.seen])
    several_each = f"; {average:.1f} captions a sample" if average > 1 else ""
    [(text, most)] = Counter(texts).most_common(1)
    check.judge(
        most <= max(2, _MANY * len(texts)),
        "captions",
        f"{shown}{several_each}"
        + (f"; {percent(most / len(texts))} are {_short(text)}" if most > 2 else ""),
        "rows of a batch with the same caption tell nothing about each other: check "
        "caption_fields and captions",
    )
    _check_positives(check, config, found)
    return texts


def _check_positives(check: CheckUp, config: PretrainConfig, found: Look) -> None:
    name = config.loss.positives
    if name == "caption":
        return
    without = [one for one in found.seen if one.fields.get(name) is None]
    values = {str(one.fields.get(name)) for one in found.seen}
    if without:
        known = ", ".join(["caption", *sorted(without[0].fields)])
        check.problem(
            "positives",
            f"{percent(len(without) / len(found.seen))} of the samples have no field {name!r}; "
            f"first: {without[0].key!r}, which has {known}",
            "set loss.positives to a field that every sample has",
        )
    else:
        check.judge(
            len(values) > 1 or len(found.seen) == 1,
            "positives",
            f"{name}: {several(len(values), 'value')} in {several(len(found.seen), 'sample')}",
            "all samples agree in it, so there is nothing to tell apart: choose another field",
        )


def check_tokens(
    check: CheckUp, config: PretrainConfig, tokenizer: Tokenizer, texts: Sequence[str]
) -> None:
    """Lengths in tokens against the context length, and words that the vocabulary lacks."""
    backend, length = tokenizer.backend, config.model.context_length
    ids = tokenizer.ids(texts)
    lengths = np.array([len(one) for one in ids])
    cut = float((lengths > length).mean())
    unknown = float(np.mean(np.concatenate(ids) == backend.unk_token_id))
    check.numbers["truncated_share"] = cut
    check.judge(
        cut <= _FEW,
        "tokens",
        f"{np.median(lengths):.0f} in the middle, {lengths.max()} at most, of a context_length of "
        f"{length}" + (f"; {percent(cut)} of the captions are cut off" if cut else ""),
        f"model.context_length={int(np.quantile(lengths, 0.99))} keeps 99 % of them whole",
    )
    if unknown > _FEW:
        check.note(
            "unknown",
            f"{percent(unknown)} of the tokens stand for what the vocabulary lacks",
            "choose a tokenizer of the captions' language, or tokenizer.name=null to train one",
        )


def check_pictures(check: CheckUp, config: PretrainConfig, found: Look) -> None:
    """Sizes of the pictures against the size they are decoded to."""
    wanted = config.augment.decode_size or config.model.image_size
    sides = np.array([one.side for one in found.seen])
    small = float((sides < wanted).mean())
    check.numbers["median_side"] = float(np.median(sides))
    check.judge(
        small <= _MANY,
        "pictures",
        f"shorter side {sides.min()} to {sides.max()} px, {np.median(sides):.0f} in the middle; "
        f"read at {wanted} px"
        + (f", to which {percent(small)} of them are enlarged" if small else ""),
        "a smaller augment.decode_size or model.image_size costs less and loses nothing",
    )


def _only_at_the_end(config: PretrainConfig, epoch: int) -> bool:
    every, length = (
        samples_of(span, batch_size=config.batch_size, epoch=epoch)
        for span in (config.validation.every, config.samples)
    )
    return math.inf > every > length


def check_validation(check: CheckUp, config: PretrainConfig, training_data: Manifest) -> int:
    """The held-out data; returns how many samples each validation reads."""
    if config.validation.data is None:
        check.ok("validation", "none")
        return 0
    manifest = Manifest.open(config.validation.data)
    if manifest.fingerprint == training_data.fingerprint:
        check.note("validation", f"{manifest.place} is what the run is trained on")
    found = look(
        manifest,
        CaptionRule(tuple(config.caption_fields)),
        shards=_VALIDATION_SHARDS,
        seconds=_VALIDATION_SECONDS,
    )
    if found.bad_share > config.max_bad_fraction or (found.bad and config.strict):
        check.problem(
            "validation",
            f"{manifest.place}: {found.reasons()} in {several(found.count, 'sample')}",
            "the run would stop at its first validation; align inspect --verify names them",
        )
        return len(manifest)
    matching, looked = _matching(manifest, config.validation.where)
    text = f"{several(len(manifest), 'sample')} in {manifest.place}"
    if config.validation.where:
        text += f", {percent(matching / max(1, looked))} of which where={config.validation.where}"
    if not matching:
        tell = check.problem if looked == len(manifest) else check.note
        tell("validation", text, "the first validation stops the run where none is left")
    elif _only_at_the_end(config, len(training_data)):
        check.note("validation", f"{text}; only at the end", "lower validation.every")
    else:
        check.ok("validation", text)
    return len(manifest)


def _matching(manifest: Manifest, where: dict[str, Any]) -> tuple[int, int]:
    """How many samples have the wanted fields, and how many were looked at."""
    if not where:
        return len(manifest), len(manifest)
    reader = ShardReader(manifest)
    rows = np.unique(np.linspace(0, len(manifest) - 1, _WHERE_SAMPLES).astype(np.int64)).tolist()
    matching = 0
    for fields in _fields(reader, rows):
        matching += chosen(fields, where)
    reader.close()
    return matching, len(rows)


def _fields(reader: ShardReader, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
    for row in rows:
        try:
            members = reader.read(row, (JSON_FIELD,))
            yield decode_fields(members[JSON_FIELD]) if JSON_FIELD in members else {}
        except BadSample:
            continue


def _counts(problems: Iterable[Problem]) -> str:
    counted = Counter(problem.reason.value for problem in problems)
    return ", ".join(f"{count:,} x {reason}" for reason, count in counted.most_common())


def _short(text: str) -> str:
    return repr(text if len(text) <= 50 else text[:47] + "...")

"""`align pack`: image-text pairs into WebDataset shards with a manifest."""

import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from pipelines.schemas import PackConfig
from shards.damage import Problem
from shards.manifest import Manifest
from shards.packing import pack
from shards.packing.recode import Recode
from shards.sources import Source, find_format, open_source

_SHOWN_PROBLEMS = 10
_SECONDS_BETWEEN_LINES = 10


def run(config: PackConfig) -> int:
    """Pack, then say what there is."""
    source = _source(config)
    recoding = Recode(
        resize=config.resize,
        side=config.resize_side,
        encode=None if config.encode == "keep" else config.encode,
        quality=config.quality,
    )
    workers = config.workers if config.workers is not None else len(os.sched_getaffinity(0))
    with _Progress(len(source)) as progress:
        manifest = pack(
            source,
            config.out,
            samples_per_shard=config.samples_per_shard,
            shuffle_seed=config.shuffle_seed,
            recoding=recoding,
            sidecars=config.sidecars or [],
            strict=config.strict,
            overwrite=config.overwrite,
            workers=workers,
            progress=progress,
            tell=tqdm.write,
        )
    _say(manifest, config)
    return 0


def _source(config: PackConfig) -> Source:
    places = config.source if isinstance(config.source, list) else [config.source]
    if not places:
        raise ValueError("source names nothing")
    if any(
        "://" not in place and Path(place).resolve() == config.out.resolve() for place in places
    ):
        raise ValueError(f"source and out are both {config.out}; choose another folder for out")
    if ":/" in str(config.out):
        raise ValueError(f"out: {config.out} is no local folder; pack into one, then copy it")
    name = config.format
    if name is None:
        name = find_format(places)
        more = ", ..." if len(places) > 3 else ""
        print(_printable(f"{', '.join(places[:3])}{more}: taken as format={name}"), flush=True)
    return open_source(
        places,
        format=name,
        image=config.image,
        caption=config.caption,
        key=config.key,
        where=config.where or None,
        root=config.root,
        merge=config.merge,
        template=config.template,
    )


class _Progress:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int) -> None:
        self._bar = tqdm(total=total, desc="packing", unit=" samples", disable=None)
        self._began = self._told = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int | None) -> None:
        self._bar.update(done - self._bar.n)
        now = time.monotonic()
        if self._first is None:  # what an earlier pack had done says nothing about the rate
            self._first, self._began = done, now
        if not self._bar.disable or not total or now - self._told < _SECONDS_BETWEEN_LINES:
            return
        self._told = now
        rate = (done - self._first) / max(now - self._began, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if rate else ""
        print(f"{done:,} of {total:,} records, {rate:.0f}/s{left}", file=sys.stderr, flush=True)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _say(manifest: Manifest, config: PackConfig) -> None:
    problems: tuple[Problem, ...] = manifest.problems
    for problem in problems[:_SHOWN_PROBLEMS]:
        print(f"left out: {_printable(str(problem))}")
    if len(problems) > _SHOWN_PROBLEMS:
        more = len(problems) - _SHOWN_PROBLEMS
        print(f"left out: {more:,} more, listed in {config.out}/manifest.json")
    shards = f"{len(manifest.shards)} shard" + ("s" if len(manifest.shards) != 1 else "")
    left_out = f", {len(problems):,} left out" if problems else ""
    print(
        f"{config.out}: {len(manifest):,} samples in {shards}{left_out}, "
        f"fingerprint {manifest.fingerprint[:12]}"
    )


def _printable(text: str) -> str:
    """A text that fits a terminal's line: names of files may hold anything."""
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)


if __name__ == "__main__":
    from pipelines.cli import main_of

    main_of("pack")

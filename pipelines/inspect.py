"""`align inspect`: what a data set holds, what is wrong with it, and what it holds twice.

Exit code 3: damage, a disagreement or an overlap was found. What was set aside before is not found
again.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipelines import run_folder
from pipelines.config import ConfigError, read_yaml
from pipelines.inspect_look import Copies, Overlap, Seen, find_copies, find_overlap, look
from pipelines.inspect_page import write_page
from pipelines.inspect_text import lines
from pipelines.schemas import InspectConfig
from shards.audit.examine import captions_of, draw
from shards.audit.repair import MendedSource
from shards.audit.survey import Mismatch, Spread, Survey, changed_shards, mismatches, survey
from shards.captions import CaptionRule
from shards.damage import Reason
from shards.manifest import Manifest
from shards.packing import WORK_FOLDER, pack
from shards.quarantine import QUARANTINE_FILE

FOUND = 3
"""Exit code where something was found that nobody has dealt with yet."""

_PASSING = (Reason.UNREADABLE, Reason.SHARD_MISSING)
_LISTED = 1000
_CONTEXT = 77
_FREQUENT = 12


def run(config: InspectConfig) -> int:
    """Inspect, print what was found, write the page."""
    out = config.out or Path("runs/inspect") / _name(config.data)
    with run_folder.locked(out):
        return _run(config, out)


def _run(config: InspectConfig, out: Path) -> int:
    if sys.stderr.isatty():
        print(f"reading the headers of {config.data}", file=sys.stderr)
    manifest = Manifest.open(config.data, quarantine=False)
    against = None if config.against is None else Manifest.open(config.against)
    _check_target(config.repair)
    run_folder.record(out, config)
    for name in ("copies.jsonl", "overlap.jsonl"):  # of an earlier inspection
        (out / name).unlink(missing_ok=True)
    about, disagree = survey(manifest), mismatches(manifest)
    before, complaint = _set_aside_before(config.data, manifest)
    report: dict[str, Any] = {
        "version": 1,
        "survey": about.as_dict(),
        "set_aside_before": len(before),
    }
    seen = _look(config, manifest, out, whole=config.verify or against is not None)
    report["seen"] = _described(seen, config)
    if config.verify:
        disagree += _changed(manifest)
        report["set_aside"] = _set_aside(manifest, seen, listed=bool(before or complaint))
    if not report.get("set_aside"):
        disagree += complaint
    copies = find_copies(seen, distance=config.distance, likeness=config.likeness)
    report["copies"] = copies.summary()
    _write_lines(out / "copies.jsonl", _groups(seen, copies))
    shared: tuple[Seen, Overlap] | None = None
    if against is not None:
        other = _look(config, against, out, whole=True)
        overlap = find_overlap(seen, other, distance=config.distance, likeness=config.likeness)
        report["overlap"] = {"against": config.against, **overlap.summary()}
        _write_lines(out / "overlap.jsonl", _pairs(seen, other, overlap))
        shared = other, overlap
    if config.repair is not None:
        report["repair"] = _repair(manifest, config)
    report["mismatches"] = [asdict(one) for one in disagree]
    report["found"] = _found(about, disagree, seen, before, shared)
    run_folder.write_json(out / "inspect.json", report)
    rule = CaptionRule(tuple(config.caption_fields))
    write_page(out / "inspect.html", report, seen, copies=copies, rule=rule, shared=shared)
    print("\n".join([*lines(report), f"{out}/inspect.html"]))
    return FOUND if report["found"] else 0


def _check_target(folder: Path | None) -> None:
    """Whether a new data set can be written there; told before the long work, not after it."""
    if folder is None or not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"repair: {folder} is a file; name a new or empty folder")
    if present := sorted(path.name for path in folder.iterdir() if path.name != WORK_FOLDER):
        raise ConfigError(f"repair: {folder} holds {present[0]!r}; name a new or empty folder")


def _look(config: InspectConfig, manifest: Manifest, out: Path, *, whole: bool) -> Seen:
    cores = len(os.sched_getaffinity(0))
    drawn = draw(manifest, config.sample)
    return look(
        manifest,
        np.arange(len(manifest), dtype=np.int64) if whole else drawn,
        texts_of=drawn,
        scratch=out,
        workers=cores if config.workers is None else config.workers,
        captions=CaptionRule(tuple(config.caption_fields)),
    )


def _described(seen: Seen, config: InspectConfig) -> dict[str, Any]:
    """What was seen in numbers, with what only the caption's words can tell."""
    rule = CaptionRule(tuple(config.caption_fields))
    often = seen.prospect.repeated_captions(_FREQUENT)
    texts = captions_of(seen.manifest, [sample for _, sample, _ in often], captions=rule)
    problems = list(seen.prospect.problems.values())
    return {
        "whole": seen.whole,
        **seen.prospect.summary(),
        "frequent_captions": [
            {"count": count, "caption": texts[k][place]}
            for k, (count, _, place) in enumerate(often)
            if place < len(texts[k])
        ],
        "tokens": _tokens(seen.texts),
        "problems": [problem.as_dict() for problem in problems[:_LISTED]],
    }


def _tokens(texts: list[str]) -> dict[str, Any]:
    """Lengths in CLIP's own vocabulary, with its two marks; what exceeds its context is cut off."""
    from open_clip.tokenizer import SimpleTokenizer  # takes seconds, so only where it is needed

    tokenizer = SimpleTokenizer()
    lengths = np.array([2 + len(tokenizer.encode(text)) for text in texts], np.int64)
    return {
        "context": _CONTEXT,
        "lengths": asdict(Spread.of(lengths)),
        "exceeding": float((lengths > _CONTEXT).mean()) if len(lengths) else 0.0,
    }


def _set_aside_before(data: str, manifest: Manifest) -> tuple[set[tuple[str, str]], list[Mismatch]]:
    """Shard and key of what was set aside already, and what is wrong with that list if so."""
    try:
        kept = Manifest.open(data)
    except ValueError as error:
        return set(), [Mismatch(QUARANTINE_FILE, "what is set aside", str(error))]
    listed = kept.problems[len(manifest.problems) :]
    return {(problem.shard, problem.key) for problem in listed}, []


def _set_aside(manifest: Manifest, seen: Seen, *, listed: bool) -> dict[str, Any] | None:
    """Sets aside what is bad, or takes the list that is there away where nothing is.

    What a server did not give is not set aside: it may give it tomorrow.
    """
    remote = any(storage.folder is None for storage in manifest.storages)
    bad = {
        sample: problem
        for sample, problem in seen.prospect.problems.items()
        if not (remote and problem.reason in _PASSING)
    }
    if not bad and not listed:
        return None
    if len(bad) == len(manifest):
        return None  # a data set of nothing serves nobody; the report says it all
    place = manifest.set_aside(bad)
    passing = len(seen.prospect.problems) - len(bad)
    return {"samples": len(bad), "file": str(place), "passing": passing}


def _changed(manifest: Manifest) -> list[Mismatch]:
    total = sum(shard.bytes for shard in manifest.shards if shard.sha256)
    with tqdm(
        desc="hashing", total=total, unit="B", unit_scale=True, disable=None if total else True
    ) as bar:
        return changed_shards(manifest, progress=bar.update)


def _repair(manifest: Manifest, config: InspectConfig) -> dict[str, Any]:
    assert config.repair is not None
    source = MendedSource(manifest)
    workers = config.workers if config.workers is not None else len(os.sched_getaffinity(0))
    made = pack(source, config.repair, workers=workers, tell=print)
    return {
        "folder": str(config.repair),
        "samples": len(made),
        "left_out": len(source) - len(made),
        **asdict(source.mended),
        "fingerprint": made.fingerprint,
    }


def _found(
    about: Survey,
    disagree: list[Mismatch],
    seen: Seen,
    before: set[tuple[str, str]],
    shared: tuple[Seen, Overlap] | None,
) -> dict[str, int]:
    """How many findings of each kind there are that nobody has dealt with yet."""
    fresh = [
        problem
        for problem in seen.prospect.problems.values()
        if (problem.shard, problem.key) not in before
    ]
    found = {
        "damage of shards": len(about.problems),
        "bad samples": len(fresh),
        "keys with dots": about.dotted_keys,
        "disagreements": len(disagree),
        "pictures that both sets hold": len(shared[1].pairs) if shared else 0,
    }
    return {name: count for name, count in found.items() if count}


def _groups(seen: Seen, copies: Copies) -> Iterable[dict[str, Any]]:
    for kind, rows in copies.groups:
        yield {"kind": kind, "samples": [seen.name(int(row)) for row in rows]}


def _pairs(seen: Seen, other: Seen, overlap: Overlap) -> Iterable[dict[str, Any]]:
    for kind, row, copy in overlap.pairs:
        yield {"kind": kind, "sample": seen.name(row), "copy_of": other.name(copy)}


def _write_lines(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    run_folder.write_text(path, text)


def _name(data: str) -> str:
    """A folder name for a place; of equal names in different folders each gets its own."""
    words = re.sub(r"[^A-Za-z0-9_.-]+", "-", data.rstrip("/").rpartition("/")[2])
    name = words.removesuffix(".tar").strip(".-") or "data"
    earlier = Path("runs/inspect") / name / "config.yaml"
    if earlier.is_file() and read_yaml(earlier).get("data") != data:
        name += f"-{hashlib.sha256(data.encode()).hexdigest()[:8]}"
    return name


if __name__ == "__main__":
    from pipelines.cli import main_of

    main_of("inspect")

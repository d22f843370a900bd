"""The page of an inspection: what a data set holds, and what its troubles look like."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.report import Histogram, Hit, Number, Page, Query, Twins
from pipelines.inspect_look import Copies, Overlap, Seen
from pipelines.inspect_text import counts, size, spread, verdict
from shards.audit.examine import captions_of
from shards.captions import CaptionRule
from shards.damage import BadSample
from shards.decode import decode_image
from shards.read import ShardReader

_SHOWN = 40
_GROUPS, _IN_GROUP, _PAIRS = 12, 8, 24
_EXAMPLES, _PROBLEMS = 3, 200
_CELL = 320


def write_page(
    path: Path,
    report: Mapping[str, Any],
    seen: Seen,
    *,
    copies: Copies,
    rule: CaptionRule,
    shared: tuple[Seen, Overlap] | None = None,
) -> None:
    """Compose the page and write it, whole or not at all.

    Args:
        path: Where to.
        report: All numbers.
        seen: The data set.
        copies: What it holds more than once.
        rule: Where captions stand.
        shared: Another data set and what both hold.
    """
    about = report["survey"]
    shards = f"{about['shards']:,} shard" + ("s" if about["shards"] != 1 else "")
    page = Page(
        Path(about["place"]).name or about["place"],
        f"{about['samples']:,} samples in {shards}, {size(about['bytes'])}. {verdict(report)}",
    )
    page.headline(_tiles(report))
    album = _Album(seen, rule)
    _samples(page, album)
    _distributions(page, seen)
    _captions(page, report)
    _damage(page, report)
    if copies.groups:
        _copies(page, report["copies"], copies, album)
    if shared is not None:
        other, overlap = shared
        _overlap(page, report["overlap"], overlap, album, _Album(other, rule))
    _facts(page, report)
    page.write(path)


def _tiles(report: Mapping[str, Any]) -> list[Number]:
    seen, about = report["seen"], report["survey"]
    pictures, captions = seen["pictures"], seen["captions"]
    looked = "all of them" if seen["whole"] else f"of {seen['seen']:,} drawn at random"
    damage = len(about["problems"])
    tiles = [
        Number("Samples", f"{about['samples']:,}", note=counts(about["fields"])),
        Number("Bad samples", f"{seen['bad']:,}", note=looked),
        Number("Damaged places in shards", f"{damage:,}", note=counts(about["reasons"])),
    ]
    if pictures["count"]:
        sides = pictures["shorter_side"]
        note = f"nine tenths have {sides['low']:,.0f} to {sides['high']:,.0f}"
        tiles.append(Number("Shorter side, median", f"{sides['median']:,.0f}", "px", note))
    if captions["count"]:
        tokens = seen["tokens"]
        note = f"{100 * tokens['exceeding']:.1f} % exceed CLIP's {tokens['context']}"
        middle = f"{tokens['lengths']['median']:,.0f}"
        tiles.append(Number("Caption, median", middle, "tokens", note))
    superfluous = report["copies"]["superfluous"]["looks alike"]
    compared = f"of {report['copies']['looked_at']:,} pictures compared"
    tiles.append(Number("Superfluous copies", f"{superfluous:,}", note=compared))
    if "overlap" in report:
        overlap = report["overlap"]
        note = f"{overlap['copied']:,} of {overlap['pictures']:,} pictures"
        share = f"{100 * overlap['share']:.1f}"
        tiles.append(Number("Also in the other set", share, "%", note))
    return tiles


class _Album:
    """Pictures with their captions, by row; a bad one is left out."""

    def __init__(self, seen: Seen, rule: CaptionRule) -> None:
        self.seen = seen
        self._rule = rule
        self._reader = ShardReader(seen.manifest)

    def hits(self, rows: Iterable[int]) -> Iterator[Hit]:
        """The pictures of some rows."""
        for row in rows:
            picture = self.picture(row)
            if picture is not None:
                yield Hit(self.caption(row), picture)

    def caption(self, row: int) -> str:
        """The first caption of a row, or its key where it has none."""
        sample = int(self.seen.prospect.ids[row])
        captions = captions_of(self.seen.manifest, [sample], captions=self._rule)[0]
        return captions[0] if captions else self.seen.name(row)["key"]

    def picture(self, row: int) -> Image.Image | None:
        """The picture of a row, made small."""
        manifest, sample = self.seen.manifest, int(self.seen.prospect.ids[row])
        name = manifest.image_fields[int(manifest.image_choice[sample])]
        try:
            pixels = decode_image(self._reader.read(sample, (name,))[name])
        except BadSample:
            return None
        picture = Image.fromarray(pixels)
        picture.thumbnail((_CELL, _CELL), Image.Resampling.LANCZOS, reducing_gap=2.0)
        return picture


def _samples(page: Page, album: _Album) -> None:
    rows = np.flatnonzero(album.seen.prospect.has_picture)
    if not len(rows):
        return
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(_SHOWN, len(rows))).astype(int))]
    hits = list(album.hits(chosen.tolist()))
    if hits:
        page.section("What it looks like", "Samples from its beginning to its end.").pictures(hits)


def _distributions(page: Page, seen: Seen) -> None:
    prospect = seen.prospect
    charts: list[Histogram] = []
    if len(prospect.sizes):
        width, height, data = prospect.sizes.T
        charts = [
            Histogram.of(
                "Shorter side", np.minimum(width, height), x_label="pixels (log)", log=True
            ),
            Histogram.of("Shape", width / height, x_label="width / height (log)", log=True),
            Histogram.of("Encoded picture", data / 1000, x_label="kilobytes (log)", log=True),
        ]
    if len(prospect.characters):
        charts.append(
            Histogram.of("Length of a caption", prospect.characters, x_label="characters")
        )
        charts.append(Histogram.of("Words of a caption", prospect.words, x_label="words"))
    if charts:
        how = "All samples." if seen.whole else f"{prospect.seen:,} samples drawn at random."
        note = "The rarest hundredth at the upper end is counted in the last bar."
        page.section("Sizes and shapes", f"{how} {note}").charts(charts)


def _captions(page: Page, report: Mapping[str, Any]) -> None:
    seen = report["seen"]
    captions = seen["captions"]
    if not captions["count"]:
        return
    section = page.section(
        "Captions",
        f"{captions['distinct']:,} of {captions['count']:,} differ, case and white space apart.",
    )
    section.facts(
        {
            "Scripts, by most letters": captions["scripts"],
            "Captions of a picture": {
                f"{number} captions" if number != "1" else "one caption": f"{count:,} pictures"
                for number, count in captions["per_picture"].items()
            },
            "Lengths": {
                "characters": spread(captions["characters"]),
                "words": spread(captions["words"]),
                "CLIP tokens": spread(seen["tokens"]["lengths"]),
            },
        }
    )
    if seen["frequent_captions"]:
        section.subtitle("Met most often")
        rows = [(one["caption"], one["count"]) for one in seen["frequent_captions"]]
        section.table(("Caption", "Times"), rows)


def _damage(page: Page, report: Mapping[str, Any]) -> None:
    about, seen = report["survey"], report["seen"]
    problems = [*about["problems"], *seen["problems"]]
    numbers = dict(about["reasons"])
    for reason, count in seen["reasons"].items():
        numbers[reason] = numbers.get(reason, 0) + count
    if not numbers and not report["mismatches"] and not about["left_out"]:
        return
    section = page.section("Damage", _advice(report))
    if numbers:
        rows = [
            (reason, count, "; ".join(_named(one) for one in _of(problems, reason)))
            for reason, count in sorted(numbers.items(), key=lambda item: -item[1])
        ]
        section.table(("Reason", "Count", "Where, for example"), rows)
    if report["mismatches"]:
        section.subtitle("Disagreements", "Files that should say the same and do not.")
        rows = [(one["file"], one["says"], one["found"]) for one in report["mismatches"]]
        section.table(("File", "Says", "Found"), rows[:_PROBLEMS])
    if about["left_out"]:
        section.subtitle("Left out when it was packed", "Never part of this data set.")
        rows = [(_named(one), one["reason"]) for one in about["left_out"][:_PROBLEMS]]
        section.table(("Where", "Reason"), rows)


def _advice(report: Mapping[str, Any]) -> str:
    aside = report.get("set_aside")
    if aside and aside["samples"]:
        return (
            f"{aside['samples']:,} samples are set aside: training leaves them out. Removing "
            f"{aside['file']} undoes it."
        )
    if "repair" in report:
        return f"The good samples were written anew, to {report['repair']['folder']}."
    if report["seen"]["bad"]:
        return "--verify looks at all samples and sets the bad ones aside; --repair writes anew."
    return "Counted by reason."


def _copies(page: Page, numbers: Mapping[str, Any], copies: Copies, album: _Album) -> None:
    queries = []
    for kind, rows in copies.groups[:_GROUPS]:
        hits = list(album.hits(rows[:_IN_GROUP].tolist()))
        more = f"{len(rows) - len(hits):,} more" if len(rows) > len(hits) else ""
        if hits:
            queries.append(Query(hits, f"{len(rows):,} x {kind}", note=more))
    superfluous = numbers["superfluous"]
    section = page.section(
        "Copies",
        f"Of {numbers['looked_at']:,} pictures, {superfluous['same file']:,} repeat another byte "
        f"for byte, {superfluous['same pixels']:,} pixel for pixel, and "
        f"{superfluous['looks alike']:,} look like another; each number includes the one before. "
        f"{numbers['groups']:,} groups, the largest first; copies.jsonl lists all of them.",
    )
    if queries:
        section.gallery(queries)


def _overlap(
    page: Page, numbers: Mapping[str, Any], overlap: Overlap, album: _Album, theirs: _Album
) -> None:
    kinds = counts({kind: count for kind, count in numbers["by_kind"].items() if count})
    section = page.section(
        "Overlap",
        f"{numbers['copied']:,} of {numbers['pictures']:,} pictures are in {numbers['against']} "
        f"too: {kinds}. {numbers['same_caption']:,} of {numbers['captioned']:,} samples share a "
        "caption with it.",
    )
    pairs = []
    for kind, row, copy in overlap.pairs[:_PAIRS]:
        mine, copied = album.picture(row), theirs.picture(copy)
        if mine is not None and copied is not None:
            left, right = Hit(album.caption(row), mine), Hit(theirs.caption(copy), copied)
            pairs.append(Twins(left, right, kind))
    if pairs:
        section.text("Here on the left, there on the right; overlap.jsonl lists all pairs.")
        section.twins(pairs)


def _facts(page: Page, report: Mapping[str, Any]) -> None:
    about = report["survey"]
    groups: dict[str, dict[str, object]] = {
        "Data set": {
            "place": about["place"],
            "fingerprint": about["fingerprint"][:16],
            "hashes known": "of whole shards" if about["packed"] else "of headers only",
            "bytes": size(about["bytes"]),
            "samples a shard": spread(about["samples_per_shard"]),
        },
        "Samples with each member": dict(about["fields"]),
        "Keys and members": {
            "without a picture": about["without_image"],
            "without text or JSON": about["without_text"],
            "keys with dots": about["dotted_keys"],
            "repeated keys": about["repeated_keys"],
            "pictures under another format's name": report["seen"]["pictures"][
                "under_another_formats_name"
            ],
        },
    }
    if formats := report["seen"]["pictures"]["formats"]:
        groups["Formats, by their first bytes"] = dict(formats)
    if "repair" in report:
        groups["Repaired"] = dict(report["repair"])
    page.section("In numbers").facts(groups)


def _of(problems: Sequence[Mapping[str, str]], reason: str) -> list[Mapping[str, str]]:
    return [problem for problem in problems if problem["reason"] == reason][:_EXAMPLES]


def _named(problem: Mapping[str, str]) -> str:
    where = f"{problem['shard']} {problem['key']}".strip()
    return f"{where} ({problem['detail']})" if problem["detail"] else where

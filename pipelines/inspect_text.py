"""What an inspection found, as lines for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.report_html import clean

_EXAMPLES = 3
_WIDEST = 100


def lines(report: Mapping[str, Any]) -> list[str]:
    """The report in a screen: name on the left, what was found on the right."""
    rows = [
        *_survey(report["survey"]),
        *_mismatches(report["mismatches"]),
        *_seen(report["seen"]),
        *_copies(report["copies"]),
    ]
    if "overlap" in report:
        rows += _overlap(report["overlap"])
    rows += _done(report)
    width = max(len(name) for name, _ in rows)
    return [*[f"{name:<{width}}  {text}" for name, text in rows], verdict(report)]


def verdict(report: Mapping[str, Any]) -> str:
    """What was found that nobody has dealt with yet, in one line.

    >>> verdict({"found": {"bad samples": 1200, "disagreements": 1}})
    'Found: bad samples 1,200, disagreements 1.'
    """
    found = ", ".join(f"{name} {count:,}" for name, count in report["found"].items())
    return f"Found: {found or 'nothing'}."


def spread(values: Mapping[str, float | int], unit: str = "") -> str:
    """A spread in words: the median, and where nine tenths lie.

    >>> spread({"least": 1, "low": 2, "median": 3, "high": 9, "most": 40.5}, "px")
    '3 px (2 to 9; least 1, most 40.5)'
    """
    least, low, middle, high, most = (
        f"{values[name]:,.4g}" if values[name] < 1000 else f"{values[name]:,.0f}"
        for name in ("least", "low", "median", "high", "most")
    )
    unit = f" {unit}" if unit else ""
    if least == most:
        return f"{middle}{unit}"
    return f"{middle}{unit} ({low} to {high}; least {least}, most {most})"


def size(number: float | int) -> str:
    """Bytes for people.

    >>> size(999), size(20_500_000)
    ('999 B', '20.5 MB')
    """
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if number >= 1000**power:
            return f"{number / 1000**power:.3g} {unit}"
    return f"{number:.0f} B"


def counts(numbers: Mapping[str, int]) -> str:
    """Counts by name, in their order.

    >>> counts({"webp": 1200, "png": 3})
    '1,200 webp, 3 png'
    """
    return ", ".join(f"{count:,} {name}" for name, count in numbers.items()) or "none"


def _survey(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    shards = f"{about['shards']:,} shard" + ("s" if about["shards"] != 1 else "")
    rows = [
        ("data", about["place"]),
        ("", f"{about['samples']:,} samples in {shards}, {size(about['bytes'])}"),
        ("fingerprint", about["fingerprint"][:12] + ("" if about["packed"] else " (headers only)")),
        ("fields", counts(about["fields"])),
        ("samples a shard", spread(about["samples_per_shard"])),
    ]
    if about["without_image"]:
        rows.append(("without picture", f"{about['without_image']:,}"))
    if about["without_text"]:
        rows.append(("without text", f"{about['without_text']:,} (neither .txt nor .json)"))
    if about["dotted_keys"]:
        rows.append(
            ("dotted keys", f"{about['dotted_keys']:,}: other readers cut them at the first dot")
        )
    if about["repeated_keys"]:
        rows.append(("repeated keys", f"{about['repeated_keys']:,}"))
    rows.append(("shards", counts(about["reasons"]) if about["reasons"] else "no damage"))
    rows += _examples(about["problems"])
    if about["left_out"]:
        rows.append(("left out", f"{len(about['left_out']):,} when the data set was packed"))
    return rows


def _mismatches(found: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    shown = [f"{one['file']} says {one['says']}; found: {one['found']}" for one in found]
    rows = [("disagreement", clean(text)) for text in shown[:_WIDEST]]
    if len(shown) > _WIDEST:
        rows.append(("", f"{len(shown) - _WIDEST:,} more"))
    return rows


def _seen(seen: Mapping[str, Any]) -> list[tuple[str, str]]:
    pictures, captions, tokens = seen["pictures"], seen["captions"], seen["tokens"]
    how = "all of them" if seen["whole"] else "drawn at random; --verify looks at all"
    bad = f"{seen['bad']:,}" + (f": {counts(seen['reasons'])}" if seen["bad"] else "")
    rows = [("looked at", f"{seen['seen']:,} samples, {how}"), ("bad samples", bad)]
    rows += _examples(seen["problems"])
    if pictures["count"]:
        rows += [
            ("pictures", counts(pictures["formats"])),
            ("shorter side", spread(pictures["shorter_side"], "px")),
            ("width / height", spread(pictures["aspect"])),
            ("bytes a picture", spread(pictures["bytes"])),
        ]
    if pictures["under_another_formats_name"]:
        rows.append(("misnamed", f"{pictures['under_another_formats_name']:,} pictures"))
    if captions["count"]:
        distinct = f"{captions['distinct']:,} of {captions['count']:,} differ"
        exceeding = f"{100 * tokens['exceeding']:.1f} % exceed {tokens['context']}"
        rows += [
            ("captions", f"{distinct}; a picture has {', '.join(captions['per_picture'])}"),
            ("characters", spread(captions["characters"])),
            ("words", spread(captions["words"])),
            ("CLIP tokens", f"{spread(tokens['lengths'])}; {exceeding}"),
            ("scripts", counts(captions["scripts"])),
        ]
    for one in seen["frequent_captions"][:_EXAMPLES]:
        rows.append(("", f"{one['count']:,} x {clean(one['caption'])[:_WIDEST]!r}"))
    return rows


def _copies(copies: Mapping[str, Any]) -> list[tuple[str, str]]:
    numbers = {name: count for name, count in copies["superfluous"].items() if count}
    if not numbers:
        return [("copies", f"none among {copies['looked_at']:,} pictures")]
    shown = ", ".join(f"{count:,} {name}" for name, count in numbers.items())
    return [
        ("copies", f"could go of {copies['looked_at']:,} pictures, each with the ones before:"),
        ("", f"{shown}; {copies['groups']:,} groups, listed in copies.jsonl"),
    ]


def _overlap(overlap: Mapping[str, Any]) -> list[tuple[str, str]]:
    kinds = counts({name: count for name, count in overlap["by_kind"].items() if count})
    return [
        (
            "overlap",
            f"{overlap['copied']:,} of {overlap['pictures']:,} pictures "
            f"({100 * overlap['share']:.1f} %) are in {overlap['against']} too: {kinds}",
        ),
        (
            "",
            f"{overlap['same_caption']:,} of {overlap['captioned']:,} captioned samples "
            f"({100 * overlap['same_caption_share']:.1f} %) share a caption with it, "
            f"{overlap['copied_with_the_caption']:,} of them with a copied picture",
        ),
    ]


def _done(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if before := report["set_aside_before"]:
        rows.append(("set aside before", f"{before:,} samples, which count as dealt with"))
    if aside := report.get("set_aside"):
        if aside["samples"]:
            what = f"{aside['samples']:,} samples, listed in {aside['file']}"
            rows.append(("set aside", f"{what}; remove that file to undo it"))
        else:
            rows.append(("set aside", "nothing any more"))
        if aside["passing"]:
            rows.append(
                ("", f"{aside['passing']:,} that the server did not give are not among them")
            )
    if repair := report.get("repair"):
        rows.append(
            (
                "repaired",
                f"{repair['samples']:,} samples in {repair['folder']}: {repair['left_out']:,} left "
                f"out, {repair['renamed']:,} renamed, {repair['dropped']:,} dropped as repeats",
            )
        )
    return rows


def _examples(problems: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    rows = []
    for problem in problems[:_EXAMPLES]:
        where = f"{problem['shard']} {problem['key']}".strip()
        detail = f" ({problem['detail']})" if problem["detail"] else ""
        rows.append(("", clean(f"{where}: {problem['reason']}{detail}")))
    if len(problems) > _EXAMPLES:
        rows.append(("", "..."))
    return rows

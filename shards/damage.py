"""Bad samples: why a sample is bad, which ones were, and when enough is enough."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Reason(StrEnum):
    """Every way in which a sample, or a piece of a shard, can be bad."""

    SHARD_MISSING = "shard missing"
    TRUNCATED = "truncated"
    UNREADABLE = "unreadable"
    BAD_HEADER = "bad tar header"
    NOT_A_FILE = "not a regular file"
    UNSAFE_NAME = "unsafe member name"
    SPLIT_SAMPLE = "members not adjacent"
    DUPLICATE_KEY = "duplicate key"
    NO_IMAGE = "no image"
    EMPTY_IMAGE = "empty image"
    TOO_MANY_BYTES = "too many bytes"
    TOO_MANY_PIXELS = "too many pixels"
    ABSURD_ASPECT = "absurd aspect"
    UNDECODABLE = "undecodable image"
    NO_CAPTION = "no caption"
    EMPTY_CAPTION = "empty caption"
    BAD_TEXT = "text is not UTF-8"
    BAD_JSON = "bad JSON"


class BadSample(Exception):  # noqa: N818 - it is not an error of the program but a fact of the data
    """One sample cannot be used.

    Attributes:
        reason: One of the fixed reasons, by which bad samples are counted.
        detail: What exactly was found, for the reader of a report.
    """

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
        self.reason = reason
        self.detail = detail


class TooMuchDamageError(ValueError):
    """The data holds more bad samples than the caller allowed."""


@dataclass(frozen=True)
class Problem:
    """One bad place in a data set: which shard, which sample, what is wrong with it."""

    shard: str
    key: str
    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        place = f"{self.shard}, sample {self.key!r}" if self.key else self.shard
        return f"{place}: {self.reason.value}" + (f" ({self.detail})" if self.detail else "")

    def as_dict(self) -> dict[str, str]:
        """The problem as plain strings, for JSON."""
        return {**asdict(self), "reason": self.reason.value}


@dataclass
class DamageTally:
    """Counts bad samples by reason, lists them, and stops a run that meets too many.

    A run stops when `bad > max_fraction * max(seen, min(total, 1000))`: the floor keeps one bad
    picture among the first ten from ending a run over a million.

    Attributes:
        total: Samples in the data set.
        max_fraction: Share of bad samples above which `add` raises; 1 never stops.
        strict: Stop at the first bad sample.
        seen: Samples met so far, good and bad.
        repeats: Places taken by a substitute, that is, samples seen once more than planned.
        reasons: How often each reason was met.
        listed: The first `list_limit` distinct problems.
        list_limit: How many problems are listed by name (all of them are counted).
    """

    total: int
    max_fraction: float = 1.0
    strict: bool = False
    list_limit: int = 1000
    seen: int = 0
    repeats: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    listed: dict[tuple[str, str], Problem] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_fraction <= 1.0:
            raise ValueError(f"max_bad_fraction is {self.max_fraction}; it must lie in 0 ... 1")

    @property
    def bad(self) -> int:
        """Bad samples met so far; one that is met in two epochs counts twice."""
        return self.reasons.total()

    def judge_scan(self, damage: Sequence[Problem], sizes: Mapping[str, int]) -> None:
        """Judges what a scan found: how many samples it cost cannot be told, but shards can.

        Args:
            damage: What the scan found.
            sizes: Samples of each shard.

        Raises:
            TooMuchDamageError: Under `strict`, or when too large a share of the shards holds damage
                and no sample.
        """
        damage = [problem for problem in damage if problem.reason != Reason.SPLIT_SAMPLE]
        if damage and self.strict:
            raise TooMuchDamageError(f"{damage[0]}; strict mode stops at the first bad sample")
        dead = {one.shard: one for one in damage if not sizes.get(one.shard, 0)}
        if len(dead) > self.max_fraction * len(sizes):
            raise TooMuchDamageError(
                f"{len(dead)} of {len(sizes)} shards hold damage and no sample, above "
                f"max_bad_fraction={self.max_fraction}: {next(iter(dead.values()))}"
            )

    def add(self, seen: int, problems: Sequence[Problem], *, replaced: bool = False) -> None:
        """Counts one batch: `seen` samples, of which `problems` were bad.

        Args:
            seen: Samples that were due, good and bad.
            problems: The bad ones.
            replaced: Whether a substitute took the place of each bad one.

        Raises:
            TooMuchDamageError: Under `strict`, or when the share of bad samples is too high.
        """
        self.seen += seen
        self.repeats += len(problems) if replaced else 0
        for problem in problems:
            self.reasons[problem.reason.value] += 1
            if len(self.listed) < self.list_limit:
                self.listed.setdefault((problem.shard, problem.key), problem)
        if problems and self.strict:
            raise TooMuchDamageError(f"{problems[0]}; strict mode stops at the first bad sample")
        if self.bad > self.max_fraction * max(self.seen, min(self.total, 1000)):
            worst = ", ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common())
            raise TooMuchDamageError(
                f"{self.bad} of {self.seen} samples are bad, above max_bad_fraction="
                f"{self.max_fraction}: {worst}; first: {next(iter(self.listed.values()))}"
            )

    def report(self) -> dict[str, Any]:
        """The tally as plain numbers, strings and lists, for JSON."""
        return {
            "total": self.total,
            "seen": self.seen,
            "bad": self.bad,
            "repeats": self.repeats,
            "reasons": dict(self.reasons.most_common()),
            "listed": [problem.as_dict() for problem in self.listed.values()],
        }


def merged(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One report of what several ranks met, or of a run and what it was before it was resumed.

    Counts add up, lists follow each other without repeats; all else is that of the last report.

    Args:
        reports: From `DamageTally.report` or `ShardLoader.report`; at least one.
    """
    reasons: Counter[str] = Counter()
    listed: dict[tuple[str, str], dict[str, str]] = {}
    for report in reports:
        reasons.update(report["reasons"])
        for problem in report["listed"]:
            listed.setdefault((problem["shard"], problem["key"]), problem)
    counts = {name: sum(report[name] for report in reports) for name in ("seen", "bad", "repeats")}
    return {
        **reports[-1],
        **counts,
        "reasons": dict(reasons.most_common()),
        "listed": list(listed.values()),
    }

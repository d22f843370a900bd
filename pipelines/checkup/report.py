"""What a check-up found, told line by line."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Mark(StrEnum):
    """What a finding means for the run."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        part: Which part of the run it belongs to.
        what: What was looked at.
        mark: `problem` where the run would fail, `note` where it would be slow or poor.
        found: What is the case.
        advice: What to do about it.
    """

    part: str
    what: str
    mark: Mark
    found: str
    advice: str = ""


@dataclass
class CheckUp:
    """Findings in the order in which they come, printed as they come.

    Attributes:
        quiet: Print nothing; the findings are read afterwards.
        part: The part of the run that is being looked at.
        findings: All so far.
        numbers: What was measured, for machines.
    """

    quiet: bool = False
    part: str = ""
    findings: list[Finding] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def begin(self, part: str) -> None:
        """Turn to another part of the run."""
        self.part = part
        self._say(f"\n{part}")

    def ok(self, what: str, found: str) -> None:
        """Something is as it should be."""
        self._add(what, Mark.OK, found)

    def note(self, what: str, found: str, advice: str = "") -> None:
        """Something would make the run slow or poor, but not end it."""
        self._add(what, Mark.NOTE, found, advice)

    def problem(self, what: str, found: str, advice: str = "") -> None:
        """Something would end the run, or keep it from beginning."""
        self._add(what, Mark.PROBLEM, found, advice)

    def judge(self, good: bool, what: str, found: str, advice: str) -> None:
        """A finding that is fine, or a note with what to do."""
        self._add(what, Mark.OK if good else Mark.NOTE, found, "" if good else advice)

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """What fails within becomes a problem of one line, and the check-up goes on."""
        try:
            yield
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            self.problem(what, one_line(error))

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Print rows, the first of which is a heading: one column to the left, others right."""
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for first, *others in rows:
            cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            self._say("  " + "  ".join([first.ljust(widths[0]), *cells]).rstrip())
        self._say("")

    def count(self, mark: Mark) -> int:
        """How many findings are so marked."""
        return sum(finding.mark == mark for finding in self.findings)

    @property
    def verdict(self) -> str:
        """The whole in one line."""
        problems, notes = self.count(Mark.PROBLEM), self.count(Mark.NOTE)
        if problems:
            return (
                f"this run would fail: {_counted(problems, 'problem')}, {_counted(notes, 'note')}"
            )
        return f"nothing here would fail: {_counted(notes, 'note')}"

    def end(self) -> None:
        """Print the verdict."""
        self._say(f"\n{self.verdict}")

    def as_json(self) -> str:
        """Everything, for machines."""
        content = {
            "findings": [asdict(finding) for finding in self.findings],
            "numbers": self.numbers,
            "problems": self.count(Mark.PROBLEM),
            "notes": self.count(Mark.NOTE),
            "verdict": self.verdict,
        }
        return json.dumps(content, indent=2, ensure_ascii=False)

    def _add(self, what: str, mark: Mark, found: str, advice: str = "") -> None:
        finding = Finding(self.part, what, mark, found, advice)
        self.findings.append(finding)
        self._say(f"  {mark.value:<8} {what:<11} {found}")
        if advice:
            self._say(f"{'':<23}-> {advice}")

    def _say(self, line: str) -> None:
        if not self.quiet:
            print(line, flush=True)


def one_line(error: BaseException) -> str:
    """An error as the first line of what it says; of a fault of a library, also its kind."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return first if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {first}"


def size(number: int | float) -> str:
    """A number of bytes for people: `1.4 GB`."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if abs(number) < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "bytes" or number >= 100 else f"{number:.1f} {unit}"


def duration(seconds: int | float) -> str:
    """A time for people: `40 s`, `12 min`, `7.5 h`, `3.1 days`."""
    units = (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48), ("days", 86400, math.inf))
    unit, length = next((name, unit) for name, unit, most in units if seconds < most * unit)
    number = seconds / length
    return f"{number:.1f} {unit}" if number < 10 else f"{number:,.0f} {unit}"


def percent(share: int | float) -> str:
    """A share for people; what is there is never called nothing."""
    if 0 < share < 0.0005:
        return "less than 0.1%"
    return f"{share:.1%}" if 0 < share < 0.1 else f"{share:.0%}"


def rate(seconds_per_sample: int | float) -> str:
    """Samples a second for people."""
    per_second = 1 / max(seconds_per_sample, 1e-9)
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"


def several(count: int, thing: str) -> str:
    """`1 shard`, `1,200 shards`."""
    return f"{count:,} {thing}" + ("" if count == 1 else "es" if thing.endswith("ss") else "s")


def _counted(count: int, thing: str) -> str:
    return several(count, thing) if count else f"no {thing}s"

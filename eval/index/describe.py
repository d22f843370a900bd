"""An index card in lines for people."""

from eval.index.card import IndexCard
from eval.results import Figure


def describe(card: IndexCard) -> list[str]:
    """What an index is and what it reaches, one line a fact, recalls by kind of query in columns.

    Recall is against exact search, with its 95 % interval. Where queries have one right answer
    (a caption its picture), the last two columns say how often it is among the first 10.
    """
    rows = f"{card.rows - card.removed:,} rows" + (
        f" ({card.removed:,} removed)" * bool(card.removed)
    )
    lines = [
        f"{card.factory}: {rows} of {card.modality}, {card.dim} wide, "
        f"{card.bytes_per_vector:.1f} bytes a vector, built in {card.build_seconds:.1f} s",
        _setting(card),
        ", ".join(
            f"{one.queries_per_second:,.0f} queries a second at {one.threads} "
            f"thread{'s' * (one.threads > 1)}"
            for one in card.speed
        ),
        _row("queries", [figure.name for figure in card.reached[0].against_exact]),
    ]
    own = any(one.own_pair for one in card.reached)
    if own:
        lines[-1] += f"{'own pair, exact':>24}{'this index':>24}"
    for one in card.reached:
        lines.append(_row(one.queries, [_percent(figure) for figure in one.against_exact]))
        if one.own_pair:
            lines[-1] += "".join(f"{_percent(_ten(one.own_pair[how])):>24}" for how in _HOW)
    lines += _own_pictures(card)
    if card.origin.get("decoded"):
        lines.append("measured against the vectors that this index decodes: it came without others")
    return [*(line for line in lines if line), *_notes(card)]


_HOW = ("exact", "index")


def _setting(card: IndexCard) -> str:
    if card.tuned_for is None:
        return f"knobs as given: {card.knobs}" if card.knobs else ""
    what = f"for {100 * (card.target_recall or 0):g} % recall@10 of {card.tuned_for} queries"
    return f"tuned {what}: {card.knobs}" if card.knobs else f"chosen {what}; nothing to tune"


def _notes(card: IndexCard) -> list[str]:
    """What a reader must know of the figures, and whether they are what was asked for."""
    return [*_age(card), *_aim(card)]


def _age(card: IndexCard) -> list[str]:
    removed = f"{card.removed:,} removed rows"
    if card.measured != card.generation and card.removed:
        return [
            f"the figures are from before the last change: with {removed} to leave out search is "
            "slower; compact=true measures it again"
        ]
    if card.measured != card.generation:
        return ["the figures are from before the last change, which left nothing to measure by"]
    if card.removed:
        return [
            f"in the figures {removed} still count as right answers, and search, which leaves them "
            "out, is slower than they say; compact=true measures it again"
        ]
    return []


def _aim(card: IndexCard) -> list[str]:
    if card.tuned_for is None or card.target_recall is None:
        return []
    reached = {one.queries: one.at_10 for one in card.reached}.get(card.tuned_for)
    if reached is None:
        return [
            f"no {card.tuned_for} queries are left that measure it: their right answers were "
            "removed; build the index again to have it measured and tuned"
        ]
    if reached.value >= card.target_recall:
        return []
    found = (
        f"below the target: {card.tuned_for} queries reach {100 * reached.value:.1f} % of the "
        f"{100 * card.target_recall:g} % asked for"
    )
    if reached.high >= card.target_recall:
        return [f"{found}; that is within the error of {reached.count:,} queries"]
    return [f"{found}, the most that was found; allow more memory, or name a finer factory"]


def _own_pictures(card: IndexCard) -> list[str]:
    asked = [one.queries for one in card.reached if one.queries in ("image", "fused")]
    if card.modality != "image" or not asked:
        return []
    return [f"{' and '.join(asked)} queries are pictures of the index itself; others may find less"]


def _row(name: str, cells: list[str]) -> str:
    return f"{name:8}" + "".join(f"{cell:>24}" for cell in cells)


def _percent(figure: Figure) -> str:
    return f"{100 * figure.value:.1f} ({100 * figure.low:.1f} to {100 * figure.high:.1f})"


def _ten(figures: tuple[Figure, ...]) -> Figure:
    found = [one for one in figures if one.name.endswith("@10")]
    return found[0] if found else figures[-1]

import json

import numpy as np
import pytest

from eval.intervals import Interval
from eval.results import Figure, Outcomes, Report, format_table


@pytest.fixture
def report():
    return Report(
        task="retrieval",
        title="unseen artist",
        figures=(
            Figure.of("recall@1", Interval(0.2345, 0.21, 0.26, 1728), chance=1 / 1728),
            Figure.of(
                "median_rank",
                Interval(6.0, 5.0, 7.5, 1728),
                chance=864.0,
                unit="rank",
                higher_is_better=False,
            ),
            Figure("gain", -0.031, -0.05, -0.01, 9, unit="points"),
        ),
        protocol={"images": 1728, "ties": "against"},
        details={"confused": [{"truth": "cat", "count": 3}]},
        outcomes={"recall@1": Outcomes(np.ones(3))},
    )


def test_json_keeps_everything_but_the_outcomes(report):
    value = json.loads(json.dumps(report.to_json(), allow_nan=False))
    again = Report.from_json(value)
    assert again == report
    assert not again.outcomes
    assert again["median_rank"].higher_is_better is False


def test_damaged_json_is_refused_in_one_line(report):
    value = report.to_json()
    for broken in (
        {**value, "version": 99},
        {key: inner for key, inner in value.items() if key != "protocol"},
        {**value, "figures": [{"name": "x", "colour": "red"}]},
        {},
    ):
        with pytest.raises(ValueError, match=r"report: .*evaluate again$") as caught:
            Report.from_json(broken)
        assert "\n" not in str(caught.value)


def test_an_unknown_figure_names_the_known_ones(report):
    with pytest.raises(KeyError, match="no figure 'recall@7'; it has: recall@1, median_rank"):
        report["recall@7"]


def test_the_table_is_aligned(report):
    lines = format_table([report]).splitlines()
    assert lines[2].startswith("unseen artist  recall@1     23.4 %  21.0 to 26.0 %")
    assert "0.0579 %" in lines[2]
    assert "5.0 to 7.5" in lines[3]
    assert "-3.1" in lines[4]
    assert "-5.0 to -1.0" in lines[4]
    assert len({len(line) for line in lines}) == 1  # right-aligned columns end together

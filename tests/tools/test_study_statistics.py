"""Numbers over seeds beside ones worked out by hand."""

import math

import pytest
from study_cases import row

from tools.study_statistics import gains, paired, summarise


def test_summary():
    found = summarise([1.0, 2.0, 6.0])
    assert found.mean == 3.0
    assert found.deviation == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert found.error == pytest.approx(math.sqrt(7 / 3))
    assert (found.count, found.positive) == (3, 3)
    assert summarise([-1.0, 0.0, 2.0]).positive == 1


def test_spread_needs_two_values():
    one = summarise([4.0])
    assert one.mean == 4.0
    assert math.isnan(one.deviation)
    assert math.isnan(one.error)
    none = summarise([])
    assert none.count == 0
    assert math.isnan(none.mean)
    assert math.isnan(none.error)


def test_differences_are_paired_by_seed():
    rows = [
        *(row("b", 2, 10.0), row("b", 0, 20.0), row("b", 1, 30.0)),
        *(row("m", 0, 21.0), row("m", 5, 99.0), row("m", 2, 9.0)),
    ]
    assert gains(rows, "m", "b") == [1.0, -1.0]  # seeds 0 and 2
    assert [(own.seed, other.AP) for own, other in paired(rows, "m", "b")] == [(0, 20.0), (2, 10.0)]
    assert gains(rows, "m", None) == []
    assert gains(rows, "m", "absent") == []


def test_the_error_of_paired_differences_leaves_the_seeds_own_spread_out():
    rows = [row("b", seed, value) for seed, value in enumerate((10.0, 30.0, 50.0))]
    rows += [row("m", seed, value) for seed, value in enumerate((12.0, 32.0, 52.0))]
    assert summarise(gains(rows, "m", "b")).error == 0.0
    assert summarise([r.AP for r in rows if r.cell == "m"]).deviation == 20.0

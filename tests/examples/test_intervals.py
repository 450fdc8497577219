"""Intervals against the printed tables of Student's t, and sums by hand."""

import math

import pytest

from examples.intervals import Estimate


@pytest.mark.parametrize(("df", "quantile"), [(1, 12.7062), (9, 2.2622), (11, 2.2010), (29, 2.0452)])
def test_half_width_is_students(df, quantile):
    values = [0.25 + 0.5 * (i % 3) + 0.01 * i for i in range(df + 1)]
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / df)
    estimate = Estimate.of(values)
    assert estimate.mean == pytest.approx(mean, rel=1e-12)
    assert estimate.half_width == pytest.approx(quantile * deviation / math.sqrt(df + 1), rel=3e-5)


def test_of_a_difference_pairs_count():
    """Effects common to paired seeds cancel: each list's own interval is wider than 50."""
    others = [0.0, 50.0, 100.0, 150.0]
    estimate = Estimate.of_difference(
        [value + extra for value, extra in zip(others, [1, 2, 1, 2], strict=True)], others
    )
    assert estimate.mean == pytest.approx(1.5)
    assert estimate.half_width == pytest.approx(3.1824 * math.sqrt(1 / 3) / 2, rel=1e-4)
    assert estimate.excludes_zero
    assert not Estimate.of(others).excludes_zero
    with pytest.raises(ValueError, match="each of the 2 values, got 1"):
        Estimate.of_difference([1.0, 2.0], [1.0])


def test_one_seed_has_no_interval():
    estimate = Estimate.of([0.5])
    assert estimate == Estimate(0.5, None)
    assert not estimate.excludes_zero
    assert (estimate.text(), estimate.percent()) == ("0.50", "50.0")
    with pytest.raises(ValueError, match="got none"):
        Estimate.of([])


def test_text():
    estimate = Estimate(-0.12345, 0.0321)
    assert estimate.text(".3f") == "-0.123 ± 0.032"
    assert estimate.percent() == "-12.3 ± 3.2"

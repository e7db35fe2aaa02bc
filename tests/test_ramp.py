"""Closed-form sums of step times against adding them up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pytest_gpulab.engine.ramp import ramp_count, ramp_sum

SECONDS = st.floats(1e-4, 10.0)
SLOPES = st.just(0.0) | st.floats(1e-9, 0.5)
FLOORS = st.just(0.0) | SECONDS


def added_up(count: int, first: float, slope: float, floor: float) -> float:
    return sum(max(floor, first + j * slope) for j in range(count))


@given(st.integers(0, 200), SECONDS, SLOPES, FLOORS)
def test_sum_is_what_adding_gives(count, first, slope, floor):
    expected = added_up(count, first, slope, floor)
    assert abs(ramp_sum(count, first, slope, floor) - expected) <= 1e-9 * max(1.0, expected)


@given(st.floats(1e-3, 100.0), SECONDS, SLOPES, FLOORS)
def test_count_is_the_first_that_reaches_the_total(total, first, slope, floor):
    count = ramp_count(total, first, slope, floor)
    assert ramp_sum(count, first, slope, floor) >= total
    assert count == 0 or ramp_sum(count - 1, first, slope, floor) < total

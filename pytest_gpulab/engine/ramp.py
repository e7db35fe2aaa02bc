"""Sums of step times in closed form: decode steps grow linearly with the context, but never fall below a floor."""

from __future__ import annotations

import math


def ramp_sum(count: int, first: float, slope: float, floor: float) -> float:
    """Sum over j < count of max(floor, first + j * slope), for slope >= 0."""
    below = 0
    if first < floor:
        below = count
        if first + (count - 1) * slope > floor:
            below = math.ceil((floor - first) / slope)
    above = count - below
    return below * floor + above * (first + slope * (below + (above - 1) * 0.5))


def ramp_count(total: float, first: float, slope: float, floor: float) -> int:
    """The smallest count whose `ramp_sum` reaches total. One of first, slope and floor must be positive."""
    below = 0
    if first < floor:
        below = math.ceil(total / floor)
        if first + (below - 1) * slope > floor:
            below = math.ceil((floor - first) / slope)
    count = below
    rest = total - below * floor
    if rest > 0.0:
        half = first + slope * (below - 0.5)
        count += math.ceil(2.0 * rest / (half + math.sqrt(half * half + 2.0 * slope * rest)))
    while ramp_sum(count, first, slope, floor) < total:  # rounding
        count += 1
    while count > 0 and ramp_sum(count - 1, first, slope, floor) >= total:
        count -= 1
    return count

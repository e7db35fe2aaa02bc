"""Virtual and real time."""

from __future__ import annotations

import asyncio

import pytest

from pytest_gpulab.cluster.clock import EPOCH, RealClock, VirtualClock
from pytest_gpulab.cluster.durations import Durations, Span, Stages


def test_calls_come_in_order_of_time_then_of_asking():
    clock, seen = VirtualClock(), []
    clock.call_later(2, lambda: seen.append(("late", clock.now() - EPOCH)))
    clock.call_later(1, lambda: seen.append(("first", clock.now() - EPOCH)))
    clock.call_later(1, lambda: clock.call_later(0, lambda: seen.append(("asked at 1", clock.now() - EPOCH))))
    clock.call_later(1.5, lambda: seen.append(("never", 0))).cancel()
    assert clock.run_until(EPOCH + 5) is False
    assert seen == [("first", 1.0), ("asked at 1", 1.0), ("late", 2.0)]
    assert clock.now() == EPOCH + 5


def test_time_stops_where_the_condition_holds():
    clock, seen = VirtualClock(), []
    for second in range(10):
        clock.call_later(second, lambda second=second: seen.append(second))
    assert clock.run_until(EPOCH + 100, lambda: len(seen) == 4)
    assert clock.now() == EPOCH + 3


def test_real_time_can_be_sped_up():
    async def wait():
        clock, done = RealClock(speed=100), asyncio.Event()
        start = clock.now()
        clock.call_later(5, done.set)
        clock.call_later(1, done.set).cancel()
        await asyncio.wait_for(done.wait(), 5)
        return clock.now() - start

    assert 5 <= asyncio.run(wait()) < 60
    with pytest.raises(ValueError, match="speed must be positive, got 0"):
        RealClock(0)


def test_each_stage_has_its_own_stream():
    one, other = Durations(seed=1), Durations(seed=1)
    first = [one.draw("boot") for _ in range(3)]
    other.draw("image_pull")
    assert [other.draw("boot") for _ in range(3)] == first
    assert [Durations(seed=2).draw("boot")] != first[:1]
    fixed = Durations(Stages().replace(boot=Span(5, 5)))
    assert fixed.draw("boot") == 5.0
    with pytest.raises(ValueError, match="got 3 to 2 s"):
        Span(3, 2)

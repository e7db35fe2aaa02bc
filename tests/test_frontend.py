"""The front end: what is streamed in one go equals what is streamed step by step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpulab.engine.frontend import FrontEnd
from tests.engine_plans import variant

COST = variant(
    front_per_request_s=1e-3,
    front_per_prompt_token_s=1e-6,
    front_per_output_token_s=2e-5,
    front_per_chunk_s=5e-5,
    front_latency_s=2e-3,
).front_end


def test_an_idle_front_end_adds_its_costs():
    front_end = FrontEnd(COST)
    front_end.take_in(1.0, 500, 7)
    [(arrives, request)] = front_end.inbox
    assert (arrives, request) == (pytest.approx(1.0 + 1e-3 + 500e-6), 7)
    assert front_end.stream(2.0, 1) == pytest.approx(2.0 + 2e-5 + 5e-5 + 2e-3)


@given(
    busy=st.floats(0.0, 0.2),
    gap=st.floats(1e-4, 0.02),
    growth=st.just(0.0) | st.floats(1e-7, 1e-4),
    floor=st.floats(0.0, 0.02),
    steps=st.integers(1, 100),
    tokens=st.integers(1, 300),
)
def test_streaming_many_steps_at_once_equals_one_by_one(busy, gap, growth, floor, steps, tokens):
    at_once, one_by_one = FrontEnd(COST), FrontEnd(COST)
    for front_end in (at_once, one_by_one):
        for _ in range(int(busy / 1e-3)):
            front_end.take_in(0.0, 0, 0)
        front_end.stream(0.001, tokens)
    at_once.stream_steps(0.01, gap, growth, floor, steps, tokens)
    ready = 0.01
    for step in range(steps):
        one_by_one.stream(ready, tokens)
        ready += max(floor, gap + step * growth)
    assert at_once.free_at == pytest.approx(one_by_one.free_at, abs=1e-9)
    assert at_once.stream(ready, tokens) == pytest.approx(one_by_one.stream(ready, tokens), abs=1e-9)


def test_streaming_faster_than_the_cpu_allows_builds_a_backlog():
    front_end = FrontEnd(COST)
    delays = [front_end.stream(step * 1e-3, 200) - step * 1e-3 for step in range(100)]
    assert delays[-1] > 0.5
    assert delays == sorted(delays)

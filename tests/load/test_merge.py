"""Outcomes of shards become the outcome of all, exactly."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpulab.load.reconcile import MOST_CLOCK_ERROR_S, client_problems
from pytest_gpulab.load.share import Outcome, merge
from pytest_gpulab.run import REQUEST_DTYPE


def outcome(count: int, seed: int = 0, **fields: object) -> Outcome:
    """Of requests with random times."""
    random = np.random.default_rng(seed)
    rows = np.zeros(count, dtype=REQUEST_DTYPE)
    for name in ("scheduled", "sent", "first_token", "last_token"):
        rows[name] = random.random(count)
    rows["ok"] = random.random(count) < 0.9
    values = {"failures": Counter(reset=3), "counts": Counter(whole=count), "cpu_s": 0.5, "ended_s": 2.25, **fields}
    return Outcome(rows, send_lag_s=random.random(count), loop_lag_s=random.random(9), **values)  # type: ignore[arg-type]


@given(st.integers(1, 7), st.integers(0, 60))
def test_rows_come_back_in_order_of_the_schedule(shards: int, count: int) -> None:
    whole = outcome(count)
    parts = [Outcome(whole.requests[k::shards], Counter(), np.empty(0), np.empty(0), 0.0, 0.0) for k in range(shards)]
    np.testing.assert_array_equal(merge(parts).requests, whole.requests)


def test_shards_that_may_have_started_apart_are_no_evidence() -> None:
    within, beyond = (outcome(3, clock_error_s=MOST_CLOCK_ERROR_S * factor) for factor in (0.99, 1.01))
    assert not any("apart" in problem for problem in client_problems(within))
    assert any("started 50 ms apart" in problem or "51 ms apart" in problem for problem in client_problems(beyond))

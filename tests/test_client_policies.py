"""The client in virtual time: what it sends, drops and gives up, on a server of one place and known speed."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest

from pytest_gpulab.engine.client import Client
from pytest_gpulab.engine.stepping import run_stepping
from pytest_gpulab.experiment import (
    BoundedQueue,
    ClosedLoop,
    Direct,
    Poisson,
    Shape,
    Workload,
)
from tests.engine_plans import plan, variant

ONE_TOKEN = Shape(prompt_tokens=16, output_tokens=1)
SERVICE_S = 0.4
COSTS = variant(step_s=SERVICE_S)


def table(workload: Workload, seed: int = 0, **settings: object) -> np.ndarray:
    """The request table of a server that answers one request after the other, each in SERVICE_S."""
    served = plan(workload, COSTS, seed, **{"max_num_seqs": 1, "async_scheduling": False, **settings})
    return run_stepping(served).request_table(served.schedule)


def poisson(rate: float, requests: int = 300, **fields: object) -> Workload:
    return Workload(arrivals=Poisson(rate=rate), shape=ONE_TOKEN, requests=requests, **fields)  # type: ignore[arg-type]


def bounded_queue(due: list[float], capacity: int, max_wait: float) -> list[float]:
    """When each request is sent to a server that takes one at a time for SERVICE_S; NaN: never."""
    sent, queue, free_at = [math.nan] * len(due), deque[int](), -math.inf
    for request, now in [*enumerate(due), (len(due), math.inf)]:
        while queue and free_at <= now:
            head = queue.popleft()
            if free_at < due[head] + max_wait:
                sent[head], free_at = free_at, free_at + SERVICE_S
        queue = deque(waiting for waiting in queue if due[waiting] + max_wait > now)
        if request < len(due) and free_at <= now:
            sent[request], free_at = now, now + SERVICE_S
        elif request < len(due) and len(queue) < capacity:
            queue.append(request)
    return sent


@pytest.mark.parametrize(("capacity", "max_wait_s"), [(1, 0.3), (3, 10.0), (5, 1.1), (50, 2.0), (1000, 1e6)])
@pytest.mark.parametrize("rate", [1.0, 2.5, 6.0])
def test_bounded_queue_against_a_reference(rate, capacity, max_wait_s):
    admission = BoundedQueue(capacity=capacity, max_wait_s=max_wait_s, max_outstanding=1)
    rows = table(poisson(rate, admission=admission), seed=int(10 * rate))
    expected = bounded_queue(rows["scheduled"].tolist(), capacity, max_wait_s)
    np.testing.assert_allclose(rows["sent"], expected, atol=1e-9)
    np.testing.assert_array_equal(rows["ok"], ~np.isnan(expected))


def test_direct_sends_when_due():
    rows = table(poisson(6.0))
    np.testing.assert_array_equal(rows["sent"], rows["scheduled"])
    assert rows["ok"].all()


@pytest.mark.parametrize("limit", [1, 4])
def test_direct_drops_what_exceeds_its_limit(limit):
    rows = table(poisson(6.0, admission=Direct(max_outstanding=limit)))
    for row in rows:
        outstanding = np.sum((rows["sent"] < row["sent"]) & (rows["last_token"] > row["sent"]))
        assert np.isnan(row["sent"]) or outstanding < limit
    dropped = rows[np.isnan(rows["sent"])]
    assert 0 < len(dropped) < len(rows)
    for row in dropped:
        in_flight = (rows["sent"] < row["scheduled"]) & (rows["last_token"] > row["scheduled"])
        assert in_flight.sum() == limit
    assert not dropped["ok"].any()
    assert np.isnan(dropped["last_token"]).all()
    assert (dropped["output_tokens"] == 0).all()


def test_a_closed_loop_keeps_its_concurrency():
    workload = Workload(arrivals=ClosedLoop(concurrency=5), shape=ONE_TOKEN, requests=60)
    rows = table(workload, max_num_seqs=3)
    assert rows["ok"].all()
    np.testing.assert_array_equal(rows["scheduled"], rows["sent"])
    assert (rows["sent"][:5] == 0).all()
    # Each answer sends the next request, in order, until all are sent.
    np.testing.assert_allclose(np.sort(rows["sent"])[5:], np.sort(rows["last_token"])[:55])


def test_a_closed_loop_takes_no_admission_policy():
    workload = Workload(
        arrivals=ClosedLoop(concurrency=5), shape=ONE_TOKEN, requests=60, admission=Direct(max_outstanding=2)
    )
    with pytest.raises(ValueError, match="leave admission out"):
        table(workload)


def test_a_client_gives_up_and_the_server_stops():
    """Overload, answers of 10 steps: those given up hold no place after their next step."""
    shape = Shape(prompt_tokens=16, output_tokens=10)
    workload = Workload(arrivals=Poisson(rate=0.6), shape=shape, requests=100, timeout_s=6.0)
    served = plan(workload, variant(step_s=SERVICE_S), max_num_seqs=1, async_scheduling=False)
    outcome = run_stepping(served)
    rows = outcome.request_table(served.schedule)
    late = ~rows["ok"]
    assert 0 < late.sum() < 100
    assert (rows["last_token"] - rows["sent"])[~late].max() <= 6.0
    assert np.isnan(rows["last_token"][late]).all()
    assert (rows["output_tokens"][late] < 10).all()
    begun = late & (rows["output_tokens"] > 0)
    assert begun.any()
    received = np.floor((rows["sent"] + 6.0 - rows["first_token"])[begun] / SERVICE_S + 1e-9) + 1
    np.testing.assert_array_equal(rows["output_tokens"][begun], received)
    # The server learns of it at its next step: the step that runs then still counts, and may be the last one.
    assert (~late).sum() <= outcome.totals["request_success_total"] <= (~late).sum() + begun.sum()
    tokens = outcome.totals["generation_tokens_total"]
    assert rows["output_tokens"].sum() <= tokens <= rows["output_tokens"].sum() + late.sum()


def test_a_late_answer_does_not_free_a_place_twice():
    workload = poisson(1.0, admission=Direct(max_outstanding=1), timeout_s=2.0)
    client = Client(workload, [0.0, 1.0, 2.5, 2.6])
    assert client.act(0.5) == [0]
    assert client.act(1.5) == []  # the second is dropped
    client.answered(0, 3.0)
    assert client.act(2.55) == [2]  # the first was given up at 2
    assert client.given_up == [0]
    assert client.act(2.9) == []
    assert client.act(3.2) == []
    assert client.deadline(2) == pytest.approx(4.5)


QUEUE = BoundedQueue(capacity=3, max_wait_s=5.0, max_outstanding=2)


def test_a_queue_is_held_while_no_server_is_there():
    """Refused requests go back to their places; the fourth to wait finds the queue full, and each waits its time."""
    client = Client(poisson(1.0, admission=QUEUE), [0.0, 1.0, 2.0, 3.0, 9.0])
    assert client.act(1.5) == [0, 1]
    client.refused(1, 1.6)
    client.refused(0, 1.7)
    assert client.holds and np.isnan(client.sent[:2]).all()
    assert client.act(4.5) == []  # 0, 1 and 2 wait, 3 finds no place
    assert client.next_at == 5.0, "the first has waited long enough then"
    assert client.act(6.5) == []  # 0 and 1 are given up
    assert client.resume(6.6) == [2]
    assert client.sent[2] == 6.6
    assert client.act(9.0) == [4]
    assert np.isnan([client.sent[0], client.sent[1], client.sent[3]]).all()


def test_a_queue_that_runs_over_loses_the_youngest():
    client = Client(poisson(1.0, admission=QUEUE), [0.0, 0.1, 0.2, 0.3, 0.4])
    assert client.act(1.0) == [0, 1]  # 2, 3 and 4 wait
    client.refused(0, 1.1)
    client.refused(1, 1.2)
    assert client.resume(1.3) == [0, 1]
    client.answered(0, 2.0)
    assert client.act(2.0) == [2]
    client.answered(1, 2.1)
    client.answered(2, 2.1)
    assert client.act(2.2) == []


def test_a_direct_client_loses_what_no_server_takes():
    client = Client(poisson(1.0, admission=Direct(max_outstanding=1)), [0.0, 1.0])
    assert client.act(0.5) == [0]
    client.refused(0, 0.6)
    assert not client.holds and client.act(1.0) == [1]
    assert client.sent == [0.0, 1.0]


def test_the_deadline_of_a_refused_request_is_no_deadline():
    client = Client(poisson(1.0, admission=QUEUE, timeout_s=2.0), [0.0])
    assert client.act(0.0) == [0]
    client.refused(0, 0.1)
    assert client.resume(1.5) == [0]
    assert client.act(3.0) == [] and client.given_up == []
    assert client.act(3.5) == [] and client.given_up == [0]

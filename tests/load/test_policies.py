"""Admission policies on the real clock do what the simulator's client does with the same answers."""

from __future__ import annotations

import socket

import numpy as np
import pytest

from pytest_gpulab.engine.client import Client
from pytest_gpulab.experiment import BoundedQueue, Direct, Gamma, Shape, Workload
from tests.load.golden import golden_server, truth
from tests.load.loads import failures, load, nothing_lost, requests, without_lag

SERVICE_S = 0.1
"""The server answers each request so long after it has come, however many there are: constant service time."""


def virtual(workload: Workload, scheduled: list[float], answered_at: list[float]) -> np.ndarray:
    """When the simulator's client sends each request if it gets the same answers at the same times; NaN: never."""
    client = Client(workload, list(scheduled))
    while client.next_at < np.inf:
        for index in client.act(client.next_at):
            end = answered_at[index]
            client.answered(index, client.sent[index] + SERVICE_S if np.isnan(end) else end)
    return np.array(client.sent)


@pytest.mark.flaky(reruns=2)  # a busy machine moves an answer past the arrival it would have made room for
@pytest.mark.parametrize(
    "admission",
    [
        pytest.param(Direct(), marks=pytest.mark.slow),
        Direct(max_outstanding=3),
        pytest.param(BoundedQueue(capacity=4, max_wait_s=30.0, max_outstanding=3), marks=pytest.mark.slow),
        BoundedQueue(capacity=40, max_wait_s=0.25, max_outstanding=2),
    ],
    ids=["direct", "direct-3", "queue-4", "queue-impatient"],
)
def test_as_in_virtual_time(admission):
    """Bursts at about twice what the server takes. What is due within a millisecond of an answer may differ."""
    workload = Workload(
        arrivals=Gamma(rate=50.0, burstiness=0.3),
        shape=Shape(prompt_tokens=9, output_tokens=1),
        requests=80,
        admission=admission,
    )
    with golden_server(delay_s=SERVICE_S) as url:
        run = load(url, workload)
    assert nothing_lost(run, 80)
    rows = run.requests
    expected = virtual(workload, rows["scheduled"].tolist(), rows["last_token"].tolist())
    same_fate = np.isnan(rows["sent"]) == np.isnan(expected)
    assert same_fate.mean() >= 0.95
    both = ~np.isnan(rows["sent"]) & ~np.isnan(expected)
    assert np.median(np.abs(rows["sent"] - expected)[both]) < 0.01
    assert failures(run).keys() <= {"dropped"}
    if admission == Direct():
        assert rows["ok"].all()
        return
    assert failures(run)["dropped"] > 5
    ends = np.where(rows["ok"], rows["last_token"], np.inf)
    for sent in rows["sent"][~np.isnan(rows["sent"])]:
        assert np.sum((rows["sent"] < sent) & (ends > sent)) < admission.max_outstanding
    waited = (rows["sent"] - rows["scheduled"])[~np.isnan(rows["sent"])]
    if isinstance(admission, BoundedQueue):
        assert waited.max() < admission.max_wait_s + 0.1
        assert (np.diff(rows["sent"][~np.isnan(rows["sent"])]) >= 0).all()  # first in, first out


def test_a_bounded_queue_waits_for_a_server_and_sends_nothing_twice():
    """The first request meets a load balancer without a target."""
    queue = BoundedQueue(capacity=40, max_wait_s=30.0, max_outstanding=1)
    with golden_server(plan=["503", "plain"]) as url:
        run = load(url, requests(20, admission=queue))
        seen = truth(url)
    assert run.requests["ok"].all() and not failures(run)
    assert len(seen) == 21 and len({tuple(record["prompt"]) for record in seen}) == 20
    assert without_lag(run.problems) == []
    assert (np.diff(run.requests["sent"]) >= 0).all(), "first in, first out"
    assert run.requests["sent"].min() > 0.25, "nobody is asked before a probe is answered"


def test_a_queue_without_any_server_waits_its_time():
    queue = BoundedQueue(capacity=40, max_wait_s=0.5, max_outstanding=2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    run = load(url, requests(10, admission=queue), metrics=False)
    assert failures(run) == {"dropped": 10}
    assert np.isnan(run.requests["sent"]).all()


def test_direct_clients_lose_what_a_balancer_refuses():
    with golden_server(plan=["503", "503", "plain"]) as url:
        run = load(url, requests(20))
    assert failures(run) == {"http_503": 2}
    assert without_lag(run.problems) == [], "an answer that nobody gave is no fault of the evidence"

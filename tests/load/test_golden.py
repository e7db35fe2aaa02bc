"""A load against a server of known truth: what the client reports is what the server did."""

from __future__ import annotations

import time

import numpy as np
import pytest

from pytest_gpulab.arrivals import prompt_ids
from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.experiment import ClosedLoop, Poisson, Shape, Workload
from pytest_gpulab.load import Headroom, run_load
from tests.load.golden import golden_server, truth
from tests.load.loads import PROFILE, SHAPE, failures, load, nothing_lost, requests, without_lag

POISSON = Workload(arrivals=Poisson(rate=60.0), shape=Shape(prompt_tokens=20, output_tokens=12), requests=120)


@pytest.mark.parametrize("processes", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_times_are_those_of_the_server(processes):
    """Bounds that hold on a busy machine; `make bench` measures how near the times are."""
    delay_s, interval_s = 0.05, 0.01
    with golden_server(delay_s=delay_s, interval_s=interval_s) as url:
        before = time.monotonic()
        run = load(url, POISSON, processes=processes)
        after = time.monotonic()
        records = truth(url)
    assert nothing_lost(run, 120)
    assert run.requests["ok"].all()
    assert without_lag(run.problems) == []
    rows = run.requests
    of_prompt = {tuple(record["prompt"][2:]): record for record in records}
    mine = [of_prompt[tuple(prompt_ids(POISSON, 0, index, 20)[2:])] for index in range(120)]
    received, first, last = (np.array([record[name] for record in mine]) for name in ("received", "first", "last"))
    assert (received > before).all()
    assert (last < after).all()
    # One start of the run fits everything: nothing is received before it is sent, or read before it is written.
    latest_start = np.min(received - rows["sent"])
    earliest_start = max(np.max(first - rows["first_token"]), np.max(last - rows["last_token"]))
    assert earliest_start <= latest_start
    assert latest_start - earliest_start < 0.05
    assert (rows["sent"] >= rows["scheduled"]).all()
    assert (rows["first_token"] - rows["sent"] >= first - received).all()
    assert (rows["last_token"] - rows["sent"] >= last - received).all()
    assert np.median((rows["first_token"] - rows["scheduled"]) - (first - received)) < 0.05
    assert run.duration_s >= rows["last_token"].max()


def test_a_load_that_offers_nothing_is_no_evidence():
    nobody = Workload(arrivals=Poisson(rate=0.01), shape=SHAPE, duration_s=0.5)
    with golden_server() as url:
        run = load(url, nobody)
    assert (len(run.requests), run.duration_s) == (0, 0.5)
    assert any("offered no request" in problem for problem in run.problems)


def test_tokens_are_counted_exactly():
    with golden_server(plan=["plain", "empty_texts", "pairs"] * 4 + ["plain"]) as url:
        run = load(url, requests(30))
        records = truth(url)
    assert run.requests["ok"].all()
    assert run.requests["output_tokens"].tolist() == [6] * 30
    assert run.totals["generation_tokens_total"] == sum(record["tokens"] for record in records) == 180
    assert run.totals["prompt_tokens_total"] == run.requests["prompt_tokens"].sum() == 600
    assert run.totals["request_success_total"] == 30
    assert without_lag(run.problems) == []


def test_what_is_sent():
    """Token ids of the seeded prompts, unique; as many tokens as scheduled, no more and no fewer."""
    with golden_server() as url:
        endpoint = Endpoint(url + "/", "golden", api_key="secret-key")
        settings = {"profile": PROFILE, "target": "test", "basis": "emulated", "server": "golden"}
        run_load(requests(12), endpoint=endpoint, seed=5, **settings)
        run_load(requests(12), endpoint=endpoint, seed=5, **settings)
        records = truth(url)
    for record in records:
        assert record["authorization"] == ["Authorization: Bearer secret-key"]
        sent = record["request"]
        assert (sent["max_tokens"], sent["min_tokens"], sent["ignore_eos"]) == (6, 6, True)
        assert (sent["stream"], sent["stream_options"]) == (True, {"include_usage": True})
        assert sent["model"] == "golden"
        assert len(record["prompt"]) == 20
        assert min(record["prompt"]) >= 300
    assert len({tuple(record["prompt"]) for record in records}) == 24
    first, second = ([record["prompt"] for record in records[part]] for part in (slice(12), slice(12, None)))
    expected = [prompt_ids(requests(12), 5, index, 20).tolist() for index in range(12)]
    # A run's first tokens are its own, so that the cache of the run before is cold; the others are the seed's.
    for prompts in (first, second):
        starts = {tuple(prompt[:2]) for prompt in prompts}
        assert len(starts) == 1
        assert sorted(prompt[2:] for prompt in prompts) == sorted(prompt[2:] for prompt in expected)
    assert first[0][:2] != second[0][:2]
    assert "secret-key" not in repr(endpoint)


def test_a_shared_prefix_is_shared():
    with golden_server() as url:
        load(url, requests(8, shared_prefix_tokens=16))
        prompts = [record["prompt"] for record in truth(url)]
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 1
    assert len({tuple(prompt[16:]) for prompt in prompts}) == 8


def test_a_closed_loop_keeps_its_users_busy():
    workload = Workload(arrivals=ClosedLoop(concurrency=4), shape=SHAPE, requests=40)
    with golden_server(delay_s=0.02) as url:
        run = load(url, workload)
    rows = run.requests
    assert rows["ok"].all()
    assert (rows["scheduled"][:4] == 0).all()
    in_flight = [np.sum((rows["sent"] <= t) & (rows["last_token"] > t)) for t in rows["sent"]]
    assert max(in_flight) <= 4
    ends = np.sort(rows["last_token"])[:36]
    assert (np.sort(rows["scheduled"])[4:] >= ends).all()  # each is due when an earlier one has ended
    assert without_lag(run.problems) == []


def test_a_trace_is_sent_as_recorded():
    rows = [(0.0, 9, 2), (0.05, 30, 5), (0.05, 12, 1), (0.3, 10, 3)]
    with golden_server() as url:
        run = load(url, Workload.from_trace(rows))
        records = truth(url)
    assert [(len(record["prompt"]), record["tokens"]) for record in records] == [row[1:] for row in rows]
    assert run.requests["scheduled"].tolist() == [row[0] for row in rows]
    assert (run.requests["sent"] >= run.requests["scheduled"]).all()


@pytest.mark.slow
def test_shards_offer_the_same_load():
    with golden_server() as url:
        whole, shards = (load(url, POISSON, processes=processes) for processes in (1, 3))
        records = truth(url)
    for name in ("scheduled", "prompt_tokens", "output_tokens", "ok"):
        np.testing.assert_array_equal(whole.requests[name], shards.requests[name])
    first, second = ([record["prompt"][2:] for record in records[part]] for part in (slice(120), slice(120, None)))
    assert sorted(first) == sorted(second)
    assert shards.totals["request_success_total"] == 120
    assert without_lag(shards.problems) == []


def test_a_load_whose_requests_depend_on_each_other_is_not_divided():
    workload = Workload(arrivals=ClosedLoop(concurrency=4), shape=SHAPE, requests=40)
    with pytest.raises(ValueError, match="use one process"):
        load("http://127.0.0.1:1", workload, processes=2)


def test_load_beyond_the_headroom_is_refused():
    workload = Workload(arrivals=Poisson(rate=50.0), shape=Shape(prompt_tokens=9, output_tokens=100), duration_s=30.0)
    with pytest.raises(ValueError, match="within what this client can do"):
        load("http://127.0.0.1:1", workload, headroom=Headroom(chunks_per_s=3000.0))


def test_load_within_the_headroom_is_sent():
    with golden_server() as url:
        run = load(url, requests(10), headroom=Headroom(chunks_per_s=3000.0))
    assert run.requests["ok"].all()
    assert failures(run).total() == 0

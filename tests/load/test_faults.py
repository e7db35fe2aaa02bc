"""Faults of servers and networks: every request is accounted for, by kind, and the run ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from pytest_gpulab.load import LoadInterrupted
from pytest_gpulab.run_store import Question, RunStore
from tests.load.golden import golden_server
from tests.load.loads import PROFILE, failures, load, nothing_lost, requests, without_lag


def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        run = load(f"http://127.0.0.1:{taken.getsockname()[1]}", requests(20), metrics=False)
    assert failures(run) == {"connect": 20}
    assert nothing_lost(run, 20)
    assert run.totals["client_connection_errors"] == 20
    assert np.isnan(run.requests["first_token"]).all()
    assert not np.isnan(run.requests["sent"]).any()
    assert without_lag(run.problems) == []


@pytest.mark.parametrize(
    ("answer", "kind", "tokens"),
    [
        ("408", "http_408", 0),
        ("429", "http_429", 0),
        ("503", "http_503", 0),
        ("reset", "reset", 3),
        ("cut", "reset", 3),
        ("truncated", "truncated", 3),
        ("error_event", "stream_error", 2),
        ("error_and_cut", "stream_error", 2),
        ("short", "wrong_count", 5),
    ],
)
def test_answers_that_fail(answer, kind, tokens):
    """Half of them; the others are not touched by it. Refused ones are not sent again: that would be another load."""
    with golden_server(plan=["plain", answer] * 10) as url:
        run = load(url, requests(20, rate=50.0))
    assert failures(run) == {kind: 10}
    assert nothing_lost(run, 20)
    bad = run.requests[~run.requests["ok"]]
    assert bad["output_tokens"].tolist() == [tokens] * 10
    assert np.isnan(bad["last_token"]).all()
    assert np.isnan(bad["first_token"]).all() == (tokens == 0)
    assert run.requests["output_tokens"][run.requests["ok"]].tolist() == [6] * 10
    assert without_lag(run.problems) == []


@pytest.mark.parametrize(
    ("status", "what_to_do"),
    [
        ("302", "its log says why"),
        ("400", "its log says why"),
        ("401", "give the client the key"),
        ("404", "check the address and the name"),
    ],
)
def test_a_server_that_refuses_the_client_shows_nothing_of_the_load(status, what_to_do):
    with golden_server(plan=["plain", status]) as url:
        run = load(url, requests(4))
    (problem,) = without_lag(run.problems)
    assert problem.startswith(f"the server refused 3 requests with {status}: ") and what_to_do in problem


@pytest.mark.parametrize("answer", ["hang", "no_answer", "comments"])
@pytest.mark.parametrize("limit", ["workload", "load"])
def test_a_server_that_hangs(answer, limit):
    limits = {"workload": ({"timeout_s": 0.3}, {}), "load": ({}, {"longest_answer_s": 0.3})}
    fields, options = limits[limit]
    with golden_server(plan=["plain", "plain", answer]) as url:
        run = load(url, requests(12, rate=100.0, **fields), **options)
    assert set(failures(run)) == {"timeout"}
    assert nothing_lost(run, 12)
    assert run.requests["ok"].sum() <= 2, "a busy machine may be too slow for the plain answers, too"
    assert 0.3 < run.duration_s < 5.0


def test_answers_without_or_with_wrong_counts_are_no_evidence():
    with golden_server(plan=["miscounted"]) as url:
        run = load(url, requests(5))
    assert run.requests["ok"].all()
    assert without_lag(run.problems) == ["5 of 5 answers count other prompt tokens than were sent"]
    with golden_server(plan=["plain", "no_usage"]) as url:
        run = load(url, requests(5))
    assert run.requests["ok"].all()
    assert run.requests["output_tokens"].tolist() == [6] * 5
    assert without_lag(run.problems) == [
        "4 of 5 answers came without a usage block: their token counts are not verified"
    ]


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back():
    """Killed by its tenth request; another one takes its port. The counters say so."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    back = threading.Event()

    def come_back():
        with golden_server(port=port, plan=["plain"] * 9 + ["exit_now"]) as _:
            first_up.set()
            wait_until_refused(port)
        with golden_server(port=port):
            back.wait(30)

    first_up = threading.Event()
    servers = threading.Thread(target=come_back)
    servers.start()
    try:
        assert first_up.wait(30)
        run = load(f"http://127.0.0.1:{port}", requests(100, rate=20.0))
    finally:
        back.set()
        servers.join()
    assert nothing_lost(run, 100)
    assert failures(run).keys() <= {"reset", "connect"}
    assert failures(run)["reset"] >= 1
    assert run.requests["ok"][:9].all()
    assert run.requests["ok"][-20:].all()
    assert any("a server restarted during the run" in problem for problem in run.problems)


def wait_until_refused(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return
        time.sleep(0.01)
    raise TimeoutError("the server lives")


@pytest.mark.slow
def test_another_client_is_noticed():
    """A server that counts more than this client sent."""
    with golden_server(plan=["plain"]) as url:
        noise = threading.Thread(target=load, args=(url, requests(10, rate=10.0)), kwargs={"metrics": False})
        noise.start()
        run = load(url, requests(60, rate=30.0))
        noise.join()
    assert run.requests["ok"].all()
    assert any("prompt_tokens_total" in problem for problem in run.problems)
    assert any("request_success_total" in problem for problem in run.problems)


def test_a_metrics_page_that_never_comes():
    with golden_server() as url, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}/metrics"
        from pytest_gpulab.endpoint import Endpoint
        from pytest_gpulab.load import run_load

        endpoint = Endpoint(url, "golden", metrics_urls=(nowhere,))
        run = run_load(
            requests(5), endpoint=endpoint, profile=PROFILE, seed=0, target="t", basis="emulated", server="golden"
        )
    assert run.requests["ok"].all()
    assert len(run.server) == 0
    assert without_lag(run.problems) == [f"no metrics came from {nowhere}: the server's side is not known"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_keeps_what_there_is(tmp_path, processes):
    """Streams that hang, requests that are not yet due, some that are answered: the run ends at once, saved."""
    workload = requests(400, rate=20.0)
    with golden_server(plan=["plain"] * 10 + ["hang"]) as url:
        pressed = []

        def press(line: str) -> None:
            pressed.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt) as caught:
            load(url, workload, progress=press, processes=processes, interrupted_to=tmp_path)
        assert time.monotonic() - pressed[0] < 2.0
    assert isinstance(caught.value, LoadInterrupted)
    run = caught.value.run
    assert nothing_lost(run, 400)
    assert failures(run) == {"interrupted": 390}
    assert run.requests["ok"][:10].all() or processes > 1
    assert "interrupted before its end" in run.problems
    assert 4.0 <= run.duration_s < 10.0
    kept = RunStore(tmp_path).load(Question(workload, PROFILE, 0), "golden")
    assert kept is not None
    assert kept.requests.tobytes() == run.requests.tobytes()
    assert str(caught.value.saved) in str(caught.value)


def test_ctrl_c_in_a_terminal():
    """A process that is interrupted by the terminal, before anything was shown."""
    with golden_server(plan=["hang"]) as url:
        script = f"""
import threading, os, signal
from tests.load.loads import load, requests
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
load({url!r}, requests(100, rate=50.0))
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "LoadInterrupted: the load was interrupted after" in done.stderr

"""The client's own limits: what it measures of itself, how it divides a load, and what it says meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from urllib.request import urlopen

import pytest

from pytest_gpulab.experiment import BoundedQueue, ClosedLoop, Constant, Poisson, Shape, SpikeToZero, Workload
from pytest_gpulab.load.headroom import BeyondHeadroom, Headroom, NoHeadroom, measure_headroom, null_server, send_to
from pytest_gpulab.load.local import peak_chunk_rate, peak_rate, processes_for
from pytest_gpulab.load.progress import Progress, of_all
from tests.load.loads import requests
from tests.targets.processes import wait_for

SHAPE = Shape(prompt_tokens=64, output_tokens=50)


def test_a_null_server_answers_in_full():
    with null_server(0.002) as url:
        outcome = send_to(url, requests(30, rate=100.0))
    assert outcome.requests["ok"].all()
    assert outcome.requests["output_tokens"].tolist() == [6] * 30
    assert outcome.counts == {"whole": 30}  # with right usage blocks


@pytest.fixture
def short_rungs(monkeypatch):
    monkeypatch.setattr("pytest_gpulab.load.headroom._RATES", (10.0, 40.0))
    monkeypatch.setattr("pytest_gpulab.load.headroom._RUNG_S", 0.2)


@pytest.mark.slow
def test_headroom_is_the_last_load_on_time(monkeypatch, short_rungs):
    """With a bound that no machine misses."""
    monkeypatch.setattr("pytest_gpulab.load.headroom._MOST_LAG_S", 10.0)
    assert measure_headroom().chunks_per_s == 40 * 128


@pytest.mark.slow
def test_a_machine_that_is_too_busy_to_be_measured_has_no_headroom_of_zero(monkeypatch, short_rungs):
    """With a bound that no machine keeps: no run may be refused because of it."""
    monkeypatch.setattr("pytest_gpulab.load.headroom._MOST_LAG_S", -10.0)
    with pytest.raises(NoHeadroom, match=r"1,280 tokens/s in time .* failed 3 times: .* end it, then repeat"):
        measure_headroom()


MEASURING = """
import contextlib, sys
from pytest_gpulab.load import headroom

@contextlib.contextmanager
def shown(interval_s, null_server=headroom.null_server):
    with null_server(interval_s) as url:
        print(url, flush=True)
        yield url

headroom.null_server = shown
headroom._RUNG_S = 60.0
try:
    headroom.measure_headroom()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.fixture
def measuring():
    """A process group that measures its headroom, as a terminal has it, and where its null server listens."""
    command = [sys.executable, "-c", MEASURING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as process:
        yield process, process.stdout.readline().strip()
        process.kill()


def test_ctrl_c_ends_the_measuring(measuring):
    """Once load has come, so that it is Ctrl-C in the middle of a rung; the null server is no part of it."""
    process, url = measuring
    wait_for(lambda: urlopen(url).read() != b"[]")
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30)[0] == "interrupted\n"


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_the_null_server_does_not_outlive_its_holder(measuring, number):
    process, url = measuring
    urlopen(url).close()
    process.send_signal(number)
    process.wait()
    wait_for(lambda: is_refused(url))


def is_refused(url):
    try:
        urlopen(url, timeout=5).close()
    except OSError:
        return True
    return False


def test_peaks_are_those_of_the_schedule():
    steady = Workload(arrivals=Constant(rate=40.0), shape=SHAPE, duration_s=20.0)
    assert peak_rate(steady, 0) == pytest.approx(40.0)
    assert peak_chunk_rate(steady, 0) == pytest.approx(2000.0)
    spike = Workload(arrivals=SpikeToZero(rate=40.0, spike_s=10.0), shape=SHAPE, duration_s=100.0)
    assert 35.0 < peak_rate(spike, 0) < 60.0
    trace = Workload.from_trace([(0.0, 9, 10), (1.0, 9, 30), (60.0, 9, 35)])
    assert peak_chunk_rate(trace, 0) == pytest.approx(8.0)  # 40 tokens in 5 s
    assert peak_rate(Workload(arrivals=ClosedLoop(concurrency=9), shape=SHAPE, requests=99), 0) == 0.0


@pytest.mark.parametrize(
    ("workload", "processes"),
    [
        (Workload(arrivals=Poisson(rate=100.0), shape=SHAPE, duration_s=20.0), 1),
        (Workload(arrivals=Constant(rate=101.0), shape=SHAPE, duration_s=20.0), 2),
        (Workload(arrivals=Constant(rate=450.0), shape=SHAPE, duration_s=20.0), 5),
        (Workload(arrivals=Constant(rate=450.0), shape=SHAPE, duration_s=20.0, admission=BoundedQueue(
            capacity=9, max_wait_s=1.0)), 1),
        (Workload(arrivals=ClosedLoop(concurrency=900), shape=SHAPE, requests=9000), 1),
    ],
)  # fmt: skip
def test_as_many_processes_as_the_rate_needs(workload, processes):
    assert processes_for(workload, 0) == processes


def test_headroom_grows_with_processes():
    workload = Workload(arrivals=Poisson(rate=100.0), shape=SHAPE, duration_s=60.0)
    headroom = Headroom(chunks_per_s=4000.0)
    headroom.require(workload, 0, 2)
    with pytest.raises(BeyondHeadroom, match="use more processes, a faster machine or a lower rate"):
        headroom.require(workload, 0, 1)


def test_the_progress_line():
    progress = Progress(elapsed_s=35.0, length_s=120.0, finished=210, offered=720, in_flight=14, p95_s=2.3061)
    assert str(progress) == "0:35 of 2:00, 210 of 720 finished (6.0/s), 14 in flight, p95 2.31 s, 1:25 left"
    early = Progress(elapsed_s=5.0, length_s=4.0, finished=0, offered=9, in_flight=9, p95_s=None)
    assert str(early).endswith("9 in flight, no answer yet, waiting for the last answers")
    users = Progress(elapsed_s=35.0, length_s=0.0, finished=7, offered=20, in_flight=4, p95_s=2.0)
    assert str(users) == "0:35, 7 of 20 finished (0.2/s), 4 in flight, p95 2.00 s"
    both = of_all([progress, early])
    assert (both.finished, both.offered, both.in_flight, both.p95_s) == (210, 729, 23, 2.3061)
    assert of_all([early, early]).p95_s is None

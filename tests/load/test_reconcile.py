"""Whether samples of the server cover a run, and how long they say that it was busy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pytest_gpulab.figures import gpu_utilization
from pytest_gpulab.load.reconcile import sample_problems
from pytest_gpulab.run import SERVER_DTYPE, Run
from pytest_gpulab.run_store import RunStore
from tests.known import known_run
from tests.load.golden import golden_server
from tests.load.loads import load, requests

RECORDS = Path(__file__).parents[2] / "reports" / "records"


def sampled(times: list[float], running: list[int] | int = 1) -> Run:
    """A run of 20 s with samples at these times."""
    server = np.zeros(len(times), dtype=SERVER_DTYPE)
    server["time"], server["num_requests_running"] = times, running
    return replace(known_run(1.0, requests=20), server=server)


@pytest.mark.parametrize(
    "times",
    [
        list(range(20)),
        [0, *range(2, 20)],
        [*range(1, 20, 2)],
        [1.5, 3.5, 5.4, 7.5, 9.6, 11.5, 13.5, 15.5, 17.6, 19.4],
    ],
    ids=["each second", "one lost", "every other second", "pages that take a second and a half"],
)
def test_samples_that_cover_the_run(times: list[float]) -> None:
    run = sampled(times)
    assert not list(sample_problems(run.server, run.duration_s))
    assert gpu_utilization(run) == pytest.approx(times[-1] / 20)


@pytest.mark.parametrize(
    ("times", "lost_s"),
    [
        ([4.5, 9.5, 14.5, 19.5], 20),
        ([0.0, 1.0, *range(7, 20)], 6),
        ([*range(4, 20)], 4),
        ([*range(15)], 6),
        ([], 20),
    ],
    ids=["pages that take 4.5 s", "a page that never came", "none at first", "none at last", "none"],
)
def test_seconds_without_a_sample_are_missed(times: list[float], lost_s: int) -> None:
    (problem,) = sample_problems(sampled(times).server, 20.0)
    assert problem.startswith(f"no sample of the metrics came in {lost_s} of 20 s, more than 10%")


def test_a_sample_stands_for_the_time_since_the_one_before() -> None:
    """However far apart: four pages in 20 s may not read as four busy seconds."""
    assert gpu_utilization(sampled([5.0, 10.0, 15.0, 20.0], [1, 0, 3, 1])) == pytest.approx(0.75)


@pytest.mark.slow
def test_a_page_that_does_not_come_is_noticed() -> None:
    """It hangs after what was read before the run and one sample; the seconds of the wait are lost."""
    with golden_server(pages=2) as url:
        run = load(url, requests(60, rate=10.0))
    assert len(run.server) == 1
    assert any(problem.startswith("no sample of the metrics came in 6 of 6 s") for problem in run.problems)


@pytest.mark.parametrize("runs", ["vllm-h100-runs", "vllm-h200-runs"])
def test_the_measured_runs_are_covered(runs: str) -> None:
    stored = [run for _, run in RunStore(RECORDS / runs)]
    assert stored
    for run in stored:
        end_s = np.nanmax(run.requests["last_token"])
        assert not list(sample_problems(run.server, float(end_s)))
        busy = (run.server["num_requests_running"] > 0).sum() / run.duration_s
        assert gpu_utilization(run) == pytest.approx(busy, rel=0.02)  # samples come a little more than 1 s apart

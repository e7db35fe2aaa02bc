"""What a report says of an arm: what it asked of what, without what nobody stated."""

from __future__ import annotations

import pytest

from pytest_gpulab import Autoscaling, BoundedQueue, Direct, Faults, Fleet, Poisson, Profile, Shape, Workload
from pytest_gpulab.measurement import summarize
from pytest_gpulab.report.arm import in_words
from tests.known import known_lab, known_run

SHORT = Workload(arrivals=Poisson(rate=20), shape=Shape(prompt_tokens=512, output_tokens=128), requests=20)
H200 = Profile(model="llama-3.1-8b", accelerator="h200")


def words(workload: Workload, profile: Profile) -> str:
    lab = known_lab(lambda profile, seed: known_run(1.0, seed=seed))
    return in_words(summarize(lab.measure(workload, profile)))


@pytest.mark.parametrize(
    ("workload", "profile", "expected"),
    [
        (
            SHORT,
            H200.with_engine_args(max_num_seqs=16),
            "Poisson(rate=20), Shape(prompt_tokens=512, output_tokens=128), requests=20; "
            "llama-3.1-8b on h200, max_num_seqs=16",
        ),
        (
            SHORT.model_copy(update={"admission": BoundedQueue(capacity=9, max_wait_s=60.0)}),
            H200.model_copy(update={"price_usd_per_hour": 2.5}),
            "Poisson(rate=20), Shape(prompt_tokens=512, output_tokens=128), requests=20, BoundedQueue(capacity=9, "
            "max_wait_s=60, max_outstanding=64); llama-3.1-8b on h200, price_usd_per_hour=2.5",
        ),
        (
            Workload.from_trace([(0.1 * n, 100, 10) for n in range(1000)]),
            H200,
            "Trace(rows=(1000 of them)); llama-3.1-8b on h200",
        ),
    ],
    ids=["engine-arguments", "policy-and-price", "trace"],
)
def test_only_what_was_stated(workload: Workload, profile: Profile, expected: str) -> None:
    assert words(workload, profile) == expected


def test_a_fleet() -> None:
    fleet = Fleet(autoscaling=Autoscaling(target=2), warm=1, faults=Faults(pod_deletions=(5.0,)))
    said = words(SHORT.model_copy(update={"admission": Direct(max_outstanding=8)}), H200.on(fleet))
    assert "Direct(max_outstanding=8)" in said
    assert said.endswith("Fleet(autoscaling=(target=2), warm=1, faults=(pod_deletions=(5)))")

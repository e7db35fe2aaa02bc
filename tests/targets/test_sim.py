"""The target `sim`: what it refuses, which blocks a decision, and what stays an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pytest_gpulab.engine import simulation
from pytest_gpulab.experiment import Constant, Profile, Shape, Workload
from pytest_gpulab.fleet import Fleet
from pytest_gpulab.gates import TargetRefused
from pytest_gpulab.targets.base import Serving, Target
from pytest_gpulab.targets.cluster import ClusterTarget
from pytest_gpulab.targets.sim import Sim

T4 = Profile(model="qwen2.5-0.5b", accelerator="t4", engine_args={"max_model_len": 4096})
TRAFFIC = Workload(arrivals=Constant(rate=1), shape=Shape(prompt_tokens=64, output_tokens=4), duration_s=5)

IMPOSSIBLE = [
    ({"gpu_memory_utilization": 0.05}, "the KV cache of qwen2.5-0.5b on t4 must have at least 2 blocks"),
    ({"num_gpu_blocks_override": 2}, "num_blocks must be at least 256"),
    ({"max_num_seqs": 4096, "max_num_batched_tokens": 2048}, "max_num_batched_tokens must be at least max_num_seqs"),
    ({"enable_chunked_prefill": False}, "raise max_num_batched_tokens to max_model_len to keep prompts whole"),
]


@pytest.fixture(params=["sim", "cluster"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    """Both model the engine; of the cluster nothing is started."""

    def started(*_: object) -> Any:
        pytest.fail("nothing may be started for what is refused")

    return Sim() if request.param == "sim" else ClusterTarget(Serving(started, started), tmp_path, print)


@pytest.mark.parametrize("fleet", [None, Fleet(warm=1)], ids=["one server", "fleet"])
@pytest.mark.parametrize(("args", "words"), IMPOSSIBLE, ids=lambda value: next(iter(value)) if value else "")
def test_what_no_engine_starts_with_is_refused(
    target: Target, fleet: Fleet | None, args: dict[str, Any], words: str
) -> None:
    profile = T4.with_engine_args(**args)
    with pytest.raises(TargetRefused, match=words):
        target.run(TRAFFIC, profile.on(fleet) if fleet else profile, 0)


def test_a_mistake_of_the_simulator_stays_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(plan: object) -> None:
        raise ValueError("a mistake")

    monkeypatch.setattr(simulation, "run_plan", mistaken)
    with pytest.raises(ValueError, match="a mistake"):
        Sim().run(TRAFFIC, T4, 0)

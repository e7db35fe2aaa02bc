"""What the load tests share: short loads against a golden server."""

from __future__ import annotations

from collections import Counter

from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.experiment import Constant, Profile, Shape, Workload
from pytest_gpulab.load import run_load
from pytest_gpulab.run import Run

PROFILE = Profile(model="qwen2.5-0.5b", accelerator="t4")
SHAPE = Shape(prompt_tokens=20, output_tokens=6)


def requests(count: int, rate: float = 200.0, **fields: object) -> Workload:
    return Workload(arrivals=Constant(rate=rate), shape=SHAPE, requests=count, **fields)  # type: ignore[arg-type]


def load(url: str, workload: Workload, *, metrics: bool = True, **options: object) -> Run:
    endpoint = Endpoint(url, "golden", metrics_urls=(f"{url}/metrics",) if metrics else ())
    settings = {"seed": 0, "target": "test", "basis": "emulated", "server": "golden", "processes": 1, **options}
    return run_load(workload, endpoint=endpoint, profile=PROFILE, **settings)  # type: ignore[arg-type]


def failures(run: Run) -> Counter[str]:
    """Undelivered requests by kind."""
    prefix = "client_failed_"
    return Counter({name.removeprefix(prefix): int(n) for name, n in run.totals.items() if name.startswith(prefix)})


def nothing_lost(run: Run, offered: int) -> bool:
    """Every offered request is delivered, or failed in one way."""
    return len(run.requests) == offered == run.requests["ok"].sum() + failures(run).total()


def without_lag(problems: tuple[str, ...]) -> list[str]:
    """Problems but those of a client on a busy machine."""
    return [problem for problem in problems if not problem.startswith("the client ")]

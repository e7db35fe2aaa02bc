"""A target of known truth: runs whose latencies are given, so that every figure can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pytest_gpulab.experiment import Poisson, Profile, Shape, Workload
from pytest_gpulab.lab import Lab
from pytest_gpulab.run import REQUEST_DTYPE, SERVER_DTYPE, Basis, Provenance, Run

WORKLOAD = Workload(arrivals=Poisson(rate=1.0), shape=Shape(prompt_tokens=10, output_tokens=11), requests=200)
PROFILE = Profile(model="qwen2.5-0.5b", accelerator="t4")


def known_run(
    latency_s: float | Sequence[float],
    *,
    seed: int = 0,
    requests: int = 200,
    delivered: int | None = None,
    basis: Basis = "measured",
    relative_error: float = 0.0,
    server: str = "known",
    problems: tuple[str, ...] = (),
    output_tokens: int | Sequence[int] = 11,
) -> Run:
    """Request i comes at i seconds; its answer starts after half of its latency and ends after all of it."""
    table = np.zeros(requests, dtype=REQUEST_DTYPE)
    table["scheduled"] = table["sent"] = np.arange(requests)
    table["first_token"] = table["scheduled"] + np.asarray(latency_s) / 2
    table["last_token"] = table["scheduled"] + np.asarray(latency_s)
    table["prompt_tokens"], table["output_tokens"] = 10, output_tokens
    table["ok"] = np.arange(requests) < (requests if delivered is None else delivered)
    return Run(
        requests=table,
        server=np.zeros(0, dtype=SERVER_DTYPE),
        totals={"request_queue_time_seconds_sum": 0.0, "request_queue_time_seconds_count": float(requests)},
        duration_s=float(max(1, requests)),
        provenance=Provenance("known", basis, seed, "0", server, relative_error),
        problems=problems,
    )


class Known:
    """A target that asks a function of the profile and the seed for the Run."""

    name = "known"
    repeatable = False

    def __init__(self, run: Callable[[Profile, int], Run], basis: Basis = "measured", max_repeats: int = 24) -> None:
        self._run, self.basis, self.max_repeats = run, basis, max_repeats
        self.seeds: list[int] = []

    def run(self, workload: Workload, profile: Profile, seed: int) -> Run:
        self.seeds.append(seed)
        return self._run(profile, seed)


def known_lab(run: Callable[[Profile, int], Run], **fields: object) -> Lab:
    """A Lab on a `Known` target."""
    return Lab(Known(run, **fields))  # type: ignore[arg-type]


def arm(seqs: int) -> Profile:
    """A profile told apart from others by ``max_num_seqs``, which known runs may read as a latency."""
    return PROFILE.with_engine_args(max_num_seqs=seqs)

"""Every timing claim of the project, measured: ``make bench`` prints what was seen beside its target.

A section is a function that yields rows; `section` puts it into the table. A name on the command line runs only
the sections whose name contains it. Times are the best of a few rounds: other work on the machine only adds.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pytest_gpulab.arrivals import schedule
from pytest_gpulab.cluster.fleet import simulate_fleet
from pytest_gpulab.engine import jumping as fast_driver
from pytest_gpulab.engine import simulate
from pytest_gpulab.engine.calibration import find_variant
from pytest_gpulab.engine.simulation import make_plan
from pytest_gpulab.engine.stepping import run_stepping
from pytest_gpulab.experiment import BoundedQueue, ClosedLoop, Poisson, Profile, Shape, Workload
from pytest_gpulab.fleet import FROM_ZERO, WARM_ONE


@dataclass(frozen=True)
class Row:
    """One measured value; `target` is the least (or with `most` the most) that is claimed, None claims nothing."""

    name: str
    value: float
    unit: str
    target: float | None = None
    most: bool = False

    @property
    def met(self) -> bool:
        return self.target is None or (self.value <= self.target if self.most else self.value >= self.target)


Section = Callable[[], Iterator[Row]]
SECTIONS: list[Section] = []


def section(rows: Section) -> Section:
    """Add a section to the table."""
    SECTIONS.append(rows)
    return rows


def best_seconds(work: Callable[[], object], rounds: int = 5) -> float:
    """The shortest of some rounds."""

    def once() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return min(once() for _ in range(rounds))


# --- the machine --------------------------------------------------------------------------------------


@section
def machine() -> Iterator[Row]:
    """How fast the interpreter is here and now, to read the other rows against."""

    def count() -> int:
        total = 0
        for i in range(1_000_000):
            total += i
        return total

    yield Row("interpreter: additions in a loop", 1e6 / best_seconds(count), "1/s")


# --- the engine ---------------------------------------------------------------------------------------

SMALL = Shape(prompt_tokens=512, output_tokens=128)
T4 = Profile(model="qwen2.5-0.5b", accelerator="t4")
H200 = Profile(model="qwen2.5-0.5b", accelerator="h200")


def requests_per_second(profile: Profile, workload: Workload, rounds: int = 5) -> float:
    offered = len(schedule(workload, 0))
    return offered / best_seconds(lambda: simulate(profile, workload), rounds)


@section
def engine_speed() -> Iterator[Row]:
    compiled = not fast_driver.__file__.endswith(".py")
    yield Row("engine: compiled core (1: yes)", compiled, "")
    for name, profile in (("T4", T4), ("H200", H200)):
        light = Workload(arrivals=Poisson(rate=6.0), shape=SMALL, requests=60_000)
        speed = requests_per_second(profile, light, 3)
        yield Row(f"engine: {name}, 60,000 of 512/128 at 6 req/s", speed, "requests/s", 250_000)
    saturated = Workload(arrivals=Poisson(rate=30.0), shape=SMALL, requests=6000)
    speed = requests_per_second(T4, saturated)
    yield Row("engine: T4, 6,000 of 512/128 at 30 req/s", speed, "requests/s", 40_000)


@section
def engine_at_the_knee() -> Iterator[Row]:
    knee = Workload(arrivals=Poisson(rate=8.0), shape=SMALL, duration_s=300.0)
    for seqs in (1, 8, 256):
        for tokens in (2048, 16384):
            profile = T4.with_engine_args(max_num_seqs=seqs, max_num_batched_tokens=tokens)
            name = f"engine: T4, 300 s at 8 req/s, seqs {seqs}, tokens {tokens}"
            yield Row(name, requests_per_second(profile, knee), "requests/s")
    queued = knee.model_copy(update={"admission": BoundedQueue(capacity=240, max_wait_s=60.0)})
    yield Row("engine: T4, 300 s at 8 req/s, bounded queue", requests_per_second(T4, queued), "requests/s")
    loop = Workload(arrivals=ClosedLoop(concurrency=16), shape=SMALL, requests=2400)
    yield Row("engine: T4, 2,400 in a closed loop of 16", requests_per_second(T4, loop), "requests/s")
    given_up = knee.model_copy(update={"timeout_s": 1.0})
    yield Row("engine: T4, 300 s at 8 req/s, timeouts (steps)", requests_per_second(T4, given_up, 2), "requests/s")


@section
def engine_jumps() -> Iterator[Row]:
    workload = Workload(arrivals=Poisson(rate=6.0), shape=SMALL, requests=2000)
    plan = make_plan(T4, workload, *find_variant(T4), 0)
    stepping = best_seconds(lambda: run_stepping(plan), 2)
    jumping = best_seconds(lambda: fast_driver.run_jumping(plan))
    yield Row("engine: jumping over stepping, same run", stepping / jumping, "x", 10)


@section
def engine_memory() -> Iterator[Row]:
    requests = 60_000
    light = Workload(arrivals=Poisson(rate=6.0), shape=SMALL, requests=requests)
    simulate(T4, light)
    tracemalloc.start()
    simulate(T4, light)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    yield Row("engine: T4 at 6 req/s, peak memory", peak / requests, "bytes/request", 500, most=True)


# --- the load generator -------------------------------------------------------------------------------

sys.path.append(str(Path(__file__).parents[1]))  # last: `tests` from here, the package as it is installed


@section
def client_accuracy() -> Iterator[Row]:
    """Against a server that writes down when it sent what; both need a core of their own."""
    from tests.load.accuracy import measure_accuracy

    seen = min((measure_accuracy(rate=100.0) for _ in range(3)), key=lambda accuracy: accuracy.ttft_error_p99_ms)
    name = "client: 100 req/s of 128 tokens"
    yield Row(f"{name}, TTFT error p50", 1e3 * seen.ttft_error_p50_ms, "us", 1000, most=True)
    yield Row(f"{name}, TTFT error p99", 1e3 * seen.ttft_error_p99_ms, "us", 5000, most=True)
    yield Row(f"{name}, send lag p99", 1e3 * seen.send_lag_p99_ms, "us", 5000, most=True)
    yield Row(f"{name}, answers with wrong counts", seen.miscounted, "", 0, most=True)


@section
def client_capacity() -> Iterator[Row]:
    """Chunks read from one null server, beside the clients that `tests/load/other_clients.py` finds."""
    from tests.load.other_clients import chunk_rates

    rates = chunk_rates()
    others = [rate for name, rate in rates.items() if name != "ours"]
    yield Row("client: chunks read, ours", rates.pop("ours"), "1/s", max(others, default=None))
    for name, rate in rates.items():
        yield Row(f"client: chunks read, {name}", rate, "1/s")


@section
def fleet_hour() -> Iterator[Row]:
    hour = Workload(arrivals=Poisson(rate=24.0), shape=SMALL, duration_s=3600.0)
    for name, fleet in (("from zero", FROM_ZERO), ("one warm", WARM_ONE)):
        seconds = best_seconds(partial(simulate_fleet, T4.on(fleet), hour), 3)
        yield Row(f"fleet: an autoscaled hour at 24 req/s, {name}", seconds, "s", 1.0, most=True)


# --- the table ----------------------------------------------------------------------------------------


def main(wanted: str = "") -> int:
    """Print the table; 1 when a target is missed."""
    missed = 0
    print(f"{'what':<58} {'value':>14} {'target':>14}  unit")
    for rows in SECTIONS:
        if wanted not in rows.__name__:
            continue
        for row in rows():
            target = "" if row.target is None else f"{'<= ' if row.most else '>= '}{row.target:,.0f}"
            missed += not row.met
            print(f"{row.name:<58} {row.value:>14,.1f} {target:>14}  {row.unit}{'' if row.met else '  MISSED'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))

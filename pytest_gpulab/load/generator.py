"""`run_load`: a workload as real requests to a real server, and what came of them as a Run."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import uvloop

from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.engine.simulation import definition_hash
from pytest_gpulab.experiment import Profile, Workload, require_servable
from pytest_gpulab.load.bodies import new_salt
from pytest_gpulab.load.gpu import GpuSample, gpu_totals, local_gpu_samples
from pytest_gpulab.load.headroom import Headroom
from pytest_gpulab.load.local import Load, OneProcess, Processes, processes_for
from pytest_gpulab.load.metrics import Scraper
from pytest_gpulab.load.progress import Progress, Show, meanwhile, show_on_terminal, tell_every
from pytest_gpulab.load.reconcile import (
    client_problems,
    in_flight_means,
    lag_p99,
    little_problems,
    sample_problems,
    server_problems,
)
from pytest_gpulab.load.servers import Servers
from pytest_gpulab.load.share import Outcome, Share
from pytest_gpulab.run import CLIENT_FAILED, Basis, Provenance, Run, end_of_run, offered_problems
from pytest_gpulab.run_store import Question, RunStore

LONGEST_ANSWER_S = 300.0
"""A request of a workload without `timeout_s` is given up after so long: a server that hangs ends no run."""

_SETTLE_S = 5.0
"""The server's counters may be behind its last answer by so much."""

_INTERRUPTED_SETTLE_S = 1.0

_PROGRESS_S = 5.0


class LoadInterrupted(KeyboardInterrupt):
    """Ctrl-C ended a run. `run` is what there was of it, invalid as evidence; `saved` is its file, if any."""

    def __init__(self, run: Run, saved: Path | None) -> None:
        where = f", saved as {saved}" if saved else ""
        super().__init__(f"the load was interrupted after {run.duration_s:.1f} s{where}")
        self.run = run
        self.saved = saved


def run_load(
    workload: Workload,
    *,
    endpoint: Endpoint,
    profile: Profile,
    seed: int,
    target: str,
    basis: Basis,
    server: str,
    relative_error: float = 0.0,
    progress: Show = show_on_terminal,
    headroom: Headroom | None = None,
    processes: int | None = None,
    elsewhere: Callable[[Sequence[Share]], Load] | None = None,
    longest_answer_s: float = LONGEST_ANSWER_S,
    interrupted_to: Path | None = None,
    servers: Servers | None = None,
) -> Run:
    """One run of `workload` against `endpoint`. Blocks until the last answer; needs a thread without event loop.

    Args:
        profile: what is served there: for provenance and for the longest request it takes.
        server: what serves, for provenance: vLLM's version and the GPU.
        relative_error: how far absolute figures may be off: the calibration's where the server is emulated.
        progress: takes a line every 5 s.
        headroom: what this client can do on this machine; load beyond it is refused.
        processes: how many send; None: as many as the rate needs.
        elsewhere: has that many shares sent from another place; None: from this machine.
        interrupted_to: the folder of a `RunStore` that keeps an interrupted run; keep valid runs elsewhere.
        servers: those behind the endpoint, where they come and go. The load does not wait for any.
        longest_answer_s: after which a request without a `timeout_s` of its own is given up.

    Returns:
        The Run. Besides vLLM's counters its totals have: ``client_failed_<kind>`` (undelivered requests by kind),
        ``client_connection_errors`` (refused or broken), ``client_send_lag_p99_s``, ``client_loop_lag_p99_s``,
        ``client_cpu_share`` (of one core, of the busiest process), ``client_clock_error_s`` (from inside a cluster:
        how far apart the shards may have started), ``server_in_flight_mean``,
        ``client_in_flight_mean``, and where there is a GPU to be seen ``gpu_utilization_mean`` (0 to 1),
        ``gpu_memory_used_bytes_max``, ``gpu_power_watts_mean``.

    Raises:
        ValueError: a request does not fit the profile.
        BeyondHeadroom: the load is beyond `headroom`.
        LoadInterrupted: Ctrl-C; within 2 s, with the partial run.
    """
    require_servable(workload, profile)
    count = processes_for(workload, seed) if processes is None else processes
    if headroom is not None:
        headroom.require(workload, seed, count)
    salt = new_salt()
    shares = [Share(workload, endpoint, seed, salt, longest_answer_s, index, count) for index in range(count)]
    load = elsewhere(shares) if elsewhere else OneProcess(shares[0]) if count == 1 else Processes(shares)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        lasting_s = (workload.duration_s or 0.0) if servers is not None else 0.0
        measuring = _measure(load, endpoint, progress, servers, lasting_s, has_gpu=basis == "measured")
        evidence = runner.run(measuring)
    outcome = evidence.outcome
    ended_s = end_of_run(outcome.requests, outcome.ended_s, workload.duration_s)
    run = Run(
        requests=outcome.requests,
        server=evidence.scraper.table,
        totals=_totals(evidence),
        duration_s=evidence.wall_s if outcome.interrupted else ended_s,
        provenance=Provenance(
            target=target,
            basis=basis,
            seed=seed,
            definition_hash=definition_hash(profile, workload),
            server=server,
            relative_error=relative_error,
        ),
        timeline=tuple(_ended_servers(evidence)),
        problems=tuple(_problems(workload, profile, evidence)),
    )
    if outcome.interrupted:
        store = RunStore(interrupted_to) if interrupted_to is not None else None
        raise LoadInterrupted(run, store.save(Question(workload, profile, seed), run) if store else None)
    return run


@dataclass(frozen=True)
class _Evidence:
    """What was measured. `wall_s`: from the run's start to the end of sending; `comes_and_goes`: servers did."""

    outcome: Outcome
    scraper: Scraper
    gpu: list[GpuSample]
    wall_s: float
    comes_and_goes: bool


async def _measure(
    load: Load, endpoint: Endpoint, show: Show, servers: Servers | None, lasting_s: float, *, has_gpu: bool
) -> _Evidence:
    """What came of the load.

    Args:
        lasting_s: until when servers that come and go are watched, even if all answers are there.
        has_gpu: a GPU of this machine may be what serves; it has no part in an emulated run.
    """
    looking = local_gpu_samples(endpoint.url if has_gpu else "")
    async with aiohttp.ClientSession() as session, load, looking as gpu:
        scraper = Scraper(endpoint, session, servers)
        await scraper.read_all(counts=False)
        start = time.perf_counter() + load.lead_s
        if servers is not None:
            servers.begin(time.time() + start - time.perf_counter())

        def look() -> Progress:
            return load.progress(time.perf_counter() - start)

        telling = tell_every(_PROGRESS_S, look, lambda progress: show(str(progress)))
        async with meanwhile(scraper.sample(start)), meanwhile(telling):
            outcome = await load.run(start)
            if not outcome.interrupted:
                outcome = await _await_end(outcome, start + lasting_s)
        wall_s = time.perf_counter() - start
        try:
            await _settle(scraper, outcome)
        except asyncio.CancelledError:
            outcome = replace(outcome, interrupted=True)
    return _Evidence(outcome, scraper, gpu + scraper.gpu_samples, wall_s, servers is not None)


async def _await_end(outcome: Outcome, end: float) -> Outcome:
    """The outcome once it is `end` (``time.perf_counter``); interrupted if it was cancelled before."""
    try:
        await asyncio.sleep(max(0.0, end - time.perf_counter()))
    except asyncio.CancelledError:
        return replace(outcome, interrupted=True)
    return outcome


async def _settle(scraper: Scraper, outcome: Outcome) -> None:
    """Read the metrics until they hold all answers that the client has, but not for long."""
    limit_s = _INTERRUPTED_SETTLE_S if outcome.interrupted else _SETTLE_S
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while await scraper.read_all() and not outcome.interrupted:
                behind = scraper.totals.get("request_success_total", math.inf) < outcome.counts["whole"]
                if (not behind or scraper.cut_off) and (outcome.failures or not scraper.in_flight):
                    return
                await asyncio.sleep(0.1)


def _totals(evidence: _Evidence) -> dict[str, float]:
    outcome = evidence.outcome
    failures = outcome.failures
    held, expected, _ = in_flight_means(evidence.scraper.table, outcome)
    means = {"server_in_flight_mean": held, "client_in_flight_mean": expected}
    if evidence.comes_and_goes:
        means["gpu_busy_seconds"] = evidence.scraper.busy_s
    return {
        **evidence.scraper.totals,
        **{f"{CLIENT_FAILED}{kind}": float(count) for kind, count in sorted(failures.items())},
        "client_connection_errors": float(failures["connect"] + failures["reset"]),
        "client_send_lag_p99_s": lag_p99(outcome.send_lag_s),
        "client_loop_lag_p99_s": lag_p99(outcome.loop_lag_s),
        "client_cpu_share": outcome.cpu_s / max(evidence.wall_s, 1e-9),
        **({"client_clock_error_s": outcome.clock_error_s} if outcome.clock_error_s else {}),
        **{name: mean for name, mean in means.items() if not math.isnan(mean)},
        **gpu_totals(evidence.gpu),
    }


def _ended_servers(evidence: _Evidence) -> Iterator[tuple[float, str]]:
    """What cannot be reconciled, and is no fault of the evidence: servers that ended took their last counts along."""
    if ended := evidence.scraper.cut_off:
        what = "1 server" if ended == 1 else f"{ended} servers"
        yield evidence.wall_s, f"{what} ended during the run: counts after the last page of each are not reconciled"


def _problems(workload: Workload, profile: Profile, evidence: _Evidence) -> Iterator[str]:
    outcome, scraper = evidence.outcome, evidence.scraper
    yield from offered_problems(outcome.requests)
    yield from client_problems(outcome)
    if not scraper.urls:
        return
    if scraper.silent:
        yield f"no metrics came from {', '.join(scraper.silent)}: the server's side is not known"
        return
    if scraper.restarts:
        yield f"a server restarted during the run ({scraper.restarts} times): its counters began again"
    yield from sample_problems(scraper.table, evidence.wall_s)
    if not (outcome.interrupted or scraper.restarts):
        yield from server_problems(workload, profile, outcome, scraper.totals, complete=not scraper.cut_off)
        yield from little_problems(scraper.table, outcome)

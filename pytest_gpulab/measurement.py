"""Measurements: the arms of an experiment, whose figures are Estimates over repeats."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from pytest_gpulab import figures
from pytest_gpulab.definition import Definition, digest
from pytest_gpulab.errors import unknown_name
from pytest_gpulab.evidence import EXACT, Estimate, Off
from pytest_gpulab.experiment import Direct, Profile, Workload
from pytest_gpulab.gates import Ledger
from pytest_gpulab.record import RunSummary
from pytest_gpulab.run import Run
from pytest_gpulab.timeline import STAGES, Stage

if TYPE_CHECKING:
    from pytest_gpulab.lab import Lab


class Measurement:
    """One arm of an experiment: a workload on a profile, repeated as often as the gates need.

    Its figures are `Estimate`s: seconds for latencies, requests/s and tokens/s for rates, fractions for ratios.
    """

    def __init__(self, lab: Lab, workload: Workload, profile: Profile, label: str | None) -> None:
        self.lab = lab
        self.workload = workload
        self.profile = profile
        self.label = label or describe(workload, profile)
        both = f"{workload.definition_hash}-{profile.definition_hash}"
        self.id = digest(both)[:12]
        self.pulled = 0

    def __repr__(self) -> str:
        return f"<Measurement {self.label}>"

    def run(self, repeat: int) -> Run:
        """The Run of repeat `repeat`, counted from 0; executes it when it has not run yet."""
        run = self.lab.run(self, repeat)
        self.pulled = max(self.pulled, repeat + 1)
        return run

    @property
    def runs(self) -> list[Run]:
        """The Runs that gates have pulled so far."""
        return [self.run(repeat) for repeat in range(self.pulled)]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the repeats pulled so far."""
        return tuple(range(self.lab.first_seed, self.lab.first_seed + self.pulled))

    @property
    def max_repeats(self) -> int:
        """The most repeats a gate may pull."""
        return self.lab.max_repeats

    @property
    def e2e(self) -> Latency:
        """Seconds from the scheduled time to the last token."""
        return Latency(self, "e2e")

    @property
    def ttft(self) -> Latency:
        """Seconds from the scheduled time to the first token."""
        return Latency(self, "ttft")

    @property
    def tpot(self) -> Latency:
        """Seconds per output token after the first."""
        return Latency(self, "tpot")

    @property
    def service(self) -> Latency:
        """Seconds from sending to the last token: without what the client itself made wait."""
        return Latency(self, "service")

    @property
    def p50(self) -> Estimate:
        """Median E2E latency, s."""
        return self.e2e.p50

    @property
    def p95(self) -> Estimate:
        """95th percentile of the E2E latency, s."""
        return self.e2e.p95

    @property
    def p99(self) -> Estimate:
        """99th percentile of the E2E latency, s."""
        return self.e2e.p99

    @property
    def delivery_ratio(self) -> Estimate:
        """Requests answered in full / requests offered."""
        timeout_s = self.workload.timeout_s
        if timeout_s is None:
            return self.figure("delivery ratio", "ratio", figures.delivery_ratio, by_time=0)

        def delivered(run: Run, off: float) -> float:
            # Only what was simulated is held against the timeout again: a client that measured has kept it itself.
            return figures.delivery_ratio(run, timeout_s=timeout_s / (1 + off) if off else math.inf)

        return self._timed("delivery ratio", "ratio", delivered)

    @property
    def request_rate(self) -> Estimate:
        """Delivered requests/s."""
        return self.figure("request rate", "requests/s", figures.request_rate, by_time=-1)

    @property
    def output_tokens_per_s(self) -> Estimate:
        """Delivered output tokens/s."""
        return self.figure("output rate", "tokens/s", figures.output_tokens_per_s, by_time=-1)

    @property
    def queue_delay(self) -> Estimate:
        """Mean seconds a request waited in the server before it was first scheduled."""
        return self.figure("mean queue delay", "s", figures.mean_queue_delay)

    @property
    def peak_running(self) -> Estimate:
        """Most requests running at once in the server's samples."""
        return self._gauge("num_requests_running", "peak running", "requests")

    @property
    def peak_waiting(self) -> Estimate:
        """Most requests waiting at once in the server's samples."""
        return self._gauge("num_requests_waiting", "peak waiting", "requests")

    @property
    def peak_kv_cache_usage(self) -> Estimate:
        """Highest used fraction of the KV cache."""
        return self._gauge("kv_cache_usage", "peak KV cache usage", "ratio")

    @property
    def preemptions(self) -> Estimate:
        """How often the server preempted a request."""
        return self.figure(
            "preemptions", "requests", lambda run: run.totals.get("num_preemptions_total", math.nan), by_time=0
        )

    def goodput(
        self, *, e2e_s: float | None = None, ttft_s: float | None = None, tpot_s: float | None = None
    ) -> Estimate:
        """Requests/s that met every given limit (seconds)."""
        slo = _slo(e2e_s, ttft_s, tpot_s)
        return self._timed(
            f"goodput ({_slo_text(slo)})",
            "requests/s",
            lambda run, off: figures.per_second(run, figures.useful_requests(run, _tightened(slo, off))) * (1 - off),
        )

    def cost_per_useful_request(
        self, *, e2e_s: float | None = None, ttft_s: float | None = None, tpot_s: float | None = None
    ) -> Estimate:
        """USD of billed accelerator time per request that met every given limit (seconds).

        A fleet's time counts from the run's start to zero nodes: provisioning, idle replicas and drain included.
        """
        price = self.profile.price
        slo = _slo(e2e_s, ttft_s, tpot_s)
        return self._timed(
            f"cost per useful request ({_slo_text(slo)})",
            "USD",
            lambda run, off: figures.cost_per_useful_request(run, price, _tightened(slo, off)) * (1 + off),
        )

    @property
    def cost(self) -> Estimate:
        """USD of billed accelerator time."""
        price = self.profile.price
        return self.figure("cost", "USD", lambda run: figures.cost_usd(run, price))

    @property
    def gpu_seconds(self) -> Estimate:
        """Billed accelerator time: a fleet's provisioning, idle replicas and drain included."""
        return self.figure("GPU time", "s", figures.gpu_seconds)

    @property
    def gpu_utilization(self) -> Estimate:
        """Share of the billed accelerator time in which a request ran."""
        return self.figure("GPU utilization", "ratio", figures.gpu_utilization, by_time=0)

    @property
    def peak_replicas(self) -> Estimate:
        """The most replicas that were Ready together."""
        self._require_fleet("peak_replicas")
        return self.figure("peak replicas", "replicas", figures.peak_replicas, by_time=0)

    @property
    def downtime(self) -> Estimate:
        """Seconds of the run in which no replica was Ready."""
        self._require_fleet("downtime")
        return self.figure("time without a replica", "s", figures.seconds_without_replica, by_time=0)

    def replicas_ready(self, replicas: int) -> Estimate:
        """Seconds after the run's start at which so many replicas were first Ready together; inf: never."""
        self._require_fleet("replicas_ready")
        if replicas < 1:
            raise ValueError(f"replicas_ready must be asked for 1 replica or more, got {replicas}")
        label = "first replica ready" if replicas == 1 else f"{replicas} replicas ready"
        return self.figure(label, "s", lambda run: figures.replicas_ready(run, replicas), by_time=0)

    def reached(self, stage: Stage) -> Estimate:
        """Seconds after the run's start at which its first cold start had reached `stage`; inf: never."""
        self._require_fleet("reached")
        if stage not in STAGES:
            raise ValueError(unknown_name("stage of a cold start", stage, STAGES))
        return self.figure(f"{stage} reached", "s", lambda run: figures.reached(run, stage), by_time=0)

    def _require_fleet(self, figure: str) -> None:
        if self.profile.fleet is None:
            raise ValueError(
                f"{figure} is a figure of a fleet, but the profile has none: its one server is there all the time; "
                "write profile.on(Fleet(...))"
            )

    def _gauge(self, gauge: str, label: str, unit: str) -> Estimate:
        return self.figure(label, unit, lambda run: figures.highest(run, gauge), by_time=0)

    def figure(
        self, label: str, unit: str, of_run: Callable[[Run], float], *, by_time: Literal[1, 0, -1] = 1
    ) -> Estimate:
        """`of_run` as an Estimate in `unit`.

        `by_time` says how it goes with the server's times: 1 grows with them (latencies, costs), -1 shrinks (rates),
        0 is a count that does not depend on how far a calibration is off.
        """
        estimate = self._timed(label, unit, lambda run, off: of_run(run) * (1 + by_time * off))
        return estimate if by_time else replace(estimate, errors=lambda: EXACT)

    def _timed(self, label: str, unit: str, of_run: Callable[[Run, float], float]) -> Estimate:
        """`of_run` as an Estimate: it is told by which share the run's times are too short (0.05: 5 % slower)."""
        return Estimate(
            label=f"{label} of {self.label}",
            unit=unit,
            sources=(self,),
            value_of=lambda repeat, off: of_run(self.run(repeat), self._off(off)),
            errors=lambda: self.errors,
        )

    def _off(self, off: Off) -> float:
        return off.get(self.run(0).provenance.calibration, 0.0)

    @property
    def errors(self) -> Off:
        """The calibration behind its times, and how far that may be off; none where they were measured."""
        origin = self.run(0).provenance
        known = 0 < origin.relative_error < math.inf  # unknown, the run is no evidence anyway
        return {origin.calibration: origin.relative_error} if known else EXACT

    def __getattr__(self, name: str) -> NoReturn:
        if name[:1] == "p" and name[1:].isdigit():
            raise AttributeError(f"unknown figure {name!r}: write e2e.percentile({name[1:]})")
        own = {name for name, kind in vars(type(self)).items() if isinstance(kind, property)}
        raise AttributeError(unknown_name("figure", name, own - {"errors", "max_repeats", "runs", "seeds"}))


@dataclass(frozen=True)
class Latency:
    """Percentiles of one interval of a measurement, as Estimates in seconds."""

    measurement: Measurement
    interval: figures.Interval

    def __lt__(self, other: object) -> NoReturn:
        raise TypeError(
            f"{self.interval} has many percentiles: compare one of them, e.g. `{self.interval}.p95 <= 2.0`"
        )

    __le__ = __gt__ = __ge__ = __lt__

    @property
    def p50(self) -> Estimate:
        """The median; needs 11 requests a run."""
        return self.percentile(50)

    @property
    def p90(self) -> Estimate:
        """The 90th percentile; needs 64 requests a run."""
        return self.percentile(90)

    @property
    def p95(self) -> Estimate:
        """The 95th percentile; needs 130 requests a run."""
        return self.percentile(95)

    @property
    def p99(self) -> Estimate:
        """The 99th percentile; needs 662 requests a run."""
        return self.percentile(99)

    def percentile(self, percent: float) -> Estimate:
        """The nearest-rank percentile over all offered requests, undelivered ones infinite.

        It needs the more requests a run the closer it is to 0 or 100. ValueError below 1 and from 100 on.
        """
        if not 1 <= percent < 100:
            raise ValueError(
                f"a percentile must be at least 1 and less than 100 (95 or 99.9, not 0.95), got {percent}; for the "
                "share of requests that were answered ask delivery_ratio"
            )
        floor = figures.sample_floor(percent)

        def shortage(repeat: int) -> str:
            offered = len(figures.latencies(self.measurement.run(repeat), self.interval))
            of = " of two tokens or more" if self.interval == "tpot" else ""
            label = self.measurement.label
            return (
                f"this figure needs {floor} requests{of} a run, {label} offered {offered}" if offered < floor else ""
            )

        estimate = self.measurement.figure(
            f"p{percent:g} {self.interval}",
            "s",
            lambda run: figures.percentile(figures.latencies(run, self.interval), percent),
        )
        return replace(estimate, shortage=shortage)


def describe(workload: Workload, profile: Profile) -> str:
    """A short name for an arm: its rate, and what differs from the defaults of vLLM and of a fleet."""
    arrivals = workload.arrivals
    rate = getattr(arrivals, "rate", None)
    parts = [f"{rate:.3g} req/s" if rate is not None else arrivals.kind]
    if arrivals.kind == "closed-loop":
        parts = [f"{arrivals.concurrency} users"]
    args = profile.engine_args.model_dump(exclude_defaults=True, exclude={"max_model_len"})
    parts += [f"{name}={value}" for name, value in args.items()]
    if not isinstance(workload.admission, Direct):
        parts.append(workload.admission.kind)
    if profile.fleet is not None:
        parts += [f"{profile.fleet.warm} warm" if profile.fleet.warm else "from zero"]
        parts += _differences(profile.fleet, but="warm")
    return ", ".join(parts)


def _differences(definition: Definition, but: str = "") -> list[str]:
    """``name=value`` for the fields that are not at their defaults, those of parts under their own names."""
    found = []
    for name, field in type(definition).model_fields.items():
        value = getattr(definition, name)
        if name == but or value == field.default:
            continue
        found += _differences(value) if isinstance(value, Definition) else [f"{name}={value}"]
    return found


def _slo(e2e_s: float | None, ttft_s: float | None, tpot_s: float | None) -> dict[figures.Interval, float]:
    limits: dict[figures.Interval, float | None] = {"e2e": e2e_s, "ttft": ttft_s, "tpot": tpot_s}
    given = {interval: limit for interval, limit in limits.items() if limit is not None}
    if not given:
        raise ValueError("a useful request needs a limit: give e2e_s, ttft_s or tpot_s in seconds, got none")
    return given


def _tightened(slo: dict[figures.Interval, float], off: float) -> dict[figures.Interval, float]:
    """The limits in simulated seconds, where the server takes longer by the share `off` than it was simulated."""
    return {interval: limit_s / (1 + off) for interval, limit_s in slo.items()}


def _slo_text(slo: dict[figures.Interval, float]) -> str:
    return ", ".join(f"{interval} <= {limit:g} s" for interval, limit in slo.items())


def summarize(measurement: Measurement) -> RunSummary:
    """The arm as it goes into the record: what ran, how often, and its figures over the repeats pulled."""
    runs = measurement.runs or [measurement.run(0)]
    provenance = runs[0].provenance
    estimates = [
        measurement.delivery_ratio,
        measurement.request_rate,
        measurement.output_tokens_per_s,
        measurement.ttft.p50,
        measurement.ttft.p95,
        measurement.tpot.p50,
        measurement.e2e.p50,
        measurement.e2e.p95,
        measurement.e2e.p99,
        measurement.queue_delay,
        measurement.peak_running,
        measurement.peak_waiting,
        measurement.peak_kv_cache_usage,
        measurement.preemptions,
    ]
    if measurement.profile.fleet is not None:
        estimates += [
            measurement.replicas_ready(1),
            measurement.replicas_ready(2),
            measurement.peak_replicas,
            measurement.downtime,
            measurement.gpu_seconds,
            measurement.gpu_utilization,
            measurement.cost,
        ]
    suffix = f" of {measurement.label}"
    return RunSummary(
        id=measurement.id,
        label=measurement.label,
        target=provenance.target,
        basis=provenance.basis,
        server=provenance.server,
        workload=measurement.workload.model_dump(mode="json", exclude_none=True),
        profile=_stated(measurement.profile),
        seeds=measurement.seeds,
        figures=tuple(
            figure.model_copy(update={"label": figure.label.removesuffix(suffix)})
            for figure in (estimate.figure() for estimate in estimates)
        ),
        problems=tuple(dict.fromkeys(problem for run in runs for problem in run.problems)),
    )


def _stated(profile: Profile) -> dict[str, Any]:
    """The profile without what it leaves to vLLM. A fleet is told in full: None says something there."""
    stated = profile.model_dump(mode="json", exclude_none=True)
    return stated if profile.fleet is None else {**stated, "fleet": profile.fleet.model_dump(mode="json")}


def evidence_of(ledger: Ledger) -> dict[str, Any]:
    """Gates and measurements of `ledger` in builtin types, fit for a test report that crosses processes."""
    return {
        "gates": [gate.model_dump(mode="json") for gate in ledger.gates],
        "runs": [summarize(measurement).model_dump(mode="json") for measurement in ledger.measurements],
    }

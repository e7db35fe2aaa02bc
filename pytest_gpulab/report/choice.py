"""Which plots an experiment gets: chosen from what its ledger has measured and decided."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pytest_gpulab.gates import Ledger
from pytest_gpulab.timeline import counts
from pytest_gpulab.verdict import weakest

if TYPE_CHECKING:
    from pytest_gpulab.knee import Knee
    from pytest_gpulab.measurement import Measurement

_COST_LABEL = re.compile(r"cost per useful request \(([^)]*)\)")
_LIMIT = re.compile(r"(e2e|ttft|tpot) <= ([0-9.e+-]+) s")


def plots_of(ledger: Ledger) -> tuple[list[Measurement], list[str]]:
    """The arms that curves are drawn for, in the order of their colours, and the plots as SVG.

    A knee search gives rate against p95; of its many rates only the two that bracket the knee get curves. All
    arms share the latency curves and the queue over time; fleets add their timeline and the stages of the first cold
    start, a gate on cost adds cost against latency.
    """
    arms = _arms(ledger)
    plots = [_knee_plot(knee, f"{ledger.nodeid} {index}") for index, knee in enumerate(ledger.knees)]
    if arms:
        plots += _arm_plots(arms, ledger.nodeid)
    useful = _useful(ledger)
    if useful:
        plots += _cost_plot(arms, useful, _p95_slo(ledger) or useful.get("e2e_s"), ledger.nodeid)
    return arms, plots


def _arms(ledger: Ledger) -> list[Measurement]:
    """Measurements that have run, without the rates of a knee search other than its bracket."""
    hidden = {
        point.measurement.id
        for knee in ledger.knees
        for point in knee.points
        if point.rate not in (knee.stable_rate, knee.unstable_rate)
    }
    return [arm for arm in ledger.measurements if arm.pulled and arm.id not in hidden]


def _basis(arms: Iterable[Measurement]) -> str:
    """The basis of the plots of `arms`: the weakest one's."""
    return weakest(arm.run(0).provenance.basis for arm in arms) or ""


def _knee_plot(knee: Knee, key: str) -> str:
    from pytest_gpulab.report.plots import RatePoint, rate_vs_p95

    points = [RatePoint(point.rate, point.measurement.p95.figure(), point.outcome) for point in knee.points]
    basis = _basis(point.measurement for point in knee.points)
    return rate_vs_p95(points, (knee.stable_rate, knee.unstable_rate), basis=basis, key=key)


def _arm_plots(arms: Sequence[Measurement], key: str) -> list[str]:
    from pytest_gpulab.report.plots import Arm, cold_start_stages, fleet_timeline, latency_cdf, queue_depth

    drawn = [Arm(arm.label, arm.run(0), index) for index, arm in enumerate(arms)]
    fleets = [arm for arm in drawn if counts(arm.run.timeline)]
    basis = _basis(arms)
    plots = [latency_cdf(drawn, basis=basis, key=key)]
    if fleets:
        plots.append(fleet_timeline(fleets, basis=basis, key=key))
        plots.append(cold_start_stages(fleets, basis=basis, key=key))
    if any(arm.run.server.size for arm in drawn):
        plots.append(queue_depth(drawn, basis=basis, key=key))
    return plots


def _useful(ledger: Ledger) -> dict[str, float]:
    """The limits (s) of the first gate that compared costs per useful request; empty without one."""
    for gate in ledger.gates:
        found = _COST_LABEL.search(gate.left.label)
        if found:
            return {f"{interval}_s": float(limit) for interval, limit in _LIMIT.findall(found[1])}
    return {}


def _p95_slo(ledger: Ledger) -> float | None:
    """The p95 end to end latency (s) that a gate promised as a plain number."""
    for gate in ledger.gates:
        if gate.left.label.startswith("p95 e2e of") and gate.operator in ("<", "<=") and gate.right.n == 0:
            return gate.right.value
    return None


def _cost_plot(arms: Sequence[Measurement], useful: dict[str, float], slo_s: float | None, key: str) -> list[str]:
    from pytest_gpulab.report.plots import CostPoint, cost_vs_latency

    points = [
        CostPoint(arm.label, arm.cost_per_useful_request(**useful).figure(), arm.p95.figure(), index)
        for index, arm in enumerate(arms)
        if arm.profile.price is not None
    ]
    return [cost_vs_latency(points, basis=_basis(arms), slo_s=slo_s, key=key)] if points else []

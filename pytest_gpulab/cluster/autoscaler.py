"""The HorizontalPodAutoscaler controller: the rules of `hpa` around objects, every 15 s.

Facts from kube-controller-manager 1.33, pkg/controller/podautoscaler/horizontal.go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pytest_gpulab.cluster import hpa as rules
from pytest_gpulab.cluster.clock import Clock
from pytest_gpulab.cluster.conditions import with_condition, with_status
from pytest_gpulab.cluster.events import Event
from pytest_gpulab.cluster.hpa import History, NoMetrics, PodState, Proposal
from pytest_gpulab.cluster.manager import Ref, ref_of
from pytest_gpulab.cluster.objects import Object, at, is_deleting, name_of, namespace_of, timestamp
from pytest_gpulab.cluster.quantity import milli, milli_text
from pytest_gpulab.cluster.recorder import Recorder
from pytest_gpulab.cluster.resources import DEPLOYMENT, HPA, POD, REPLICA_SET, Resource
from pytest_gpulab.cluster.selectors import selector_text
from pytest_gpulab.cluster.store import Store

Values = Callable[[list[Object], str], dict[str, int]]
"""Milli values of a metric by pod name: the custom metrics API."""

_TARGETS: dict[str, Resource] = {"Deployment": DEPLOYMENT, "ReplicaSet": REPLICA_SET}


class Autoscaler:
    """Reconciles every HPA 15 s after it appeared, and every 15 s from then on."""

    watches = (HPA,)

    def __init__(self, store: Store, clock: Clock, values: Values) -> None:
        self._store = store
        self._clock = clock
        self._values = values
        self._events = Recorder(store, clock, "horizontal-pod-autoscaler")
        self._due: dict[Ref, float] = {}
        self._history: dict[Ref, History] = {}

    def refs(self, event: Event) -> Iterable[Ref]:
        """The autoscaler itself."""
        return (ref_of(event),)

    def reconcile(self, ref: Ref) -> float | None:
        """Synchronise when it is time; a change of the object does not bring that forward."""
        hpa = self._store.find(HPA, *ref)
        if hpa is None:
            self._due.pop(ref, None)
            self._history.pop(ref, None)
            return None
        now = self._clock.now()
        due = self._due.setdefault(ref, now + rules.SYNC_PERIOD_S)
        if now >= due:
            self._due[ref] = due = now + rules.SYNC_PERIOD_S
            self._sync(ref, hpa, now)
        return due - now

    def _sync(self, ref: Ref, hpa: Object, now: float) -> None:
        kind = _TARGETS.get(hpa["spec"]["scaleTargetRef"]["kind"])
        name = hpa["spec"]["scaleTargetRef"]["name"]
        target = self._store.find(kind, name, namespace_of(hpa)) if kind else None
        if target is None or kind is None:
            message = f'the HPA controller was unable to get the target\'s current scale: "{name}" not found'
            self._events.warning(hpa, "FailedGetScale", message)
            self._write(with_condition(hpa, now, "AbleToScale", False, "FailedGetScale", message))
            return
        history = self._history.setdefault(ref, History())
        current = target["spec"].get("replicas", 1)
        history.start(now, current)
        hpa = with_condition(hpa, now, "AbleToScale", True, "SucceededGetScale", "the HPA controller was able to "
                             "get the target's current scale")  # fmt: skip
        hpa = with_status(hpa, currentReplicas=current, observedGeneration=hpa["metadata"].get("generation", 1))
        hpa, desired, why = self._desired(hpa, target, current, history, now)
        if desired is None:
            self._write(hpa)
            return
        if desired != current:
            self._store.patch(kind, name, namespace_of(hpa), {"spec": {"replicas": desired}})
            history.scaled(now, current, desired)
            self._events.normal(hpa, "SuccessfulRescale", f"New size: {desired}; reason: {why}")
            hpa = with_condition(hpa, now, "AbleToScale", True, "SucceededRescale", "the HPA controller was able to "
                                 f"update the target scale to {desired}")  # fmt: skip
            hpa = with_status(hpa, lastScaleTime=timestamp(now))
        history.forget(now - rules.longest_memory(rules.behavior_of(hpa["spec"])))
        self._write(with_status(hpa, desiredReplicas=desired))

    def _desired(
        self, hpa: Object, target: Object, current: int, history: History, now: float
    ) -> tuple[Object, int | None, str]:
        """The replicas to set and why; None: no decision."""
        bounds = (hpa["spec"].get("minReplicas", 1), hpa["spec"]["maxReplicas"])
        if current == 0 and bounds[0] != 0:
            message = "scaling is disabled since the replica count of the target is zero"
            return with_condition(hpa, now, "ScalingActive", False, "ScalingDisabled", message), 0, ""
        if current > bounds[1]:
            return hpa, bounds[1], "Current number of replicas above Spec.MaxReplicas"
        if current < bounds[0]:
            return hpa, bounds[0], "Current number of replicas below Spec.MinReplicas"
        hpa, wanted, name = self._wanted(hpa, target, current, now)
        if wanted is None:
            return hpa, None, ""
        behavior = rules.behavior_of(hpa["spec"])
        desired, limit = rules.follow(wanted, current, bounds, history, behavior, now)
        limited = limit != "DesiredWithinRange"
        hpa = with_condition(hpa, now, "ScalingLimited", limited, limit, _LIMITS[limit])
        return hpa, desired, f"{name} above target" if wanted > current else "All metrics below target"

    def _wanted(self, hpa: Object, target: Object, current: int, now: float) -> tuple[Object, int | None, str]:
        """The largest recommendation of all metrics. With one of them invalid, it never scales down."""
        best: tuple[int, str] | None = None
        failed = ""
        shown: list[Any] = []
        for metric in hpa["spec"].get("metrics") or ():
            try:
                proposal, name, status = self._metric(hpa, metric, target, current)
            except NoMetrics as error:
                failed = failed or f"failed to get pods metric value: {error}"
                continue
            shown.append(status)
            if best is None or proposal.replicas > best[0]:
                best = (proposal.replicas, f"pods metric {name}")
        if best is None or (failed and best[0] < current):
            message = f"the HPA was unable to compute the replica count: {failed or 'it has no metrics'}"
            self._events.warning(hpa, "FailedGetPodsMetric", failed or "no metrics")
            return with_condition(hpa, now, "ScalingActive", False, "FailedGetPodsMetric", message), None, ""
        found = f"the HPA was able to successfully calculate a replica count from {best[1]}"
        hpa = with_condition(hpa, now, "ScalingActive", True, "ValidMetricFound", found)
        return with_status(hpa, currentMetrics=shown), best[0], best[1]

    def _metric(
        self, hpa: Object, metric: dict[str, Any], target: Object, current: int
    ) -> tuple[Proposal, str, dict[str, Any]]:
        if metric["type"] != "Pods":
            raise NoMetrics(f"the embedded cluster has pods metrics only, got a metric of type {metric['type']}")
        name = metric["pods"]["metric"]["name"]
        target_milli = milli(metric["pods"]["target"]["averageValue"])
        labels = selector_text(target["spec"]["selector"])
        pods = self._store.list(POD, namespace_of(hpa), labels=labels)
        states = [PodState(name_of(p), at(p, "status.phase", "Pending"), is_deleting(p)) for p in pods]
        behavior = rules.behavior_of(hpa["spec"])
        tolerance = behavior.tolerance if behavior else rules.Tolerance()
        samples = self._values(pods, name)
        proposal = rules.pods_metric_replicas(current, states, samples, target_milli, tolerance)
        average = {"averageValue": milli_text(proposal.usage_milli)}
        return proposal, name, {"type": "Pods", "pods": {"metric": {"name": name}, "current": average}}

    def _write(self, hpa: Object) -> None:
        meta = {key: value for key, value in hpa["metadata"].items() if key != "resourceVersion"}
        self._store.update_status(HPA, {**hpa, "metadata": meta})


_LIMITS: dict[rules.Reason, str] = {
    "DesiredWithinRange": "the desired count is within the acceptable range",
    "ScaleUpLimit": "the desired replica count is increasing faster than the maximum scale rate",
    "ScaleDownLimit": "the desired replica count is decreasing faster than the maximum scale rate",
    "TooManyReplicas": "the desired replica count is more than the maximum replica count",
    "TooFewReplicas": "the desired replica count is less than the minimum replica count",
}

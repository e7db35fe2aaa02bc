"""Prometheus: pods are scraped, and the adapter's rules turn their series into the custom metrics an HPA reads."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

from pytest_gpulab.cluster.adapter import Adapter, AdapterRule
from pytest_gpulab.cluster.clock import Clock
from pytest_gpulab.cluster.objects import Object, name_of, namespace_of, uid_of
from pytest_gpulab.cluster.resources import POD
from pytest_gpulab.cluster.store import Store

SCRAPE_INTERVAL_S: Final = 15.0
RETENTION_S: Final = 60.0
"""How long samples are kept at least; longer where a rule looks back further."""

RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"

Read = Callable[[Object], Mapping[str, float] | None]
"""The gauges that a pod's /metrics shows now; None when it refuses the connection."""


class Prometheus:
    """Scrapes the running pods of a cluster and keeps what the rules look back on."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        read: Read,
        rules: tuple[AdapterRule, ...] = (),
        interval_s: float = SCRAPE_INTERVAL_S,
    ) -> None:
        self._store = store
        self._clock = clock
        self._read = read
        self._adapter = Adapter(store, clock, rules)
        self._interval = interval_s
        self._kept: dict[str, deque[tuple[float, Mapping[str, float]]]] = {}

    def start(self) -> None:
        """Scrape every interval from now on."""
        self._clock.call_later(self._interval, self._scrape)

    def _scrape(self) -> None:
        now = self._clock.now()
        for pod in self._store.list(POD):
            gauges = self._read(pod) if _is_a_target(pod) else None
            if gauges is not None:
                self._kept.setdefault(uid_of(pod), deque()).append((now, dict(gauges)))
        longest = max([RETENTION_S, *(rule.window_s for rule in self._adapter.rules.values())])
        for uid in list(self._kept):
            kept = self._kept[uid]
            while kept and kept[0][0] <= now - longest:
                kept.popleft()
            if not kept:
                del self._kept[uid]
        self.start()

    def pod_metric(self, pod: Object, metric: str) -> float | None:
        """A rule's value for a pod now, as ``custom.metrics.k8s.io`` gives it; None without samples."""
        rule = self._adapter.rules.get(metric)
        if rule is None:
            return None
        now = self._clock.now()
        samples: dict[str, list[float]] = {}
        for at, gauges in self._kept.get(uid_of(pod), ()):
            if at > now - rule.window_s:
                for series, value in gauges.items():
                    samples.setdefault(series, []).append(value)
        return rule.value(samples)

    def values(self, pods: list[Object], metric: str) -> dict[str, int]:
        """Milli values by pod name; pods without a sample are left out."""
        found = {name_of(pod): self.pod_metric(pod, metric) for pod in pods}
        return {name: math.ceil(value * 1000) for name, value in found.items() if value is not None}

    def metric_list(self, pods: list[Object], metric: str) -> dict[str, Any]:
        """The answer of the custom metrics API, a MetricValueList."""
        values = self.values(pods, metric)
        return {
            "kind": "MetricValueList",
            "apiVersion": "custom.metrics.k8s.io/v1beta1",
            "metadata": {},
            "items": [
                {
                    "describedObject": {
                        "kind": "Pod",
                        "namespace": namespace_of(pod),
                        "name": name_of(pod),
                        "apiVersion": "/v1",
                    },
                    "metricName": metric,
                    "value": f"{values[name_of(pod)]}m",
                    "selector": None,
                }
                for pod in pods
                if name_of(pod) in values
            ],
        }


def _is_a_target(pod: Object) -> bool:
    """Prometheus drops pods that do not run."""
    return (pod.get("status") or {}).get("phase") == "Running"

"""The custom metrics API: values of pods, as `kubectl get --raw` and an autoscaler ask for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytest_gpulab.cluster.objects import Object
from pytest_gpulab.cluster.resources import POD
from pytest_gpulab.cluster.store import Store

MetricList = Callable[[list[Object], str], dict[str, Any]]
"""Given pods and a metric's name: their `MetricValueList`."""


def pod_metrics(store: Store, metric_list: MetricList) -> Callable[[str, Object], Object | None]:
    """Answers `namespaces/NAMESPACE/pods/NAME/METRIC`, where NAME may be `*` with a label selector."""

    def answered(path: str, query: Object) -> Object | None:
        parts = path.split("/")
        if len(parts) != 5 or parts[0] != "namespaces" or parts[2] != "pods":
            return None
        _, namespace, _, name, metric = parts
        if name == "*":
            pods = store.list(POD, namespace, labels=query.get("labelSelector", ""))
        else:
            pods = [store.get(POD, name, namespace)]
        return metric_list(pods, metric)

    return answered

"""The embedded cluster: store, cloud and every controller, on one clock.

With a `VirtualClock` it is a simulation; with a `RealClock` the same controllers run behind the API server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pytest_gpulab.cluster.adapter import AdapterRule, shipped_rules
from pytest_gpulab.cluster.autoscaler import Autoscaler
from pytest_gpulab.cluster.clock import Clock, VirtualClock
from pytest_gpulab.cluster.cloud import GPU, Cloud, Offering, catalog
from pytest_gpulab.cluster.conditions import is_true
from pytest_gpulab.cluster.disruption import (
    Consolidatable,
    Disruption,
    Expiration,
    GarbageCollection,
    Interruption,
    PodEvents,
)
from pytest_gpulab.cluster.durations import G4DN, Durations, Stages
from pytest_gpulab.cluster.jobs import Jobs
from pytest_gpulab.cluster.karpenter import Unavailable
from pytest_gpulab.cluster.kubelet import Kubelets
from pytest_gpulab.cluster.manager import Controller, Manager
from pytest_gpulab.cluster.metrics import Prometheus
from pytest_gpulab.cluster.nodeclaims import NodeClaims
from pytest_gpulab.cluster.nodepools import CLASSES, NodeClasses, NodePools
from pytest_gpulab.cluster.nodes import Machines, NodeMonitor
from pytest_gpulab.cluster.objects import Object, is_deleting, name_of, namespace_of
from pytest_gpulab.cluster.provisioning import Provisioner
from pytest_gpulab.cluster.quantity import pod_requests
from pytest_gpulab.cluster.recorder import last_events
from pytest_gpulab.cluster.resources import POD, Resource
from pytest_gpulab.cluster.scheduler import Scheduler
from pytest_gpulab.cluster.service import Services
from pytest_gpulab.cluster.store import Store
from pytest_gpulab.cluster.workloads import Deployments, ReplicaSets
from pytest_gpulab.fleet import NO_FAULTS, Faults


class DeadlineExceeded(Exception):
    """Something did not come about in time; the message names the object and its last events."""


class EmbeddedCluster:
    """Everything between kubectl and the GPU, without either.

    Args:
        read: the gauges of a pod's model server, for Prometheus; None: nothing is scraped, autoscalers see nothing.
        rules: the adapter's as long as the store has no ConfigMap of it; None: those of the lab's manifest.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        seed: int = 0,
        stages: Stages = G4DN,
        faults: Faults = NO_FAULTS,
        offerings: tuple[Offering, ...] | None = None,
        read: Callable[[Object], Mapping[str, float] | None] | None = None,
        rules: tuple[AdapterRule, ...] | None = None,
    ) -> None:
        self.clock = clock
        self.store = store = Store(clock, seed=seed)
        self.cloud = cloud = Cloud(clock, catalog() if offerings is None else offerings, faults)
        self.unavailable = Unavailable()
        self.durations = durations = Durations(stages, seed)
        self.kubelets = Kubelets(store, clock, cloud, durations)
        cloud.on_end.append(lambda instance: self.kubelets.lost(instance.provider_id))
        rules = shipped_rules() if rules is None else rules
        self.prometheus = Prometheus(store, clock, read or (lambda pod: None), rules)
        self.manager = Manager(store, clock)
        controllers: tuple[Controller, ...] = (
            Deployments(store, clock),
            ReplicaSets(store, clock),
            Jobs(store, clock),
            Scheduler(store, clock),
            Provisioner(store, clock, cloud, durations, self.unavailable),
            NodeClaims(store, clock, cloud, durations, self.unavailable),
            Machines(store, clock, cloud, durations),
            self.kubelets,
            Services(store),
            PodEvents(store, clock),
            Consolidatable(store, clock),
            Expiration(store, clock),
            Autoscaler(store, clock, self.prometheus.values),
            *(NodeClasses(store, clock, kind) for kind in CLASSES),
            NodePools(store, clock),
        )
        for controller in controllers:
            self.manager.add(controller)
        Interruption(store, clock, cloud, self.unavailable)
        for loop in (
            Disruption(store, clock),
            GarbageCollection(store, clock, cloud),
            NodeMonitor(store, clock, cloud),
            self.prometheus,
        ):
            loop.start()
        self._delete_pods_at(faults.pod_deletions)

    def suffer(self, faults: Faults) -> None:
        """From now on these faults happen; their times count from now."""
        self.cloud.suffer(faults)
        self._delete_pods_at(faults.pod_deletions)

    def _delete_pods_at(self, moments: Iterable[float]) -> None:
        for seconds in moments:
            self.clock.call_later(seconds, self._delete_oldest_pod)

    def _delete_oldest_pod(self) -> None:
        """Of the model servers that are Ready."""
        ready = [
            pod
            for pod in self.store.list(POD)
            if is_true(pod, "Ready") and not is_deleting(pod) and pod_requests(pod["spec"]).get(GPU)
        ]
        if not ready:
            self.cloud.miss("pod deletion", "Ready pod")
            return
        oldest = min(ready, key=lambda pod: (pod["metadata"]["creationTimestamp"], name_of(pod)))
        self.store.delete(POD, name_of(oldest), namespace_of(oldest))

    def apply(self, resource: Resource, obj: Object) -> Object:
        """Create an object, or lay it over the one that exists."""
        name, namespace = name_of(obj), namespace_of(obj) or ("default" if resource.namespaced else "")
        if self.store.find(resource, name, namespace) is None:
            return self.store.create(resource, obj, namespace)
        return self.store.patch(resource, name, namespace, obj)

    def wait(
        self, what: str, condition: Callable[[], bool], deadline_s: float, about: Callable[[], tuple[Any, ...]]
    ) -> float:
        """Let virtual time pass until `condition` holds; seconds it took.

        Args:
            about: the objects to name when it does not, the most telling first.

        Raises:
            DeadlineExceeded: after `deadline_s` seconds.
        """
        assert isinstance(self.clock, VirtualClock), "only virtual time can be made to pass"
        start = self.clock.now()
        if self.clock.run_until(start + deadline_s, condition):
            return self.clock.now() - start
        described = "; ".join(self._describe(obj) for obj in about()) or "there is no such object"
        raise DeadlineExceeded(f"{what}: not within {deadline_s:.0f} s. {described}")

    def _describe(self, obj: Object) -> str:
        events = " | ".join(last_events(self.store, obj)) or "no events"
        waits = [
            f"{item['type']}={item['status']} {item.get('reason', '')} {item.get('message', '')}".strip()
            for item in (obj.get("status") or {}).get("conditions", ())
            if item["status"] != "True"
        ]
        state = f" ({', '.join(waits)})" if waits else ""
        return f"{obj['kind']} {name_of(obj)}{state}: {events}"

"""Machines become nodes, and nodes whose machine died are noticed.

What the kubelet's registration, the NVIDIA device plugin, the node lifecycle controller (grace period 50 s in
Kubernetes 1.33) and the cloud node lifecycle controller (nodes without an instance are deleted) do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from pytest_gpulab.cluster.clock import Clock
from pytest_gpulab.cluster.cloud import GPU, Cloud, Instance
from pytest_gpulab.cluster.conditions import condition, is_true, with_condition, with_status
from pytest_gpulab.cluster.durations import Durations
from pytest_gpulab.cluster.events import Event
from pytest_gpulab.cluster.karpenter import UNREGISTERED_TAINT
from pytest_gpulab.cluster.manager import Ref, ref_of
from pytest_gpulab.cluster.nodeclaims import node_of, release
from pytest_gpulab.cluster.objects import Object, at, is_deleting, uid_of
from pytest_gpulab.cluster.quantity import Amounts, texts
from pytest_gpulab.cluster.recorder import Recorder
from pytest_gpulab.cluster.resources import NODE, NODE_CLAIM, POD
from pytest_gpulab.cluster.store import Store

NODE_GRACE_S: Final = 50.0
"""--node-monitor-grace-period: a node without heartbeats is NotReady after that."""
NODE_MONITOR_S: Final = 5.0


@dataclass
class _Boot:
    """When the stages of a machine's start are over, Unix seconds."""

    joins: float
    ready: float
    gpu: float


class Machines:
    """Lets launched instances join the cluster: Node object, Ready, then the GPU."""

    watches = (NODE_CLAIM, NODE)

    def __init__(self, store: Store, clock: Clock, cloud: Cloud, durations: Durations) -> None:
        self._store = store
        self._clock = clock
        self._cloud = cloud
        self._durations = durations
        self._boots: dict[str, _Boot] = {}

    def refs(self, event: Event) -> Iterable[Ref]:
        """The NodeClaim."""
        return (ref_of(event),) if event.resource is NODE_CLAIM else ()

    def reconcile(self, ref: Ref) -> float | None:
        """The stage that is due."""
        claim = self._store.find(NODE_CLAIM, *ref)
        instance = self._cloud.find(at(claim, "status.providerID", "")) if claim else None
        if claim is None or instance is None or instance.stopped is not None or self._cloud.faults.never_register:
            return None
        boot = self._boots.setdefault(uid_of(claim), self._boot(instance))
        now = self._clock.now()
        if now < boot.joins:
            return boot.joins - now
        node = node_of(self._store, claim)
        if node is None:
            node = self._store.create(NODE, _new_node(claim, instance))
        if now < boot.ready:
            return boot.ready - now
        if not is_true(node, "Ready"):
            node = self._write(
                with_condition(node, now, "Ready", True, "KubeletReady", "kubelet is posting ready status")
            )
        if not instance.offering.type.gpus or self._cloud.faults.never_allocatable:
            return None
        if now < boot.gpu:
            return boot.gpu - now
        if GPU not in at(node, "status.allocatable", {}):
            gpus = {GPU: str(instance.offering.type.gpus)}
            capacity, allocatable = at(node, "status.capacity", {}), at(node, "status.allocatable", {})
            self._write(with_status(node, capacity={**capacity, **gpus}, allocatable={**allocatable, **gpus}))
        return None

    def _boot(self, instance: Instance) -> _Boot:
        joins = instance.launched + self._durations.draw("boot")
        ready = joins + self._durations.draw("node_ready")
        return _Boot(joins, ready, ready + self._durations.draw("gpu_ready"))

    def _write(self, node: Object) -> Object:
        return self._store.update_status(NODE, node)


def _new_node(claim: Object, instance: Instance) -> Object:
    number = int(instance.id.removeprefix("i-"), 16)
    name = f"ip-10-0-{number // 250}-{number % 250 + 4}.{instance.offering.zone[:-1]}.compute.internal"
    kind = instance.offering.type
    taints = [dict(UNREGISTERED_TAINT), *claim["spec"].get("taints", ()), *claim["spec"].get("startupTaints", ())]
    address = {"type": "InternalIP", "address": f"10.0.{number // 250}.{number % 250 + 4}"}

    def shown(amounts: Amounts) -> dict[str, str]:
        return {key: text for key, text in texts(amounts).items() if key != GPU}

    return {
        "metadata": {"name": name, "labels": {**instance.offering.labels(), "kubernetes.io/hostname": name}},
        "spec": {"providerID": instance.provider_id, "taints": taints},
        "status": {
            "capacity": shown(kind.capacity),
            "allocatable": shown(kind.allocatable),
            "addresses": [address],
            "conditions": [],
        },
    }


class NodeMonitor:
    """Notices nodes whose machine is gone: NotReady after 50 s, then deleted, and their pods with them."""

    def __init__(self, store: Store, clock: Clock, cloud: Cloud) -> None:
        self._store = store
        self._clock = clock
        self._cloud = cloud
        self._events = Recorder(store, clock, "node-controller")

    def start(self) -> None:
        """Look from now on."""
        self._clock.call_later(NODE_MONITOR_S, self._look)

    def _look(self) -> None:
        now = self._clock.now()
        for node in self._store.list(NODE):
            instance = self._cloud.find(at(node, "spec.providerID", ""))
            if instance is None or instance.gone is None or now < instance.gone + NODE_GRACE_S:
                continue
            ready = condition(node, "Ready")
            if ready is not None and ready["status"] == "True":
                message = "Kubelet stopped posting node status."
                self._events.normal(
                    node, "NodeNotReady", f"Node {node['metadata']['name']} status is now: NodeNotReady"
                )
                node = with_condition(node, now, "Ready", "Unknown", "NodeStatusUnknown", message)
                self._store.update_status(NODE, node)
                self._pods_not_ready(node, now)
            elif not is_deleting(node):
                release(self._store, node)
        self.start()

    def _pods_not_ready(self, node: Object, now: float) -> None:
        for pod in self._store.list(POD):
            if pod["spec"].get("nodeName") == node["metadata"]["name"] and is_true(pod, "Ready"):
                self._store.update_status(POD, with_condition(pod, now, "Ready", False, "NodeNotReady"))

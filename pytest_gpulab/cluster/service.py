"""Services: which pods traffic goes to. Endpoints follow the Ready condition; pods that are ending leave at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pytest_gpulab.cluster.conditions import is_true
from pytest_gpulab.cluster.events import Event
from pytest_gpulab.cluster.manager import Ref, ref_of
from pytest_gpulab.cluster.objects import (
    Object,
    at,
    is_deleting,
    name_of,
    namespace_of,
    owner_reference,
    uid_of,
)
from pytest_gpulab.cluster.resources import ENDPOINTS, POD, SERVICE
from pytest_gpulab.cluster.scheduler import is_terminal
from pytest_gpulab.cluster.store import Store


class Services:
    """Keeps an Endpoints object for each Service with a selector."""

    watches = (SERVICE, POD)

    def __init__(self, store: Store) -> None:
        self._store = store

    def refs(self, event: Event) -> Iterable[Ref]:
        """The service; the services that select a pod."""
        if event.resource is SERVICE:
            return (ref_of(event),)
        labels = event.object["metadata"].get("labels") or {}
        services = self._store.list(SERVICE, namespace_of(event.object))
        return [(name_of(s), namespace_of(s)) for s in services if _selects(s, labels)]

    def reconcile(self, ref: Ref) -> float | None:
        """Write the addresses of the pods that are selected."""
        service = self._store.find(SERVICE, *ref)
        if service is None or is_deleting(service) or not service["spec"].get("selector"):
            return None
        subsets = self._subsets(service)
        found = self._store.find(ENDPOINTS, *ref)
        if found is None:
            meta = {"name": ref[0], "namespace": ref[1], "ownerReferences": [owner_reference(service)]}
            self._store.create(ENDPOINTS, {"metadata": meta, "subsets": subsets})
        elif found.get("subsets") != subsets:
            meta = {key: value for key, value in found["metadata"].items() if key != "resourceVersion"}
            self._store.update(ENDPOINTS, {**found, "metadata": meta, "subsets": subsets})
        return None

    def _subsets(self, service: Object) -> list[dict[str, Any]]:
        pods = [p for p in self._store.list(POD, namespace_of(service)) if _is_endpoint(service, p)]
        ready = [_address(pod) for pod in pods if is_true(pod, "Ready")]
        waiting = [_address(pod) for pod in pods if not is_true(pod, "Ready")]
        if not pods:
            return []
        subset: dict[str, Any] = {"addresses": ready} if ready else {}
        subset |= {"notReadyAddresses": waiting} if waiting else {}
        ports = [
            {"port": number, "protocol": port.get("protocol", "TCP")}
            | ({"name": port["name"]} if port.get("name") else {})
            for port in service["spec"].get("ports") or ()
            if (number := _number(port["targetPort"], pods)) is not None
        ]
        return [{**subset, "ports": ports}]


def ready_pods(store: Store, service: str, namespace: str) -> list[str]:
    """Uids of the pods that a service sends traffic to, in order."""
    endpoints = store.find(ENDPOINTS, service, namespace)
    subsets = (endpoints or {}).get("subsets") or ()
    return [address["targetRef"]["uid"] for subset in subsets for address in subset.get("addresses", ())]


def ready_targets(store: Store, namespace: str, service: str, port: dict[str, Any]) -> list[tuple[str, int]]:
    """Where a service port, given by `number` or `name`, sends traffic: uid and port of each Ready pod, in order."""
    found = store.find(SERVICE, service, namespace)
    names = [
        listed.get("name")
        for listed in at(found, "spec.ports", [])
        if port.get("number") == listed["port"] or (port.get("name") and port["name"] == listed.get("name"))
    ]
    return [
        (address["targetRef"]["uid"], target["port"])
        for subset in at(store.find(ENDPOINTS, service, namespace), "subsets", [])
        for target in subset["ports"]
        if target.get("name") in names
        for address in subset.get("addresses", ())
    ]


def _number(port: int | str, pods: list[Object]) -> int | None:
    """A targetPort as a number; a name is that of a port of the pods' containers, None when no one has it."""
    if isinstance(port, int):
        return port
    return next(
        (
            listed["containerPort"]
            for pod in pods
            for container in pod["spec"]["containers"]
            for listed in container.get("ports") or ()
            if listed.get("name") == port
        ),
        None,
    )


def _selects(service: Object, labels: dict[str, str]) -> bool:
    selector = service["spec"].get("selector") or {}
    return bool(selector) and all(labels.get(key) == value for key, value in selector.items())


def _is_endpoint(service: Object, pod: Object) -> bool:
    labels = pod["metadata"].get("labels") or {}
    return (
        _selects(service, labels) and bool(at(pod, "status.podIP")) and not is_deleting(pod) and not is_terminal(pod)
    )


def _address(pod: Object) -> dict[str, Any]:
    target = {"kind": "Pod", "name": name_of(pod), "namespace": namespace_of(pod), "uid": uid_of(pod)}
    return {"ip": at(pod, "status.podIP"), "nodeName": pod["spec"]["nodeName"], "targetRef": target}

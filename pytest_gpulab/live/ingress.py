"""Ingresses: each becomes a load balancer on loopback, as the ALB controller of EKS Auto Mode makes one.

Facts from the AWS Load Balancer Controller v2: an Ingress is served when its class names the controller, carries a
finalizer until its balancer is gone, and gets its address once the balancer is active; targets that are removed are
drained for the deregistration delay. With certificates in the parameters of its class it speaks HTTPS, else HTTP, and
answers only `inboundCIDRs`. One balancer an Ingress, no groups; a rule's host is not looked at, because clients on
loopback have no name to send. Whatever certificate is named, it is one of the loopback interface, signed by the same
authority as the API server's, which the kubeconfig holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from ipaddress import ip_network
from typing import Any, Final

from pytest_gpulab.cluster.api.access import Certificates
from pytest_gpulab.cluster.clock import Clock
from pytest_gpulab.cluster.durations import Durations
from pytest_gpulab.cluster.events import Event
from pytest_gpulab.cluster.manager import Ref, ref_of
from pytest_gpulab.cluster.objects import Object, at, is_deleting, name_of, namespace_of
from pytest_gpulab.cluster.recorder import Recorder
from pytest_gpulab.cluster.resources import ENDPOINTS, INGRESS, INGRESS_CLASS, INGRESS_CLASS_PARAMS
from pytest_gpulab.cluster.service import ready_targets
from pytest_gpulab.cluster.store import Store
from pytest_gpulab.live.background import Background
from pytest_gpulab.live.servers import ModelServers
from pytest_gpulab.serving.edge import Edge, serve_edge, under

CONTROLLERS: Final = ("eks.amazonaws.com/alb", "ingress.k8s.aws/alb")
"""Values of an IngressClass's `spec.controller` that are served: EKS Auto Mode's, and the controller one installs."""
FINALIZER: Final = "ingress.k8s.aws/resources"
_NOBODY: Final = "http://127.0.0.1:9"
"""Where nothing listens: what is sent to a Ready pod whose machine is gone, which nobody has noticed, is lost."""
_IDLE_TIMEOUT: Final = "idle_timeout.timeout_seconds"
IDLE_TIMEOUT_S: Final = 60.0
"""An ALB's default; IngressClassParams may say another one."""
DEREGISTRATION_S: Final = 300.0
"""An ALB target group's default deregistration delay."""


@dataclass
class _Balancer:
    """An Ingress's ALB. Times are Unix seconds of the cluster."""

    active: float
    """When provisioning is over."""
    spec: dict[str, Any] = field(default_factory=dict)
    """The Ingress's, as it was last seen."""
    task: asyncio.Task[None] | None = None
    edge: Edge | None = None
    gone: float | None = None
    """When deletion is over."""
    targets: frozenset[str] = frozenset()
    """URLs of the registered targets."""


class Ingresses:
    """The controller of all Ingresses. `deregistration_s` is in real seconds, as requests are."""

    watches = (INGRESS, INGRESS_CLASS, ENDPOINTS)

    def __init__(
        self,
        store: Store,
        clock: Clock,
        durations: Durations,
        servers: ModelServers,
        background: Background,
        deregistration_s: float,
        certificates: Certificates,
    ) -> None:
        self._store = store
        self._clock = clock
        self._durations = durations
        self._servers = servers
        self._background = background
        self._deregistration_s = deregistration_s
        self._certificates = certificates
        self._events = Recorder(store, clock, "ingress")
        self._balancers: dict[Ref, _Balancer] = {}

    def refs(self, event: Event) -> Iterable[Ref]:
        """The Ingress; those that a class or the endpoints of a service may concern."""
        if event.resource is INGRESS:
            return (ref_of(event),)
        ingresses = self._store.list(INGRESS, namespace_of(event.object))
        return [(name_of(ingress), namespace_of(ingress)) for ingress in ingresses]

    def reconcile(self, ref: Ref) -> float | None:
        """Provision, serve or delete; seconds until the cloud is done with it."""
        ingress = self._store.find(INGRESS, *ref)
        if ingress is None:
            self._drop(ref)
            return None
        if is_deleting(ingress):
            return self._delete(ref, ingress)
        if not self._is_served(ingress):
            return None
        now = self._clock.now()
        if ref not in self._balancers:
            self._hold(ingress)
            self._balancers[ref] = _Balancer(now + self._durations.draw("balancer"))
        balancer = self._balancers[ref]
        balancer.spec = ingress["spec"]
        if now < balancer.active:
            return balancer.active - now
        if balancer.task is None:
            balancer.task = self._background.start(self._balance(ref, balancer))
        self._drain_removed(ref, balancer)
        return None

    def _is_served(self, ingress: Object) -> bool:
        found = self._store.find(INGRESS_CLASS, at(ingress, "spec.ingressClassName", ""))
        return at(found, "spec.controller") in CONTROLLERS

    # its life

    def _hold(self, ingress: Object) -> None:
        held = ingress["metadata"].get("finalizers") or []
        if FINALIZER not in held:
            patch = {"metadata": {"finalizers": [*held, FINALIZER]}}
            self._store.patch(INGRESS, name_of(ingress), namespace_of(ingress), patch)

    async def _balance(self, ref: Ref, balancer: _Balancer) -> None:
        """Listen until cancelled."""
        parameters = self._parameters(balancer.spec)
        cidrs = parameters.get("inboundCIDRs")
        async with serve_edge(
            partial(self._route, ref, balancer),
            idle_timeout_s=_idle_timeout_s(parameters),
            tls=self._certificates.context() if parameters.get("certificateARNs") else None,
            inbound=[ip_network(cidr) for cidr in cidrs] if cidrs else None,
        ) as balancer.edge:
            port = {"port": int(balancer.edge.url.rpartition(":")[2]), "protocol": "TCP"}
            status = {"loadBalancer": {"ingress": [{"hostname": "127.0.0.1", "ports": [port]}]}}
            if (ingress := self._store.find(INGRESS, *ref)) is not None:
                self._store.patch_status(INGRESS, *ref, status)
                self._events.normal(ingress, "SuccessfullyReconciled", "Successfully reconciled")
            await asyncio.get_running_loop().create_future()

    def _parameters(self, spec: dict[str, Any]) -> dict[str, Any]:
        """What the class of an Ingress says of its balancers."""
        found = self._store.find(INGRESS_CLASS, spec["ingressClassName"])
        params = self._store.find(INGRESS_CLASS_PARAMS, at(found, "spec.parameters.name", ""))
        said: dict[str, Any] = at(params, "spec", {})
        return said

    def _delete(self, ref: Ref, ingress: Object) -> float | None:
        """The Ingress goes when its balancer is gone."""
        balancer, now = self._balancers.get(ref), self._clock.now()
        if balancer is not None:
            if balancer.gone is None:
                balancer.gone = now + self._durations.draw("balancer_delete")
                _stop(balancer)
            if now < balancer.gone:
                return balancer.gone - now
            self._drop(ref)
        held = ingress["metadata"].get("finalizers") or []
        if FINALIZER in held:
            left = [item for item in held if item != FINALIZER]
            self._store.patch(INGRESS, *ref, {"metadata": {"finalizers": left or None}})
        return None

    def _drop(self, ref: Ref) -> None:
        balancer = self._balancers.pop(ref, None)
        if balancer is not None:
            _stop(balancer)

    # its traffic

    def _route(self, ref: Ref, balancer: _Balancer, path: str) -> Sequence[str] | None:
        """The targets of the rule for a path: an exact one first, else the longest; None without one."""
        rules = [rule for rule in rules_of(balancer.spec) if matches(rule, path)]
        if not rules:
            return None
        best = max(rules, key=lambda rule: (rule["pathType"] == "Exact", len(rule["path"])))
        return self._targets(ref, best)

    def _targets(self, ref: Ref, rule: dict[str, Any]) -> list[str]:
        service = at(rule, "backend.service", {})
        targets = ready_targets(self._store, ref[1], service.get("name", ""), service.get("port") or {})
        return [self._servers.url(uid, port) or _NOBODY for uid, port in targets]

    def _drain_removed(self, ref: Ref, balancer: _Balancer) -> None:
        """Let targets that are no longer Ready finish, for the deregistration delay at most."""
        targets = frozenset(url for rule in rules_of(balancer.spec) for url in self._targets(ref, rule))
        if balancer.edge is not None:
            for url in sorted(balancer.targets - targets):
                self._background.start(self._drain(balancer.edge, url))
        balancer.targets = targets

    async def _drain(self, edge: Edge, url: str) -> None:
        await edge.drain(url, self._deregistration_s)


def _idle_timeout_s(parameters: dict[str, Any]) -> float:
    """Real seconds without a byte until a client gets 504."""
    attributes = {item["key"]: item["value"] for item in parameters.get("loadBalancerAttributes") or ()}
    said = str(attributes.get(_IDLE_TIMEOUT, ""))
    return float(said) if said.isdigit() else IDLE_TIMEOUT_S


def _stop(balancer: _Balancer) -> None:
    if balancer.task is not None:
        balancer.task.cancel()


def rules_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The paths of an Ingress with their backends; one without a path takes all, as an ALB's rule does."""
    return [{"path": "/*", **path} for rule in spec.get("rules") or () for path in at(rule, "http.paths", [])]


def matches(rule: dict[str, Any], path: str) -> bool:
    """Whether a path belongs to a rule.

    Exact and Prefix are Kubernetes' own, ImplementationSpecific is an ALB's path pattern with * and ?.
    """
    if rule["pathType"] == "Prefix":
        return under(rule["path"], path)
    return path == rule["path"] if rule["pathType"] == "Exact" else fnmatchcase(path, rule["path"])

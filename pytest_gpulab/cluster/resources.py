"""The table of resource kinds the embedded cluster serves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Resource:
    """One kind: how its paths, names and subresources read. Compared by identity, so it is a cheap dictionary key."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    short_names: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    immutable: tuple[str, ...] = ()
    """Dotted paths that an update must not change."""
    singular_name: str = ""
    custom: bool = False
    """Whether a CustomResourceDefinition declares it: no strategic merge patch, no built-in schema."""

    @property
    def api_version(self) -> str:
        """`v1` or `apps/v1`."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def qualified(self) -> str:
        """`pods` or `deployments.apps`, as error messages name it."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def singular(self) -> str:
        """`pod`."""
        return self.singular_name or self.kind.lower()

    @property
    def has_status(self) -> bool:
        """Whether status is written only through its own subresource."""
        return "status" in self.subresources

    @property
    def path(self) -> str:
        """`/api/v1` or `/apis/apps/v1`."""
        return f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"

    def __repr__(self) -> str:
        return f"Resource({self.qualified}/{self.version})"


_ALL = ("all",)
_STATUS = ("status",)
_SCALED = ("status", "scale")
_POD_VERBS = ("status", "log", "attach", "eviction", "binding")


def _karpenter(kind: str, short: str = "") -> Resource:
    shorts = (short,) if short else ()
    return Resource(
        "karpenter.sh", "v1", f"{kind.lower()}s", kind, False, shorts, _STATUS, ("karpenter",), custom=True
    )


def _node_class(group: str, kind: str, *shorts: str) -> Resource:
    plural = f"{kind.lower()}es"
    return Resource(group, "v1", plural, kind, False, shorts, _STATUS, ("karpenter",), custom=True)


NAMESPACE = Resource("", "v1", "namespaces", "Namespace", False, ("ns",), ("status", "finalize"))
NODE = Resource("", "v1", "nodes", "Node", False, ("no",), _STATUS)
POD = Resource("", "v1", "pods", "Pod", True, ("po",), _POD_VERBS, _ALL)
SERVICE = Resource("", "v1", "services", "Service", True, ("svc",), _STATUS, _ALL)
ENDPOINTS = Resource("", "v1", "endpoints", "Endpoints", True, ("ep",), singular_name="endpoints")
CONFIG_MAP = Resource("", "v1", "configmaps", "ConfigMap", True, ("cm",))
SECRET = Resource("", "v1", "secrets", "Secret", True, (), immutable=("type",))
SERVICE_ACCOUNT = Resource("", "v1", "serviceaccounts", "ServiceAccount", True, ("sa",))
EVENT = Resource("", "v1", "events", "Event", True, ("ev",))
VOLUME_CLAIM = Resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim", True, ("pvc",), _STATUS)
VOLUME = Resource("", "v1", "persistentvolumes", "PersistentVolume", False, ("pv",), _STATUS)
RESOURCE_QUOTA = Resource("", "v1", "resourcequotas", "ResourceQuota", True, ("quota",), _STATUS)
LIMIT_RANGE = Resource("", "v1", "limitranges", "LimitRange", True, ("limits",))

DEPLOYMENT = Resource("apps", "v1", "deployments", "Deployment", True, ("deploy",), _SCALED, _ALL, ("spec.selector",))
REPLICA_SET = Resource("apps", "v1", "replicasets", "ReplicaSet", True, ("rs",), _SCALED, _ALL, ("spec.selector",))
STATEFUL_SET = Resource(
    "apps", "v1", "statefulsets", "StatefulSet", True, ("sts",), _SCALED, _ALL, ("spec.selector",)
)
DAEMON_SET = Resource("apps", "v1", "daemonsets", "DaemonSet", True, ("ds",), _STATUS, _ALL, ("spec.selector",))
JOB = Resource(
    *("batch", "v1", "jobs", "Job", True, (), _STATUS, _ALL),
    immutable=("spec.completionMode", "spec.selector", "spec.template"),
)
CRON_JOB = Resource("batch", "v1", "cronjobs", "CronJob", True, ("cj",), _STATUS, _ALL)
HPA = Resource(
    "autoscaling", "v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler", True, ("hpa",), _STATUS, _ALL
)
INGRESS = Resource("networking.k8s.io", "v1", "ingresses", "Ingress", True, ("ing",), _STATUS)
INGRESS_CLASS = Resource("networking.k8s.io", "v1", "ingressclasses", "IngressClass", False)
NETWORK_POLICY = Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", True, ("netpol",))
DISRUPTION_BUDGET = Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", True, ("pdb",), _STATUS)
ROLE = Resource("rbac.authorization.k8s.io", "v1", "roles", "Role")
ROLE_BINDING = Resource("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding", immutable=("roleRef",))
CLUSTER_ROLE = Resource("rbac.authorization.k8s.io", "v1", "clusterroles", "ClusterRole", False)
CLUSTER_ROLE_BINDING = Resource(
    "rbac.authorization.k8s.io", "v1", "clusterrolebindings", "ClusterRoleBinding", False, immutable=("roleRef",)
)
STORAGE_CLASS = Resource("storage.k8s.io", "v1", "storageclasses", "StorageClass", False, ("sc",))
PRIORITY_CLASS = Resource("scheduling.k8s.io", "v1", "priorityclasses", "PriorityClass", False, ("pc",))
LEASE = Resource("coordination.k8s.io", "v1", "leases", "Lease")
ENDPOINT_SLICE = Resource("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice")
CUSTOM_RESOURCE_DEFINITION = Resource(
    "apiextensions.k8s.io",
    "v1",
    "customresourcedefinitions",
    "CustomResourceDefinition",
    False,
    ("crd", "crds"),
    _STATUS,
)
API_SERVICE = Resource("apiregistration.k8s.io", "v1", "apiservices", "APIService", False, (), _STATUS)
NODE_POOL = _karpenter("NodePool")
NODE_CLAIM = _karpenter("NodeClaim")
NODE_CLASS = _node_class("eks.amazonaws.com", "NodeClass")
EC2_NODE_CLASS = _node_class("karpenter.k8s.aws", "EC2NodeClass", "ec2nc", "ec2ncs")
INGRESS_CLASS_PARAMS = Resource(
    "eks.amazonaws.com",
    "v1",
    "ingressclassparams",
    "IngressClassParams",
    False,
    singular_name="ingressclassparams",
    custom=True,
)
POD_MONITOR = Resource("monitoring.coreos.com", "v1", "podmonitors", "PodMonitor", True, ("pmon",), custom=True)
SERVICE_MONITOR = Resource(
    "monitoring.coreos.com", "v1", "servicemonitors", "ServiceMonitor", True, ("smon",), custom=True
)

METRICS_GROUP, METRICS_VERSION = "custom.metrics.k8s.io", "v1beta1"
"""Served by a callable, not stored."""

BUILT_IN: tuple[Resource, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Resource))


class Resources:
    """The kinds one cluster serves: the built-in ones and those its custom resource definitions add."""

    def __init__(self) -> None:
        self._by_path: dict[tuple[str, str, str], Resource] = {}
        self._by_kind: dict[tuple[str, str], Resource] = {}
        for resource in BUILT_IN:
            self.add(resource)

    def __iter__(self) -> Iterator[Resource]:
        return iter(list(self._by_path.values()))

    def add(self, resource: Resource) -> Resource:
        """Serve a kind; one that is served already stays as it is."""
        known = self._by_path.setdefault((resource.group, resource.version, resource.plural), resource)
        self._by_kind.setdefault((known.api_version, known.kind), known)
        return known

    def remove(self, resource: Resource) -> None:
        """Serve a kind no longer."""
        self._by_path.pop((resource.group, resource.version, resource.plural), None)
        self._by_kind.pop((resource.api_version, resource.kind), None)

    def at(self, group: str, version: str, plural: str) -> Resource | None:
        """The kind at a path."""
        return self._by_path.get((group, version, plural))

    def of(self, api_version: str, kind: str) -> Resource | None:
        """The kind of an object."""
        return self._by_kind.get((api_version, kind))

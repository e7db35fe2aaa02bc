"""Which node may run a pod: taints and tolerations, node selectors and affinity. Pure, shared by the scheduler and
Karpenter.

Facts from Kubernetes 1.33: component-helpers/scheduling/corev1 and the NodeAffinity and TaintToleration plugins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Spec = Mapping[str, Any]
Labels = Mapping[str, str]


def tolerates(tolerations: Iterable[Spec], taint: Spec) -> bool:
    """Whether one of the tolerations covers the taint. An empty key with Exists covers all, an empty effect any."""
    return any(_covers(toleration, taint) for toleration in tolerations)


def _covers(toleration: Spec, taint: Spec) -> bool:
    if toleration.get("effect") and toleration["effect"] != taint["effect"]:
        return False
    if toleration.get("key") and toleration["key"] != taint["key"]:
        return False
    if toleration.get("operator") == "Exists":
        return True
    return bool(toleration.get("key")) and toleration.get("value", "") == taint.get("value", "")


def untolerated(pod_spec: Spec, taints: Iterable[Spec]) -> Spec | None:
    """The first taint that keeps the pod away; PreferNoSchedule keeps none away."""
    tolerations = pod_spec.get("tolerations") or ()
    hard = (taint for taint in taints if taint["effect"] != "PreferNoSchedule")
    return next((taint for taint in hard if not tolerates(tolerations, taint)), None)


def pod_requirements(pod_spec: Spec) -> list[list[Spec]]:
    """What the pod demands of a node's labels, as alternatives of requirements that must all hold.

    The node selector holds in each alternative. No demands: one empty alternative.
    """
    selector = pod_spec.get("nodeSelector") or {}
    chosen: list[Spec] = [{"key": k, "operator": "In", "values": [v]} for k, v in selector.items()]
    affinity = (pod_spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    terms = required.get("nodeSelectorTerms")
    if terms is None:
        return [chosen]
    return [[*chosen, *(term.get("matchExpressions") or ())] for term in terms if term.get("matchExpressions")]


def labels_match(pod_spec: Spec, labels: Labels) -> bool:
    """Whether a node with these labels satisfies node selector and required affinity."""
    return any(all(holds(item, labels) for item in terms) for terms in pod_requirements(pod_spec))


def holds(requirement: Spec, labels: Labels) -> bool:
    """One node selector requirement on a node's labels."""
    key, operator, values = requirement["key"], requirement["operator"], list(requirement.get("values") or ())
    value = labels.get(key)
    if operator == "In":
        return value in values
    if operator == "NotIn":
        return value not in values
    if operator == "Exists":
        return value is not None
    if operator == "DoesNotExist":
        return value is None
    if value is None or not value.lstrip("-").isdigit():
        return False
    return int(value) > int(values[0]) if operator == "Gt" else int(value) < int(values[0])

"""Manifests that the cluster tests share: the g4dn pools, a vLLM deployment, its service and autoscaler."""

from __future__ import annotations

from typing import Any

from pytest_gpulab.cluster.auto_mode import DEFAULT_CLASS
from pytest_gpulab.cluster.clock import VirtualClock
from pytest_gpulab.cluster.embedded import EmbeddedCluster
from pytest_gpulab.cluster.resources import DEPLOYMENT, NODE_CLASS, NODE_POOL, SERVICE
from pytest_gpulab.experiment import Profile

T4 = Profile(model="qwen2.5-0.5b", accelerator="t4", engine_args={"max_model_len": 9216})
LABELS = {"app": "vllm"}
GPU_TAINT = {"key": "nvidia.com/gpu", "value": "true", "effect": "NoSchedule"}


def pool(
    name: str, capacity: str, weight: int = 0, gpus: int = 4, after: str = "30s", **changes: Any
) -> dict[str, Any]:
    """A NodePool of g4dn.xlarge."""
    requirements = [
        {"key": "karpenter.sh/capacity-type", "operator": "In", "values": [capacity]},
        {"key": "node.kubernetes.io/instance-type", "operator": "In", "values": ["g4dn.xlarge"]},
    ]
    return {
        "metadata": {"name": name},
        "spec": {
            **({"weight": weight} if weight else {}),
            "limits": {"nvidia.com/gpu": str(gpus)},
            "disruption": {
                "consolidationPolicy": "WhenEmptyOrUnderutilized",
                "consolidateAfter": after,
                "budgets": [{"nodes": "100%"}],
            },
            "template": {
                "metadata": {"labels": {"lab/pool": "gpu"}},
                "spec": {
                    "nodeClassRef": {"group": "eks.amazonaws.com", "kind": "NodeClass", "name": "default"},
                    "requirements": requirements,
                    "taints": [GPU_TAINT],
                    **changes,
                },
            },
        },
    }


def deployment(replicas: int | None = 1, **pod: Any) -> dict[str, Any]:
    """vLLM on one GPU each."""
    container = {
        "name": "vllm",
        "image": "vllm/vllm-openai@sha256:1",
        "resources": {"limits": {"nvidia.com/gpu": "1"}, "requests": {"cpu": "2", "memory": "8Gi"}},
        "readinessProbe": {"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 5},
    }
    spec: dict[str, Any] = {
        "containers": [container],
        "nodeSelector": {"lab/pool": "gpu"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "terminationGracePeriodSeconds": 30,
        **pod,
    }
    scale = {} if replicas is None else {"replicas": replicas}
    template = {"metadata": {"labels": LABELS}, "spec": spec}
    return {
        "metadata": {"name": "vllm"},
        "spec": {**scale, "selector": {"matchLabels": LABELS}, "template": template},
    }


def service() -> dict[str, Any]:
    """In front of the deployment."""
    return {
        "metadata": {"name": "vllm"},
        "spec": {"selector": LABELS, "ports": [{"port": 80, "targetPort": 8000}]},
    }


def hpa(target: str = "4", least: int = 1, most: int = 4, metric: str = "vllm_requests_running") -> dict[str, Any]:
    """Scales the deployment on a pods metric."""
    pods = {"metric": {"name": metric}, "target": {"type": "AverageValue", "averageValue": target}}
    return {
        "metadata": {"name": "vllm"},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "vllm"},
            "minReplicas": least,
            "maxReplicas": most,
            "metrics": [{"type": "Pods", "pods": pods}],
        },
    }


def cluster(spot: bool = True, deployed: int | None = 1, **options: Any) -> EmbeddedCluster:
    """A cluster with both pools, and the deployment unless `deployed` is None."""
    made = EmbeddedCluster(VirtualClock(), **options)
    made.apply(NODE_CLASS, DEFAULT_CLASS)
    if spot:
        made.apply(NODE_POOL, pool("gpu-spot", "spot", weight=100))
    made.apply(NODE_POOL, pool("gpu-on-demand", "on-demand", weight=10))
    made.apply(SERVICE, service())
    if deployed is not None:
        made.apply(DEPLOYMENT, deployment(deployed))
    return made

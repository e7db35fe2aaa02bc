"""What an EKS Auto Mode cluster has from the start: a NodePool of machines without a GPU, for all but models, and its
NodeClass."""

from __future__ import annotations

from typing import Final

from pytest_gpulab.cluster.cloud import GIB, InstanceType
from pytest_gpulab.cluster.objects import Object

C6A_LARGE: Final = InstanceType("c6a.large", 2, 4 * GIB, 0, "", 0, 0.0765)
"""The cheapest of the general-purpose pool's machines here; USD per hour on demand in us-west-2."""

DEFAULT_CLASS: Final[Object] = {
    "metadata": {"name": "default", "labels": {"app.kubernetes.io/managed-by": "eks"}},
    "spec": {"ephemeralStorage": {"size": "80Gi", "iops": 3000, "throughput": 125}},
}
GENERAL_PURPOSE: Final[Object] = {
    "metadata": {"name": "general-purpose", "labels": {"app.kubernetes.io/managed-by": "eks"}},
    "spec": {
        "disruption": {
            "consolidationPolicy": "WhenEmptyOrUnderutilized",
            "consolidateAfter": "30s",
            "budgets": [{"nodes": "10%"}],
        },
        "template": {
            "spec": {
                "nodeClassRef": {"group": "eks.amazonaws.com", "kind": "NodeClass", "name": "default"},
                "requirements": [
                    {"key": "karpenter.sh/capacity-type", "operator": "In", "values": ["on-demand"]},
                    {"key": "eks.amazonaws.com/instance-category", "operator": "In", "values": ["c", "m", "r"]},
                    {"key": "eks.amazonaws.com/instance-generation", "operator": "Gt", "values": ["4"]},
                    {"key": "kubernetes.io/arch", "operator": "In", "values": ["amd64"]},
                    {"key": "kubernetes.io/os", "operator": "In", "values": ["linux"]},
                ],
                "terminationGracePeriod": "24h0m0s",
            }
        },
    },
}
"""As Auto Mode creates it."""

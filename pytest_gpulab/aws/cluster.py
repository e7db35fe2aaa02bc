"""An EKS cluster as it is: what the lab needs of one, whether its own stack made it or somebody else did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_gpulab.aws.clients import Clients
from pytest_gpulab.aws.errors import AwsError, error_code, explained
from pytest_gpulab.render import Machines

Cluster = Mapping[str, Any]
"""What DescribeCluster answers as ``cluster``."""


def find_cluster(clients: Clients, name: str) -> Cluster | None:
    """The cluster; None if there is none."""
    from botocore.exceptions import ClientError

    with explained(f"looking for the cluster {name}"):
        try:
            cluster: Cluster = clients("eks").describe_cluster(name=name)["cluster"]
        except ClientError as refusal:
            if error_code(refusal) == "ResourceNotFoundException":
                return None
            raise
    return cluster


def require_usable(clients: Clients, name: str) -> Cluster:
    """The cluster, if it is what the lab needs now, whatever a stack once made of it.

    Raises:
        AwsError: there is none, or it lacks something; every lack is named.
    """
    cluster = find_cluster(clients, name)
    if cluster is None:
        raise AwsError(f"there is no EKS cluster {name} in this region: check the name and the region")
    if lacks := [lack for lack, holds in _requirements(cluster) if not holds]:
        raise AwsError(f"the EKS cluster {name} cannot be used: {'; '.join(lacks)}")
    return cluster


def machines_of(cluster: Cluster) -> Machines:
    """What the lab's NodeClass says of its machines: role, subnets and security group of the cluster's own.

    Raises:
        AwsError: the cluster has no node role, because none of Auto Mode's built-in pools is on.
    """
    role = (cluster.get("computeConfig") or {}).get("nodeRoleArn")
    if not role:
        raise AwsError(f"the cluster {cluster['name']} has no node role: enable a built-in pool of Auto Mode")
    network = cluster["resourcesVpcConfig"]
    return Machines(
        role=role.rsplit("/", 1)[-1],
        subnets=tuple(network["subnetIds"]),
        security_groups=(network["clusterSecurityGroupId"],),
    )


def _requirements(cluster: Cluster) -> list[tuple[str, bool]]:
    """What must hold, said as what is lacking, and whether it holds."""
    network = cluster.get("kubernetesNetworkConfig") or {}
    mode = (cluster.get("accessConfig") or {}).get("authenticationMode")
    return [
        (f"it must be ACTIVE, but is {cluster['status']}", cluster["status"] == "ACTIVE"),
        ("Auto Mode's compute must be enabled", _enabled(cluster.get("computeConfig"))),
        ("Auto Mode's load balancing must be enabled", _enabled(network.get("elasticLoadBalancing"))),
        (
            "Auto Mode's block storage must be enabled",
            _enabled((cluster.get("storageConfig") or {}).get("blockStorage")),
        ),
        (
            f"its authentication mode must be API or API_AND_CONFIG_MAP, but is {mode}",
            mode in ("API", "API_AND_CONFIG_MAP"),
        ),
    ]


def _enabled(config: Mapping[str, Any] | None) -> bool:
    return bool((config or {}).get("enabled"))

"""GPU nodes: which there are, what Karpenter is about to buy, and the check that there are none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from pytest_gpulab.kube.client import Kube, KubeError
from pytest_gpulab.kube.objects import Object, Ref
from pytest_gpulab.kube.wait import wait
from pytest_gpulab.render import RUN_LABEL

POOL_LABEL: Final = "gpulab.dev/pool"
"""On every node and NodeClaim of the lab's pools, from the NodePool's template."""
GPU_POOL: Final = "gpu"
GPU: Final = "nvidia.com/gpu"
_GPU_COUNTS: Final = ("eks.amazonaws.com/instance-gpu-count", "karpenter.k8s.aws/instance-gpu-count")

GONE_S: Final = 900.0
"""Cluster seconds that nodes may take to leave: drain, EC2's termination, and Karpenter's polls."""


class NotZero(KubeError):
    """GPU nodes exist where none must; the message names them."""


def gpu_nodes(kube: Kube) -> list[Object]:
    """Nodes with a GPU, or of a machine with one whose GPU has not shown up."""
    return [node for node in kube.list("v1", "Node") if _is_gpu(node)]


def gpu_claims(kube: Kube) -> list[Object]:
    """NodeClaims of GPU pools: machines that were bought, or are about to be."""
    return [claim for claim in kube.list("karpenter.sh/v1", "NodeClaim") if _is_gpu(claim)]


def gpu_capacity(kube: Kube) -> list[Object]:
    """NodeClaims, then nodes."""
    return [*gpu_claims(kube), *gpu_nodes(kube)]


def check_zero(kube: Kube) -> None:
    """NotZero, with their names, when there is a GPU node or one is on its way."""
    if left := gpu_capacity(kube):
        raise NotZero(f"there must be no GPU node, got {names(left)}: find out whose they are, or `gpulab reap`")


def wait_for_zero(kube: Kube, deadline_s: float = GONE_S, *, run: str = "") -> None:
    """Until every GPU node and NodeClaim is gone; with `run`, those of its other pools too. WaitFailed names them."""

    def left() -> list[Object]:
        return [*gpu_capacity(kube), *(_other_capacity(kube, run) if run else ())]

    wait(kube, "zero GPU nodes", lambda: not left(), deadline_s=deadline_s, about=left)


def _other_capacity(kube: Kube, run: str) -> list[Object]:
    """NodeClaims and nodes without a GPU that a run's NodePools have bought."""
    labels = f"{POOL_LABEL},{RUN_LABEL}={run}"
    found = [*kube.list("karpenter.sh/v1", "NodeClaim", labels=labels), *kube.list("v1", "Node", labels=labels)]
    return [obj for obj in found if not _is_gpu(obj)]


def names(objects: Iterable[Object]) -> str:
    """Kind and name of each."""
    return ", ".join(str(Ref.of(obj)) for obj in objects)


def _is_gpu(obj: Object) -> bool:
    labels = obj["metadata"].get("labels") or {}
    capacity = (obj.get("status") or {}).get("capacity") or {}
    counted = any(labels.get(key, "0") != "0" for key in _GPU_COUNTS)
    return labels.get(POOL_LABEL) == GPU_POOL or counted or str(capacity.get(GPU, "0")) != "0"

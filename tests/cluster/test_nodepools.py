"""NodePools are Ready when their NodeClass is, as `kubectl wait` asks."""

from __future__ import annotations

from pytest_gpulab.cluster.auto_mode import DEFAULT_CLASS
from pytest_gpulab.cluster.conditions import condition, is_true
from pytest_gpulab.cluster.embedded import EmbeddedCluster
from pytest_gpulab.cluster.resources import EC2_NODE_CLASS, NODE, NODE_CLASS, NODE_POOL
from tests.cluster.scene import cluster
from tests.cluster.test_lifecycle import run_for


def is_ready(made: EmbeddedCluster) -> bool:
    run_for(made, 1)
    return is_true(made.store.get(NODE_POOL, "gpu-spot"), "Ready")


def why(made: EmbeddedCluster) -> str:
    found = condition(made.store.get(NODE_POOL, "gpu-spot"), "NodeClassReady")
    return str(found and found["reason"])


def test_a_pool_is_ready_as_long_as_its_class_is_there():
    made = cluster(deployed=None)
    made.store.delete(NODE_CLASS, "default")
    assert not is_ready(made)
    assert why(made) == "NodeClassNotFound"
    made.apply(EC2_NODE_CLASS, {"metadata": {"name": "default"}})
    assert not is_ready(made), "that is another kind"
    made.apply(NODE_CLASS, DEFAULT_CLASS)
    assert is_ready(made)
    assert is_true(made.store.get(NODE_CLASS, "default"), "Ready")
    made.store.delete(NODE_CLASS, "default")
    assert not is_ready(made)


def test_a_pool_that_comes_after_its_class_is_ready():
    made = cluster(deployed=None, spot=False)
    run_for(made, 1)
    assert is_true(made.store.get(NODE_POOL, "gpu-on-demand"), "Ready")


def test_nothing_is_bought_from_a_pool_until_it_is_ready():
    """Karpenter's log says "ignoring nodepool, not ready"."""
    made = cluster()
    made.store.delete(NODE_CLASS, "default")
    run_for(made, 600)
    assert made.store.list(NODE) == []
    made.apply(NODE_CLASS, DEFAULT_CLASS)
    run_for(made, 600)
    assert len(made.store.list(NODE)) == 1

"""What an emulated cloud is told through a ConfigMap, it does; the rest of the cluster stays as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_gpulab.cluster.auto_mode import C6A_LARGE
from pytest_gpulab.cluster.clock import VirtualClock
from pytest_gpulab.cluster.cloud import InsufficientCapacity
from pytest_gpulab.cluster.embedded import EmbeddedCluster
from pytest_gpulab.cluster.resources import CONFIG_MAP, EVENT, NAMESPACE
from pytest_gpulab.fleet import NO_FAULTS, NO_VICTIM, Faults, Shortage
from pytest_gpulab.live.orders import obey, orders
from pytest_gpulab.render import documents


@pytest.fixture
def cluster() -> EmbeddedCluster:
    cluster = EmbeddedCluster(VirtualClock())
    obey(cluster)
    (namespace,) = documents("00-namespace")[:1]
    cluster.apply(NAMESPACE, namespace)
    return cluster


def order(cluster: EmbeddedCluster, faults: Faults = NO_FAULTS, stages: str = "g4dn") -> None:
    cluster.apply(CONFIG_MAP, orders(stages, faults))


def after(cluster: EmbeddedCluster, seconds: float) -> None:
    cluster.clock.run_until(cluster.clock.now() + seconds)  # type: ignore[attr-defined]


def test_stages_change(cluster: EmbeddedCluster) -> None:
    before = cluster.durations.draw("boot")
    order(cluster, stages="brief")
    assert 23 <= before <= 26 and 0.4 < cluster.durations.draw("boot") < 0.6


def test_faults_count_from_the_order_and_end_with_the_next(cluster: EmbeddedCluster) -> None:
    after(cluster, 1000.0)
    machine = cluster.cloud.launch(cluster.cloud.offerings)
    order(cluster, Faults(losses=(10.0, 30.0), shortages=(Shortage(start_s=5.0),)))
    other = cluster.cloud.launch(cluster.cloud.offerings)
    after(cluster, 11.0)
    assert machine.gone and not other.gone, "the oldest"
    with pytest.raises(InsufficientCapacity):
        cluster.cloud.launch(cluster.cloud.offerings)
    order(cluster)
    cluster.cloud.launch(cluster.cloud.offerings)
    after(cluster, 60.0)
    assert not other.gone, "what was to come does not"


def test_what_was_sold_out_is_forgotten(cluster: EmbeddedCluster) -> None:
    cluster.unavailable.block(cluster.cloud.offerings, cluster.clock.now())
    order(cluster)
    assert all(cluster.unavailable.allows(one, cluster.clock.now()) for one in cluster.cloud.offerings)


@pytest.mark.parametrize("data", [{"stages": "t5"}, {"faults": "{"}, {"faults": '{"losses": [-1]}'}])
def test_orders_that_make_no_sense_are_an_event(cluster: EmbeddedCluster, data: dict[str, str]) -> None:
    told = orders("g4dn", NO_FAULTS)
    cluster.apply(CONFIG_MAP, {**told, "data": {**told["data"], **data}})
    assert [event["reason"] for event in cluster.store.list(EVENT)] == ["InvalidOrders"]
    assert cluster.cloud.faults == NO_FAULTS


def test_a_lost_machine_is_one_with_a_gpu(cluster: EmbeddedCluster) -> None:
    """What a cluster's own pods run on is no part of the fleet."""
    with_gpu = cluster.cloud.offerings[0]
    without = cluster.cloud.launch([replace(with_gpu, type=C6A_LARGE)])
    machine = cluster.cloud.launch([with_gpu])
    order(cluster, Faults(losses=(1.0,)))
    after(cluster, 2.0)
    assert machine.gone and not without.gone


def test_a_fault_that_finds_nothing_to_harm_is_an_event(cluster: EmbeddedCluster) -> None:
    order(cluster, Faults(losses=(10.0,), interruptions=(20.0,)))
    after(cluster, 30.0)
    assert [(event["reason"], event["message"]) for event in cluster.store.list(EVENT)] == [
        (NO_VICTIM, "the loss at 10 s found no running instance: nothing went wrong"),
        (NO_VICTIM, "the interruption at 20 s found no running spot instance: nothing went wrong"),
    ]

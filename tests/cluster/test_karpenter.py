"""Karpenter's rules, case by case, worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpulab.cluster.cloud import INSTANCE_TYPES, Offering, catalog
from pytest_gpulab.cluster.karpenter import (
    Batch,
    Pool,
    Room,
    Unavailable,
    WaitingPod,
    allowed_disruptions,
    by_weight,
    consolidatable_at,
    launch_order,
    plan,
)
from pytest_gpulab.cluster.quantity import amounts

GPU = "nvidia.com/gpu"
TYPES = {kind.name: kind for kind in INSTANCE_TYPES}
G4 = {"key": "node.kubernetes.io/instance-type", "operator": "In", "values": ["g4dn.xlarge"]}
TOLERATED = {"tolerations": [{"key": GPU, "operator": "Exists"}]}
TAINT = {"key": GPU, "value": "true", "effect": "NoSchedule"}


def pod(uid, gpus=1, cpu="1", **spec):
    return WaitingPod(uid, {**TOLERATED, **spec}, amounts({GPU: gpus, "cpu": cpu, "memory": "1Gi"}), uid)


def pool(name="gpu", weight=0, limit=None, capacity=("spot", "on-demand"), requirements=(G4,), **changes):
    kinds = {"key": "karpenter.sh/capacity-type", "operator": "In", "values": list(capacity)}
    limits = None if limit is None else amounts({GPU: limit})
    return Pool(name, weight, (kinds, *requirements), taints=(TAINT,), limits=limits, **changes)


def buy(pods, pools, rooms=(), used=None, offerings=None):
    return plan(pods, list(rooms), pools, catalog() if offerings is None else offerings, used or {})


# --- batching


def test_a_batch_closes_one_second_after_the_last_pod():
    batch = Batch()
    assert batch.closes == math.inf
    batch.trigger(5.0)
    assert batch.closes == 6.0
    batch.trigger(5.7)
    assert batch.closes == 6.7


def test_a_batch_closes_ten_seconds_after_the_first_pod():
    batch = Batch()
    for tenth in range(0, 98, 7):
        batch.trigger(tenth / 10)
    assert batch.closes == 10.0
    batch.close()
    assert batch.closes == math.inf
    batch.trigger(30.0)
    assert batch.closes == 31.0


# --- pools


def test_pools_are_tried_by_weight_then_name():
    assert [p.name for p in by_weight([pool("b"), pool("z", 5), pool("a"), pool("y", 10)])] == ["y", "z", "a", "b"]


def test_the_heaviest_pool_that_fits_is_used():
    result = buy([pod("p")], [pool("cheap", 1), pool("first", 100)])
    assert [claim.pool.name for claim in result.claims] == ["first"]


def test_a_pool_whose_taint_is_not_tolerated_is_passed_over():
    result = plan([WaitingPod("p", {}, amounts({GPU: 1}))], [], [pool()], catalog(), {})
    assert "did not tolerate taint nvidia.com/gpu" in result.errors["p"]


def test_pods_share_a_node_that_carries_them():
    big = pool(requirements=({**G4, "values": ["g4dn.12xlarge"]},))
    result = buy([pod(str(i)) for i in range(5)], [big])
    assert [len(claim.pods) for claim in result.claims] == [4, 1]


def test_a_type_is_dropped_when_it_cannot_carry_the_next_pod():
    both = pool(requirements=({**G4, "values": ["g4dn.xlarge", "g4dn.12xlarge"]},))
    (claim,) = buy([pod("a"), pod("b")], [both]).claims
    assert {offering.type.name for offering in claim.options} == {"g4dn.12xlarge"}


def test_pods_go_to_what_is_there_before_anything_is_bought():
    room = Room("node-1", {}, [TAINT], amounts({GPU: 1, "cpu": 4, "memory": "8Gi", "pods": 10}))
    result = buy([pod("a"), pod("b")], [pool()], rooms=[room])
    assert result.nominated == {"a": "node-1"}
    assert [claim.pods for claim in result.claims] == [["b"]]


# --- limits


def test_a_limit_on_gpus_says_nothing_about_other_resources():
    used = {"gpu": amounts({GPU: 1, "cpu": 4, "memory": "16Gi", "pods": 110})}
    assert len(buy([pod("a")], [pool(limit=2)], used=used).claims) == 1


def test_limits_hold_within_one_plan():
    result = buy([pod("a"), pod("b"), pod("c")], [pool(limit=2)])
    assert len(result.claims) == 2
    assert "exceed limits for nodepool" in result.errors["c"]


def test_the_largest_candidate_is_taken_off_the_limit():
    both = pool(limit=4, requirements=({**G4, "values": ["g4dn.xlarge", "g4dn.12xlarge"]},))
    taints = {"nodeSelector": {"topology.kubernetes.io/zone": "us-west-2a"}}
    elsewhere = {"nodeSelector": {"topology.kubernetes.io/zone": "us-west-2b"}}
    result = buy([pod("a", **taints), pod("b", **elsewhere)], [both])
    assert [claim.pods for claim in result.claims] == [["a"]]
    assert "exceed limits" in result.errors["b"], "the first claim may become a g4dn.12xlarge with 4 GPUs"


def test_a_full_pool_leaves_its_pods_to_the_next():
    result = buy([pod("a"), pod("b")], [pool("spot", 100, limit=1), pool("other", 1)])
    assert [claim.pool.name for claim in result.claims] == ["spot", "other"]


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 8))
def test_limits_are_never_exceeded(limit, used, pods):
    result = buy([pod(f"{i}") for i in range(pods)], [pool(limit=limit)], used={"gpu": amounts({GPU: used})})
    assert len(result.claims) <= max(0, limit - used)
    assert len(result.claims) + len(result.errors) == pods


# --- offerings


def offer(kind="g4dn.xlarge", zone="a", capacity="spot", price=1.0, depth=1):
    return Offering(TYPES[kind], zone, capacity, price, depth)


def test_reserved_before_spot_before_on_demand():
    offers = [offer(capacity="on-demand", price=0.1), offer(capacity="spot", price=0.5), offer(capacity="reserved")]
    assert [o.capacity_type for o in launch_order(offers)] == ["reserved"]
    assert [o.capacity_type for o in launch_order(offers[:2])] == ["spot"]
    assert [o.capacity_type for o in launch_order(offers[:1])] == ["on-demand"]
    assert launch_order([]) == []


def test_spot_prefers_deep_pools_then_low_prices():
    offers = [
        offer(zone="a", price=0.1, depth=1),
        offer(zone="b", price=0.3, depth=3),
        offer(zone="c", price=0.2, depth=3),
    ]
    assert [o.zone for o in launch_order(offers)] == ["c", "b"]


def test_on_demand_is_lowest_price_whatever_the_depth():
    offers = [
        offer(zone="a", capacity="on-demand", price=0.2, depth=9),
        offer(zone="b", capacity="on-demand", price=0.1),
    ]
    assert [o.zone for o in launch_order(offers)] == ["b", "a"]


def test_an_offering_without_capacity_is_blocked_for_three_minutes():
    unavailable, spot, other = Unavailable(), offer(), offer(zone="b")
    unavailable.block([spot], now=100.0)
    assert not unavailable.allows(spot, 279.9)
    assert unavailable.allows(spot, 280.0)
    assert unavailable.allows(other, 100.0)


# --- consolidation


@pytest.mark.parametrize(
    ("initialized", "event", "after", "expected"),
    [
        (None, 5.0, 30.0, math.inf),
        (100.0, None, 30.0, 130.0),
        (100.0, 150.0, 30.0, 180.0),
        (100.0, 150.0, None, math.inf),
        (100.0, 150.0, 0.0, 150.0),
    ],
)
def test_consolidation_counts_from_the_last_pod_event(initialized, event, after, expected):
    assert consolidatable_at(initialized, event, after) == expected


@pytest.mark.parametrize(
    ("budgets", "nodes", "disrupting", "expected"),
    [
        (("10%",), 3, 0, 1),
        (("10%",), 11, 0, 2),
        (("10%",), 11, 1, 1),
        (("100%",), 4, 0, 4),
        (("0",), 4, 0, 0),
        (("50%", "1"), 4, 0, 1),
        (("10%",), 3, 2, 0),
    ],
)
def test_budgets_round_up_and_the_strictest_counts(budgets, nodes, disrupting, expected):
    given = [{"nodes": budget} for budget in budgets]
    assert allowed_disruptions(given, nodes, disrupting, "Empty") == expected


def test_a_budget_for_some_reasons_counts_for_these_only():
    budgets = [{"nodes": "0", "reasons": ["Underutilized", "Drifted"]}, {"nodes": "3"}]
    assert allowed_disruptions(budgets, 4, 0, "Underutilized") == 0
    assert allowed_disruptions(budgets, 4, 0, "Empty") == 3
    assert allowed_disruptions(budgets[:1], 4, 0, "Empty") == 4

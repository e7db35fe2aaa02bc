"""The autoscaler's rules, case by case. Every expectation is worked out by hand from the upstream algorithm."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pytest_gpulab.cluster import hpa
from pytest_gpulab.cluster.hpa import (
    DOWN_DEFAULT,
    UP_DEFAULT,
    Behavior,
    History,
    NoMetrics,
    PodState,
    Policy,
    ScalingRules,
    Tolerance,
)
from pytest_gpulab.fleet import Autoscaling

R, P, F = "Running", "Pending", "Failed"
TARGET = 5000


def proposal(current, phases, values, deleted=(), tolerance=None):
    """Pods a, b, c ... in these phases; `values` by name."""
    pods = [PodState(name, phase, name in deleted) for name, phase in zip("abcdefghijkl", phases, strict=False)]
    return hpa.pods_metric_replicas(current, pods, values, TARGET, tolerance or Tolerance()).replicas


@pytest.mark.parametrize(
    ("current", "phases", "values", "expected", "why"),
    [
        (1, [R], {"a": 10000}, 2, "10000 / 5000 = 2; ceil(2 * 1)"),
        (1, [R], {"a": 10001}, 3, "2.0002 is rounded up"),
        (2, [R, R], {"a": 10001, "b": 10002}, 5, "20003 // 2 = 10001; ceil(2.0002 * 2)"),
        (2, [R, R], {"a": 5400, "b": 5400}, 2, "1.08 is within 0.1"),
        (2, [R, R], {"a": 5500, "b": 5500}, 2, "1.1 is still within"),
        (2, [R, R], {"a": 5501, "b": 5501}, 3, "1.1002 is not; ceil(2.2004)"),
        (10, [R] * 10, dict.fromkeys("abcdefghij", 4500), 10, "0.9 is within"),
        (10, [R] * 10, dict.fromkeys("abcdefghij", 4499), 9, "0.8998 is not; ceil(8.998)"),
        (2, [R, P], {"a": 10000}, 2, "up, the pending pod counts as 0: 10000 // 2 = target"),
        (3, [R, P, P], {"a": 40000}, 8, "40000 // 3 = 13333, 2.6666; ceil(7.9998)"),
        (3, [R, P, P], {"a": 1000}, 1, "down, pending pods do not count: ceil(0.2 * 1)"),
        (2, [R, R], {"a": 40000}, 8, "up, the missing pod counts as 0: 20000, 4; ceil(4 * 2)"),
        (3, [R, R, R], {"a": 1000, "b": 1000}, 2, "down, the missing pod at target: 7000 // 3 = 2333; ceil(1.3998)"),
        (2, [R, R], {"a": 6000}, 2, "1.2 becomes 0.6 with the missing pod: the direction flips"),
        (2, [R, R], {"a": 5000}, 2, "exactly at target with a missing pod"),
        (5, [R, R, P], {"a": 10000, "b": 10000}, 5, "1.3332 * 3 = 4 would be a scale-down on a high metric"),
        (2, [R, F], {"a": 5000, "b": 100000}, 2, "failed pods are ignored, with their samples"),
        (2, [R, P], {"a": 5000, "b": 100000}, 2, "samples of pending pods are ignored"),
        (4, [R], {"a": 5000}, 4, "at target the current replicas stay, whatever is counted"),
        (4, [R], {"a": 4000}, 1, "below target it is the counted pods: ceil(0.8 * 1)"),
    ],
)
def test_replicas_of_a_pods_metric(current, phases, values, expected, why):
    assert proposal(current, phases, values) == expected, why


def test_deleted_pods_are_ignored_with_their_samples():
    assert proposal(2, [R, R], {"a": 5000, "b": 100000}, deleted="b") == 2
    assert proposal(2, [R, R], {"a": 15000, "b": 0}, deleted="b") == 3


def test_without_samples_there_is_no_recommendation():
    with pytest.raises(NoMetrics, match="no pods returned"):
        proposal(1, [], {})
    with pytest.raises(NoMetrics, match="pods might be unready"):
        proposal(1, [P], {"a": 10000})
    with pytest.raises(NoMetrics):
        proposal(1, [R], {})


def test_tolerance_of_each_direction_is_its_own():
    assert proposal(2, [R, R], {"a": 6000, "b": 6000}, tolerance=Tolerance(up=0.2)) == 2
    assert proposal(2, [R, R], {"a": 6000, "b": 6000}, tolerance=Tolerance(down=0.2)) == 3
    assert proposal(4, [R] * 4, dict.fromkeys("abcd", 3000), tolerance=Tolerance(down=0.5)) == 4


@given(
    st.lists(st.sampled_from([R, P, F]), min_size=1, max_size=8),
    st.lists(st.integers(0, 100_000), min_size=8, max_size=8),
    st.integers(1, 12),
)
def test_a_recommendation_never_contradicts_the_usage(phases, values, current):
    named = {name: value for name, value in zip("abcdefgh", values, strict=True) if value % 3}
    try:
        result = hpa.pods_metric_replicas(
            current, [PodState(n, p) for n, p in zip("abcdefgh", phases, strict=False)], named, TARGET
        )
    except NoMetrics:
        return
    assert result.replicas >= 0
    if TARGET * 0.9 <= result.usage_milli <= TARGET * 1.1 and P not in phases:
        assert result.replicas <= max(current, len(phases))


# --- behavior ---------------------------------------------------------------------------------------------


def history(added=(), deleted=(), recommendations=()):
    return History(list(recommendations), list(added), list(deleted))


@pytest.mark.parametrize(
    ("current", "rules", "past", "expected", "why"),
    [
        (1, UP_DEFAULT, history(), 5, "max(1 + 4, 1 * 2)"),
        (10, UP_DEFAULT, history(), 20, "max(10 + 4, 10 * 2)"),
        (5, UP_DEFAULT, history(added=[(95, 4)]), 5, "4 were added in the period: from 1, max(5, 2)"),
        (5, UP_DEFAULT, history(added=[(85, 4)]), 10, "15 s ago is outside of 15 s"),
        (3, UP_DEFAULT, history(deleted=[(95, 2)]), 10, "2 were deleted in the period: from 5, max(9, 10)"),
        (3, ScalingRules((Policy("Percent", 50, 60),), 0), history(), 5, "4.5 is rounded up"),
        (10, ScalingRules((Policy("Pods", 4, 60), Policy("Percent", 100, 60)), 0, "Min"), history(), 14, "the least"),
        (10, ScalingRules((Policy("Pods", 4, 60),), 0, "Disabled"), history(), 10, "off"),
    ],
)
def test_scale_up_limit(current, rules, past, expected, why):
    assert hpa.scale_up_limit(current, past, rules, now=100) == expected, why


@pytest.mark.parametrize(
    ("current", "rules", "past", "expected", "why"),
    [
        (10, DOWN_DEFAULT, history(), 0, "100 %"),
        (5, ScalingRules((Policy("Percent", 50, 60),), 0), history(), 2, "2.5 is truncated"),
        (5, ScalingRules((Policy("Percent", 10, 60),), 0), history(), 4, "4.5 is truncated"),
        (10, ScalingRules((Policy("Pods", 2, 60),), 0), history(), 8, "two less"),
        (8, ScalingRules((Policy("Pods", 2, 60),), 0), history(deleted=[(50, 2)]), 8, "from 10: done already"),
        (8, ScalingRules((Policy("Pods", 2, 60),), 0), history(added=[(50, 3)]), 3, "from 5"),
        (10, ScalingRules((Policy("Pods", 2, 60), Policy("Percent", 50, 60)), 0), history(), 5, "the most"),
        (10, ScalingRules((Policy("Pods", 2, 60), Policy("Percent", 50, 60)), 0, "Min"), history(), 8, "the least"),
    ],
)
def test_scale_down_limit(current, rules, past, expected, why):
    assert hpa.scale_down_limit(current, past, rules, now=100) == expected, why


def test_scale_down_waits_for_the_highest_recommendation_of_five_minutes():
    past = history(recommendations=[(0, 6), (200, 4)])
    assert hpa.stabilize(2, 6, past, Behavior(), now=290) == 6
    assert hpa.stabilize(2, 6, past, Behavior(), now=301) == 4
    assert past.recommendations[-1] == (301, 2)


def test_scale_up_waits_for_the_lowest_recommendation_of_its_window():
    behavior = Behavior(up=ScalingRules(UP_DEFAULT.policies, 60))
    past = history(recommendations=[(50, 3)])
    assert hpa.stabilize(8, 2, past, behavior, now=100) == 3
    assert hpa.stabilize(8, 2, past, behavior, now=111) == 8


def test_stabilization_comes_before_the_rate_limit():
    behavior = Behavior(down=ScalingRules((Policy("Pods", 1, 60),), 300))
    past = history(recommendations=[(0, 6)])
    assert hpa.follow(1, 8, (1, 10), past, behavior, now=100) == (7, "ScaleDownLimit")
    assert hpa.follow(1, 7, (1, 10), history(recommendations=[(0, 7)]), behavior, now=100)[0] == 7


@pytest.mark.parametrize(
    ("desired", "current", "bounds", "expected"),
    [
        (3, 2, (1, 10), (3, "DesiredWithinRange")),
        (20, 2, (1, 10), (6, "ScaleUpLimit")),
        (20, 6, (1, 10), (10, "TooManyReplicas")),
        (0, 2, (2, 10), (2, "TooFewReplicas")),
        (2, 2, (1, 10), (2, "DesiredWithinRange")),
    ],
)
def test_limits_with_behavior(desired, current, bounds, expected):
    assert hpa.limit_rate(desired, current, bounds, history(), Behavior(), now=0) == expected


@pytest.mark.parametrize(
    ("desired", "current", "bounds", "past", "expected"),
    [
        (20, 1, (1, 10), [], (4, "ScaleUpLimit")),
        (20, 3, (1, 10), [], (6, "ScaleUpLimit")),
        (20, 6, (1, 10), [], (10, "TooManyReplicas")),
        (1, 6, (1, 10), [(0, 6)], (6, "DesiredWithinRange")),
        (1, 6, (1, 10), [(-200, 6)], (1, "DesiredWithinRange")),
        (1, 6, (2, 10), [], (2, "TooFewReplicas")),
    ],
)
def test_without_behavior_the_older_rules_hold(desired, current, bounds, past, expected):
    assert hpa.follow(desired, current, bounds, history(recommendations=past), None, now=101) == expected


def test_behavior_defaults_are_filled_in():
    assert hpa.behavior_of({}) is None
    assert hpa.behavior_of({"behavior": {"scaleUp": {"stabilizationWindowSeconds": 30}}}) == Behavior(
        up=ScalingRules(UP_DEFAULT.policies, 30)
    )
    given = {"behavior": {"scaleDown": {"policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}]}}}
    assert hpa.behavior_of(given) == Behavior(down=ScalingRules((Policy("Pods", 1, 60),), 300))


BEHAVIORS = [None, Behavior(), Behavior(down=ScalingRules((Policy("Pods", 1, 60),), 60))]


@given(st.sampled_from(BEHAVIORS), st.integers(1, 3), st.integers(3, 9), st.lists(st.integers(0, 40), min_size=1))
def test_replicas_stay_within_their_bounds(behavior, least, most, wishes):
    current, past = least, History()
    past.start(0.0, current)
    for turn, desired in enumerate(wishes, 1):
        now = turn * hpa.SYNC_PERIOD_S
        after, _ = hpa.follow(desired, current, (least, most), past, behavior, now)
        past.scaled(now, current, after)
        assert least <= after <= most
        current = after


def test_a_target_that_kubernetes_cannot_tell_from_zero_is_refused() -> None:
    assert Autoscaling(target=0.001).target == 0.001
    with pytest.raises(ValidationError, match=r"target\s+Input should be greater than or equal to 0.001"):
        Autoscaling(target=0.0004)

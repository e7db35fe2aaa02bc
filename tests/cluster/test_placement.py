"""Taints, tolerations, selectors, affinity, quantities: what decides where a pod may run."""

from __future__ import annotations

import pytest

from pytest_gpulab.cluster import kubelet, scheduler
from pytest_gpulab.cluster.placement import holds, labels_match, tolerates, untolerated
from pytest_gpulab.cluster.quantity import duration, milli, milli_text, pod_requests

GPU = {"key": "nvidia.com/gpu", "value": "true", "effect": "NoSchedule"}


@pytest.mark.parametrize(
    ("toleration", "covered"),
    [
        ({"key": "nvidia.com/gpu", "operator": "Exists"}, True),
        ({"operator": "Exists"}, True),
        ({"key": "nvidia.com/gpu", "value": "true"}, True),
        ({"key": "nvidia.com/gpu", "operator": "Equal", "value": "true", "effect": "NoSchedule"}, True),
        ({"key": "nvidia.com/gpu", "value": "false"}, False),
        ({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "other", "operator": "Exists"}, False),
        ({"value": "true"}, False),
    ],
)
def test_tolerations(toleration, covered):
    assert tolerates([toleration], GPU) is covered


def test_a_soft_taint_keeps_nobody_away():
    assert untolerated({}, [{**GPU, "effect": "PreferNoSchedule"}]) is None
    assert untolerated({}, [GPU]) == GPU


LABELS = {"zone": "a", "size": "4"}


@pytest.mark.parametrize(
    ("key", "operator", "values", "expected"),
    [
        ("zone", "In", ["a", "b"], True),
        ("zone", "NotIn", ["a"], False),
        ("none", "NotIn", ["a"], True),
        ("zone", "Exists", [], True),
        ("none", "DoesNotExist", [], True),
        ("size", "Gt", ["3"], True),
        ("size", "Lt", ["4"], False),
        ("none", "Gt", ["3"], False),
    ],
)
def test_requirements(key, operator, values, expected):
    assert holds({"key": key, "operator": operator, "values": values}, LABELS) is expected


def test_selector_and_affinity_must_both_hold_and_one_term_is_enough():
    def spec(*terms):
        required = {"nodeSelectorTerms": [{"matchExpressions": list(term)} for term in terms]}
        affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
        return {"nodeSelector": {"zone": "a"}, "affinity": affinity}

    small = {"key": "size", "operator": "In", "values": ["1"]}
    large = {"key": "size", "operator": "In", "values": ["4"]}
    assert labels_match(spec([small], [large]), LABELS)
    assert not labels_match(spec([small]), LABELS)
    assert not labels_match(spec([large]), {"size": "4"})
    assert labels_match({}, {})


@pytest.mark.parametrize(
    ("text", "thousandths"),
    [("1", 1000), ("500m", 500), ("2Gi", 2 * 2**30 * 1000), ("1.5", 1500), ("0.1m", 1), ("1e3", 10**6), (2, 2000)],
)
def test_quantities(text, thousandths):
    assert milli(text) == thousandths


def test_quantities_are_written_as_short_as_they_can_be():
    assert [milli_text(value) for value in (2000, 1500, 0)] == ["2", "1500m", "0"]
    with pytest.raises(ValueError, match="got 'two'"):
        milli("two")


def test_durations():
    assert duration("1m30s") == 90.0
    assert duration("Never") is None
    with pytest.raises(ValueError, match="got '30'"):
        duration("30")


def test_a_pod_asks_for_the_sum_of_its_containers_or_its_largest_init_container():
    def container(cpu):
        return {"resources": {"requests": {"cpu": cpu}}}

    spec = {"containers": [container("1"), container("500m")], "initContainers": [container("2")]}
    assert pod_requests(spec) == {"cpu": 2000, "pods": 1000}


def test_backoffs_double_up_to_their_limit():
    assert [scheduler.backoff(n) for n in (1, 2, 3, 4, 5, 60)] == [1, 2, 4, 8, 10, 10]
    assert [kubelet.backoff(n) for n in (1, 2, 3, 5, 6, 60)] == [10, 20, 40, 160, 300, 300]


@pytest.mark.parametrize(
    ("probe", "passes", "fails"),
    [
        (None, 100.0, None),
        ({"periodSeconds": 5}, 175.0, None),
        ({"periodSeconds": 5, "initialDelaySeconds": 60}, 175.0, None),
        ({"periodSeconds": 10, "initialDelaySeconds": 80}, 180.0, None),
        ({"periodSeconds": 10, "successThreshold": 3}, 200.0, None),
        ({"periodSeconds": 10, "failureThreshold": 6}, 180.0, 150.0),
        ({"periodSeconds": 10, "failureThreshold": 9}, 180.0, None),
    ],
)
def test_probes_of_a_server_that_is_up_after_71_seconds(probe, passes, fails):
    """Started at 100 s, healthy at 171 s."""
    assert kubelet.probe_passes(probe, 100.0, 171.0) == passes
    if probe is None or "failureThreshold" in probe:
        assert kubelet.startup_fails(probe, 100.0, 171.0) == fails

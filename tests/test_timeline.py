"""What a timeline says of objects as the Kubernetes API shows them."""

from __future__ import annotations

from typing import Any

from pytest_gpulab.timeline import Timeline, cold_start, counts


def obj(kind: str, name: str, *true: str, phase: str = "", ending: bool = False, **spec: Any) -> dict[str, Any]:
    meta = {"name": name, "uid": f"uid-{name}"} | ({"deletionTimestamp": "2026-01-01T00:00:00Z"} if ending else {})
    conditions = [{"type": kind, "status": "True"} for kind in true]
    return {"kind": kind, "metadata": meta, "spec": spec, "status": {"phase": phase, "conditions": conditions}}


def told(timeline: Timeline) -> list[str]:
    return [text for _, text in timeline.entries() if not text.startswith("replicas")]


def test_changes_become_words_and_counts() -> None:
    timeline = Timeline(100.0)
    timeline.changed(100.0, obj("Deployment", "d", replicas=1))
    timeline.changed(100.5, obj("Pod", "p"))
    timeline.changed(101.0, obj("NodeClaim", "c"))
    timeline.changed(102.0, obj("NodeClaim", "c", "Launched"))
    timeline.changed(103.0, obj("Node", "n"))
    timeline.changed(104.0, obj("Pod", "p", "PodScheduled"))
    timeline.changed(105.0, obj("Pod", "p", "PodScheduled", phase="Running"))
    timeline.changed(106.0, obj("Pod", "p", "PodScheduled", "Ready", phase="Running"))
    timeline.changed(107.0, obj("Pod", "p", "PodScheduled", "Ready", phase="Running", ending=True))
    timeline.changed(108.0, obj("Pod", "p"), gone=True)
    assert told(timeline) == [
        *("Pod p created", "NodeClaim c created", "NodeClaim c launched", "Node n created", "Pod p scheduled"),
        *("Pod p started", "Pod p ready", "Pod p terminating", "Pod p gone"),
    ]
    assert cold_start(timeline.entries()) == {
        "nodeclaim": 1.0,
        "node": 3.0,
        "scheduled": 4.0,
        "container": 5.0,
        "ready": 6.0,
    }
    numbers = [tuple(count) for count in counts(timeline.entries())]
    assert numbers == [(0.0, 1, 0, 0, 0), (1.0, 1, 0, 0, 1), (3.0, 1, 0, 1, 1), (6.0, 1, 1, 1, 1), (7.0, 1, 0, 1, 1)]


def test_a_pod_that_is_first_seen_ready_has_come_all_the_way() -> None:
    timeline = Timeline(0.0)
    timeline.changed(1.0, obj("Pod", "p", "Ready", "PodScheduled", phase="Running"))
    assert told(timeline) == ["Pod p created", "Pod p scheduled", "Pod p started", "Pod p ready"]


def test_the_same_state_again_says_nothing() -> None:
    timeline = Timeline(0.0)
    for at in (1.0, 2.0):
        timeline.changed(at, obj("Node", "n", "Ready"))
    assert [at for at, _ in timeline.entries()] == [1.0, 1.0, 1.0]


def test_few_events_are_worth_a_line() -> None:
    timeline = Timeline(0.0)
    about = {"kind": "HorizontalPodAutoscaler", "name": "h"}
    timeline.said(1.0, {"reason": "SuccessfulRescale", "message": "New size: 2", "involvedObject": about})
    timeline.said(2.0, {"reason": "Pulled", "message": "an image", "involvedObject": about})
    assert told(timeline) == ["HorizontalPodAutoscaler h: SuccessfulRescale, New size: 2"]

"""Each way a wait can end, and what it says then."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_gpulab.kube import wait as waiting
from pytest_gpulab.kube.wait import WaitFailed, describe, is_true, pod_failure, wait


class Said:
    """A cluster that has only events, and time that passes when somebody sleeps."""

    def __init__(self, *events: dict[str, Any], speed: float = 1.0) -> None:
        self.events = list(events)
        self.speed = speed
        self.seconds = 0.0

    def list(self, api_version: str, kind: str, **options: Any) -> list[dict[str, Any]]:
        return self.events

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


def event(kind: str, reason: str, message: str, second: int) -> dict[str, Any]:
    return {
        "involvedObject": {"kind": kind, "name": "a"},
        "reason": reason,
        "message": message,
        "lastTimestamp": f"2026-01-01T00:00:{second:02}Z",
    }


def pod(waits: str = "", *, ready: str = "False") -> dict[str, Any]:
    state = {"waiting": {"reason": waits}} if waits else {"running": {}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "a", "namespace": "n"},
        "status": {
            "conditions": [{"type": "Ready", "status": ready, "reason": "ContainersNotReady", "message": "not yet"}],
            "containerStatuses": [{"name": "vllm", "state": state}],
        },
    }


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    said = Said()
    monkeypatch.setattr(waiting.time, "sleep", said.sleep)
    monkeypatch.setattr(waiting.time, "monotonic", lambda: said.seconds)
    return said


def test_it_returns_what_was_waited_for(said: Said) -> None:
    assert wait(said, "it", lambda: ["it"] if said.seconds >= 7 else [], deadline_s=10) == ["it"]
    assert 7 <= said.seconds < 10


def test_the_deadline_is_in_cluster_seconds(said: Said) -> None:
    said.speed = 10.0
    with pytest.raises(WaitFailed, match="waited for it: not within 50 s"):
        wait(said, "it", lambda: False, deadline_s=50)
    assert 4 <= said.seconds <= 5


def test_a_failure_ends_it_before_the_deadline(said: Said) -> None:
    with pytest.raises(WaitFailed, match="waited for it: it broke"):
        wait(said, "it", lambda: False, deadline_s=600, fails=lambda: "it broke" if said.seconds >= 5 else None)
    assert said.seconds < 10


def test_what_holds_and_fails_at_once_holds(said: Said) -> None:
    assert wait(said, "it", lambda: True, deadline_s=10, fails=lambda: "it broke")


def test_the_error_names_the_object_its_conditions_and_its_last_events(said: Said) -> None:
    said.events = [event("Pod", f"R{second}", f"m{second}", second) for second in (3, 1, 2, 0)]
    said.events.append(event("Node", "Other", "of another kind", 9))
    with pytest.raises(WaitFailed) as failure:
        wait(said, "it", lambda: False, deadline_s=1, about=lambda: [pod("ContainerCreating")])
    assert str(failure.value) == (
        "waited for it: not within 1 s. Pod n/a (Ready=False ContainersNotReady not yet, vllm: ContainerCreating): "
        "R1: m1 | R2: m2 | R3: m3"
    )


def test_the_error_says_when_there_is_no_object(said: Said) -> None:
    with pytest.raises(WaitFailed, match=r"not within 1 s\. there is no such object"):
        wait(said, "it", lambda: False, deadline_s=1)


def test_an_object_nobody_spoke_of(said: Said) -> None:
    assert describe(said, pod(ready="True")) == "Pod n/a: no events"


@pytest.mark.parametrize(
    "reason",
    ["ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CrashLoopBackOff", "CreateContainerConfigError"],
)
def test_containers_that_time_does_not_heal(reason: str) -> None:
    assert pod_failure([pod(), pod(reason)]) == f"container vllm of Pod n/a is in {reason}"


@pytest.mark.parametrize("reason", ["", "ContainerCreating", "PodInitializing"])
def test_containers_that_only_need_time(reason: str) -> None:
    assert pod_failure([pod(reason)]) is None


def test_conditions() -> None:
    assert is_true(pod(ready="True"), "Ready")
    assert not is_true(pod(ready="Unknown"), "Ready") and not is_true({}, "Ready")

"""A run's timeline: what happened to replicas, nodes and NodeClaims, as text that reads and as numbers that plot.

Whatever target wrote it, the lines below are worded alike, so that figures and plots can be read from them:
``Pod <name> ready``, ``Node <name> created`` and so on for objects, and one line of counts at every change of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final, Literal, NamedTuple, get_args

Object = dict[str, Any]
"""Of the Kubernetes API."""

Entry = tuple[float, str]
"""Seconds from the run's start, and what happened."""

Stage = Literal["nodeclaim", "node", "scheduled", "container", "ready"]
"""What a cold start has reached: NodeClaim created, node there, pod scheduled, container started, pod Ready."""

STAGES: Final[tuple[Stage, ...]] = get_args(Stage)

_FIRST: Final[dict[Stage, re.Pattern[str]]] = {
    "nodeclaim": re.compile(r"^NodeClaim \S+ created$"),
    "node": re.compile(r"^Node \S+ created$"),
    "scheduled": re.compile(r"^Pod \S+ scheduled$"),
    "container": re.compile(r"^Pod \S+ started$"),
    "ready": re.compile(r"^Pod \S+ ready$"),
}
_COUNTS: Final = re.compile(r"^replicas (\d+) wanted (\d+) ready, nodes (\d+), nodeclaims (\d+)$")


class Counts(NamedTuple):
    """How many there are from `at` seconds on."""

    at: float
    wanted: int
    ready: int
    nodes: int
    nodeclaims: int

    @property
    def text(self) -> str:
        """The line of a timeline that says so."""
        return f"replicas {self.wanted} wanted {self.ready} ready, nodes {self.nodes}, nodeclaims {self.nodeclaims}"


def counts(timeline: Iterable[Entry]) -> list[Counts]:
    """The numbers of a timeline, in order."""
    found = ((at, _COUNTS.match(text)) for at, text in timeline)
    return [Counts(at, *(int(number) for number in match.groups())) for at, match in found if match]


def cold_start(timeline: Iterable[Entry]) -> dict[Stage, float]:
    """Seconds of a run at which each stage of the first cold start was over; stages that never came are left out."""
    entries = list(timeline)
    found = {stage: next((at for at, text in entries if _FIRST[stage].match(text)), None) for stage in STAGES}
    return {stage: at for stage, at in found.items() if at is not None}


# --- writing one ----------------------------------------------------------------------------------------------

_TOLD: Final = frozenset(
    {"SuccessfulRescale", "InsufficientCapacityError", "SpotInterrupted", "RegistrationTimeout", "LaunchTimeout"}
)
"""Reasons of events that are worth a line of their own."""

_STEPS: Final = {
    "Pod": (("PodScheduled", "scheduled"), ("Ready", "ready")),
    "NodeClaim": (("Launched", "launched"), ("Registered", "registered"), ("Initialized", "initialized")),
    "Node": (("Ready", "ready"),),
}
"""By kind: conditions, and the words for them."""


class Timeline:
    """Writes down what happens to the Deployments, Pods, Nodes and NodeClaims that it is shown.

    Seconds count from `start` (of the clock that `now` is read from); what happened before has negative ones.
    """

    def __init__(self, start: float) -> None:
        self.start = start
        self._entries: list[Entry] = []
        self._seen: dict[tuple[str, str], Object] = {}
        self._counts: tuple[int, ...] = ()

    def entries(self) -> tuple[Entry, ...]:
        """(seconds, what happened), in order; microseconds are enough."""
        return tuple((round(at - self.start, 6), text) for at, text in self._entries)

    def changed(self, now: float, obj: Object, *, gone: bool = False) -> None:
        """An object is as it is now, or gone."""
        key = (obj["kind"], obj["metadata"]["uid"])
        before = self._seen.pop(key, None)
        if gone:
            words = ["gone"]
        else:
            self._seen[key] = obj
            words = _words(obj, before)
        for word in words:
            self.note(now, f"{obj['kind']} {obj['metadata']['name']} {word}")
        counts = self._count()
        if counts != self._counts:
            self._counts = counts
            self.note(now, Counts(now, *counts).text)

    def said(self, now: float, event: Object) -> None:
        """An Event was written; most are not worth a line."""
        if event.get("reason") in _TOLD:
            about = event["involvedObject"]
            self.note(now, f"{about['kind']} {about['name']}: {event['reason']}, {event['message']}")

    def note(self, now: float, text: str) -> None:
        """A line of its own."""
        self._entries.append((now, text))

    def _count(self) -> tuple[int, int, int, int]:
        of_kind: dict[str, list[Object]] = {"Deployment": [], "Pod": [], "Node": [], "NodeClaim": []}
        for (kind, _), obj in self._seen.items():
            of_kind[kind].append(obj)
        wanted = sum(deployment["spec"].get("replicas", 1) for deployment in of_kind["Deployment"])
        ready = sum(is_ready(pod) for pod in of_kind["Pod"])
        return wanted, ready, len(of_kind["Node"]), len(of_kind["NodeClaim"])


def is_ready(pod: Object) -> bool:
    """Whether a pod takes requests: Ready, and not told to end."""
    return _is_true(pod, "Ready") and not _is_ending(pod)


def _words(obj: Object, before: Object | None) -> list[str]:
    """What a change of an object means."""
    kind = obj["kind"]
    words = ["created"] if before is None and kind != "Deployment" else []
    for condition, word in _STEPS.get(kind, ()):
        was, holds = before is not None and _is_true(before, condition), _is_true(obj, condition)
        if was != holds:
            words.append(word if holds else f"not {word}")
    if _runs(obj) and not (before is not None and _runs(before)):
        words.insert(words.index("ready") if "ready" in words else len(words), "started")
    if before is not None and _is_ending(obj) and not _is_ending(before):
        words.append("terminating")
    return words


def _is_true(obj: Object, kind: str) -> bool:
    conditions = (obj.get("status") or {}).get("conditions") or ()
    return any(item["type"] == kind and item["status"] == "True" for item in conditions)


def _is_ending(obj: Object) -> bool:
    return bool(obj["metadata"].get("deletionTimestamp"))


def _runs(obj: Object) -> bool:
    return bool(obj["kind"] == "Pod" and (obj.get("status") or {}).get("phase") == "Running")

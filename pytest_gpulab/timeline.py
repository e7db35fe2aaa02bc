"""A run's timeline: what happened to replicas, nodes and NodeClaims, as text that reads and as numbers that plot.

Whatever target wrote it, the lines below are worded alike, so that figures and plots can be read from them:
``Pod <name> ready``, ``Node <name> created`` and so on for objects, and one line of counts at every change of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, Literal, NamedTuple, get_args

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

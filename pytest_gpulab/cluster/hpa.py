"""The rules of the HorizontalPodAutoscaler (autoscaling/v2) as pure functions.

Facts from kube-controller-manager 1.33, pkg/controller/podautoscaler: ``replica_calculator.go`` for what a metric
asks for, ``horizontal.go`` for how far and how fast that is followed. Times are seconds of the cluster's clock;
metric values are thousandths (milli), as upstream computes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

SYNC_PERIOD_S: Final = 15.0
"""--horizontal-pod-autoscaler-sync-period."""
TOLERANCE: Final = 0.1
"""--horizontal-pod-autoscaler-tolerance."""
DOWNSCALE_STABILIZATION_S: Final = 300.0
"""--horizontal-pod-autoscaler-downscale-stabilization."""
_LIMIT_FACTOR, _LIMIT_LEAST = 2, 4

Reason = Literal[
    "DesiredWithinRange", "ScaleUpLimit", "ScaleDownLimit", "TooManyReplicas", "TooFewReplicas"
]  # fmt: skip


class NoMetrics(Exception):
    """The metric gives no recommendation: replicas stay as they are."""


# --- what a metric asks for -----------------------------------------------------------------------------


@dataclass(frozen=True)
class PodState:
    """What the calculator looks at in a pod. Readiness is not among it: only CPU metrics look at that."""

    name: str
    phase: str = "Running"
    deleted: bool = False
    """Whether it has a deletion timestamp."""


@dataclass(frozen=True)
class Tolerance:
    """How far usage may be from the target before anything changes."""

    up: float = TOLERANCE
    down: float = TOLERANCE

    def covers(self, ratio: float) -> bool:
        """Whether a usage ratio changes nothing."""
        return 1.0 - self.down <= ratio <= 1.0 + self.up


@dataclass(frozen=True)
class Proposal:
    """What one metric recommends, and the usage per pod that it is based on."""

    replicas: int
    usage_milli: int


@dataclass(frozen=True)
class _Groups:
    ready: int
    unready: frozenset[str]
    missing: frozenset[str]
    ignored: frozenset[str]


def _group(pods: Iterable[PodState], samples: Mapping[str, int]) -> _Groups:
    ready = 0
    unready, missing, ignored = set(), set(), set()
    for pod in pods:
        if pod.deleted or pod.phase == "Failed":
            ignored.add(pod.name)
        elif pod.phase == "Pending":
            unready.add(pod.name)
        elif pod.name not in samples:
            missing.add(pod.name)
        else:
            ready += 1
    return _Groups(ready, frozenset(unready), frozenset(missing), frozenset(ignored))


def _usage(samples: Mapping[str, int]) -> int:
    return sum(samples.values()) // len(samples)


def pods_metric_replicas(
    current: int,
    pods: Iterable[PodState],
    samples: Mapping[str, int],
    target_milli: int,
    tolerance: Tolerance = Tolerance(),
) -> Proposal:
    """Replicas for a Pods metric with an AverageValue target (``calcPlainMetricReplicas``).

    Args:
        current: replicas the scale target has now.
        samples: milli values by pod; pods without one are missing.

    Raises:
        NoMetrics: there is no pod, or no counted pod has a sample.
    """
    pods = list(pods)
    if not pods:
        raise NoMetrics("no pods returned by selector while calculating replica count")
    groups = _group(pods, samples)
    counted = {name: v for name, v in samples.items() if name not in groups.ignored | groups.unready}
    if not counted:
        raise NoMetrics("did not receive metrics for targeted pods (pods might be unready)")
    usage = _usage(counted)
    ratio = usage / target_milli
    up_with_unready = bool(groups.unready) and ratio > 1.0
    if not up_with_unready and not groups.missing:
        replicas = current if tolerance.covers(ratio) else math.ceil(ratio * groups.ready)
        return Proposal(replicas, usage)
    return Proposal(_cautious(current, groups, counted, target_milli, ratio, tolerance), usage)


def _cautious(
    current: int,
    groups: _Groups,
    counted: dict[str, int],
    target_milli: int,
    ratio: float,
    tolerance: Tolerance,
) -> int:
    """Pods without a sample count against the change, which may then no longer be worth it."""
    if ratio != 1.0:
        counted.update(dict.fromkeys(groups.missing, target_milli if ratio < 1.0 else 0))
    if ratio > 1.0:
        counted.update(dict.fromkeys(groups.unready, 0))
    new_ratio = _usage(counted) / target_milli
    if tolerance.covers(new_ratio) or (ratio < 1.0 < new_ratio) or (new_ratio < 1.0 < ratio):
        return current
    replicas = math.ceil(new_ratio * len(counted))
    if (new_ratio < 1.0 and replicas > current) or (new_ratio > 1.0 and replicas < current):
        return current
    return replicas


# --- how far and how fast that is followed ----------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """At most `value` pods, or percent of the replicas at its start, in `period_s`."""

    type: Literal["Pods", "Percent"]
    value: int
    period_s: float


@dataclass(frozen=True)
class ScalingRules:
    """One direction of ``spec.behavior``."""

    policies: tuple[Policy, ...]
    window_s: float
    select: Literal["Max", "Min", "Disabled"] = "Max"


UP_DEFAULT: Final = ScalingRules((Policy("Pods", 4, 15), Policy("Percent", 100, 15)), 0.0)
DOWN_DEFAULT: Final = ScalingRules((Policy("Percent", 100, 15),), DOWNSCALE_STABILIZATION_S)


@dataclass(frozen=True)
class Behavior:
    """``spec.behavior`` with the API's defaults filled in."""

    up: ScalingRules = UP_DEFAULT
    down: ScalingRules = DOWN_DEFAULT
    tolerance: Tolerance = Tolerance()


def behavior_of(spec: Mapping[str, Any]) -> Behavior | None:
    """An HPA's ``spec.behavior``; None when it is not set, which follows older rules."""
    given = spec.get("behavior")
    if not given:
        return None
    up, down = given.get("scaleUp") or {}, given.get("scaleDown") or {}
    tolerance = Tolerance(float(up.get("tolerance", TOLERANCE)), float(down.get("tolerance", TOLERANCE)))
    return Behavior(_rules_of(up, UP_DEFAULT), _rules_of(down, DOWN_DEFAULT), tolerance)


def _rules_of(given: Mapping[str, Any], default: ScalingRules) -> ScalingRules:
    policies = tuple(Policy(p["type"], p["value"], p["periodSeconds"]) for p in given.get("policies") or ())
    window_s = given.get("stabilizationWindowSeconds")
    return ScalingRules(
        policies or default.policies,
        default.window_s if window_s is None else float(window_s),
        given.get("selectPolicy") or "Max",
    )


@dataclass
class History:
    """What the controller remembers of one HPA: (time, replicas), (time, how many). Lost when it restarts."""

    recommendations: list[tuple[float, int]] = field(default_factory=list)
    added: list[tuple[float, int]] = field(default_factory=list)
    deleted: list[tuple[float, int]] = field(default_factory=list)

    def start(self, now: float, current: int) -> None:
        """The first recommendation is what is there, so that a new HPA does not scale down at once."""
        if not self.recommendations:
            self.recommendations.append((now, current))

    def scaled(self, now: float, before: int, after: int) -> None:
        """The scale target was changed."""
        if after > before:
            self.added.append((now, after - before))
        elif after < before:
            self.deleted.append((now, before - after))

    def forget(self, before: float) -> None:
        """Drop what no rule looks at any more."""
        for name in ("recommendations", "added", "deleted"):
            setattr(self, name, [entry for entry in getattr(self, name) if entry[0] > before])


def stabilize(desired: int, current: int, history: History, behavior: Behavior, now: float) -> int:
    """The recommendation nearest to `current` within the windows of both directions; `desired` is remembered.

    (``stabilizeRecommendationWithBehaviors``.)
    """
    highest_low = min([desired, *_since(history.recommendations, now - behavior.up.window_s)])
    lowest_high = max([desired, *_since(history.recommendations, now - behavior.down.window_s)])
    history.recommendations.append((now, desired))
    return min(max(current, highest_low), lowest_high)


def _since(entries: list[tuple[float, int]], cutoff: float) -> list[int]:
    return [value for at, value in entries if at > cutoff]


def scale_up_limit(current: int, history: History, rules: ScalingRules, now: float) -> int:
    """The most replicas that the policies allow now; a percentage is rounded up."""

    def proposed(policy: Policy, base: int) -> int:
        return base + policy.value if policy.type == "Pods" else math.ceil(base * (1 + policy.value / 100))

    return _limit(current, history, rules, now, proposed, max if rules.select == "Max" else min)


def scale_down_limit(current: int, history: History, rules: ScalingRules, now: float) -> int:
    """The fewest replicas that the policies allow now; a percentage is truncated."""

    def proposed(policy: Policy, base: int) -> int:
        return base - policy.value if policy.type == "Pods" else int(base * (1 - policy.value / 100))

    return _limit(current, history, rules, now, proposed, min if rules.select == "Max" else max)


def _limit(
    current: int,
    history: History,
    rules: ScalingRules,
    now: float,
    proposed: Callable[[Policy, int], int],
    select: Callable[[Iterable[int]], int],
) -> int:
    """Each policy counts from the replicas at the start of its period."""
    if rules.select == "Disabled":
        return current
    limits = []
    for policy in rules.policies:
        cutoff = now - policy.period_s
        base = current - sum(_since(history.added, cutoff)) + sum(_since(history.deleted, cutoff))
        limits.append(proposed(policy, base))
    return select(limits)


def limit_rate(
    desired: int, current: int, bounds: tuple[int, int], history: History, behavior: Behavior, now: float
) -> tuple[int, Reason]:
    """`desired` within `bounds` (min, max replicas) and the policies (``convertDesiredReplicasWithBehaviorRate``)."""
    least, most = bounds
    if desired > current:
        limit = max(scale_up_limit(current, history, behavior.up, now), current)
        allowed, up_reason = (limit, "ScaleUpLimit") if most > limit else (most, "TooManyReplicas")
        if desired > allowed:
            return allowed, up_reason  # type: ignore[return-value]
    elif desired < current:
        limit = min(scale_down_limit(current, history, behavior.down, now), current)
        allowed, down_reason = (limit, "ScaleDownLimit") if least < limit else (least, "TooFewReplicas")
        if desired < allowed:
            return allowed, down_reason  # type: ignore[return-value]
    return desired, "DesiredWithinRange"


def follow(
    desired: int, current: int, bounds: tuple[int, int], history: History, behavior: Behavior | None, now: float
) -> tuple[int, Reason]:
    """The replicas to set for a metric's recommendation, and why not the recommendation itself."""
    if behavior is not None:
        stable = stabilize(desired, current, history, behavior, now)
        return limit_rate(stable, current, bounds, history, behavior, now)
    recent = _since(history.recommendations, now - DOWNSCALE_STABILIZATION_S)
    history.recommendations.append((now, desired))
    return _within_plain_bounds(max([desired, *recent]), current, bounds)


def _within_plain_bounds(desired: int, current: int, bounds: tuple[int, int]) -> tuple[int, Reason]:
    """Without ``spec.behavior``: at most twice the replicas, or 4 (``convertDesiredReplicasWithRules``)."""
    least, most = bounds
    limit = max(_LIMIT_FACTOR * current, _LIMIT_LEAST)
    if desired < least:
        return least, "TooFewReplicas"
    if most > limit and desired > limit:
        return limit, "ScaleUpLimit"
    if desired > most:
        return most, "TooManyReplicas"
    return desired, "DesiredWithinRange"


def longest_memory(behavior: Behavior | None) -> float:
    """Seconds after which no rule looks back any more."""
    if behavior is None:
        return DOWNSCALE_STABILIZATION_S
    periods = [policy.period_s for rules in (behavior.up, behavior.down) for policy in rules.policies]
    return max(behavior.up.window_s, behavior.down.window_s, *periods)

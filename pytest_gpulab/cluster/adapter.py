"""prometheus-adapter: the rules in its ConfigMap say which custom metrics there are, and how they are computed.

Rules are read in the form of `manifests/prometheus-adapter.yaml`: sums of ``max_over_time`` by pod.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import yaml

from pytest_gpulab.cluster.clock import Clock
from pytest_gpulab.cluster.events import DELETED, Event
from pytest_gpulab.cluster.objects import Object
from pytest_gpulab.cluster.quantity import duration
from pytest_gpulab.cluster.recorder import Recorder
from pytest_gpulab.cluster.resources import CONFIG_MAP
from pytest_gpulab.cluster.store import Store
from pytest_gpulab.render import metric_rules

NAME: Final = "prometheus-adapter"
"""What the ConfigMap's label `app.kubernetes.io/name` says."""
_TERM: Final = re.compile(
    r"(?:max|sum) by \(<<\.GroupBy>>\) "
    r"\(max_over_time\((?P<series>[\w:]+|<<\.Series>>)\{<<\.LabelMatchers>>\}\[(?P<window>\w+)\]\)\)"
)


@dataclass(frozen=True)
class AdapterRule:
    """A custom metric of a pod: each series' maximum over the window, summed. A pod has one series of a name."""

    name: str
    series: tuple[str, ...]
    window_s: float

    def value(self, samples: Mapping[str, list[float]]) -> float | None:
        """From the samples in the window, by series; None, as PromQL's ``+``, unless all of them have some."""
        if not all(samples.get(name) for name in self.series):
            return None
        return sum(max(samples[name]) for name in self.series)


@lru_cache(maxsize=8)
def read_rules(config: str) -> tuple[AdapterRule, ...]:
    """The rules of the adapter's ``config.yaml``.

    Raises:
        ValueError: it is no such file, or has a query that is not understood here.
    """
    try:
        return tuple(_read_rule(rule) for rule in yaml.safe_load(config)["rules"])
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"config.yaml must be prometheus-adapter's, with a list of rules, got {error!r}") from error


def _read_rule(rule: dict[str, Any]) -> AdapterRule:
    name, own = rule["name"]["as"], rule["seriesQuery"].partition("{")[0]
    query = " ".join(rule["metricsQuery"].split())
    terms = [_TERM.fullmatch(term) for term in query.split(" + ")]
    windows = {term["window"] for term in terms if term}
    if None in terms or len(windows) != 1:
        raise ValueError(
            f"the embedded cluster reads sums of `max by (<<.GroupBy>>) "
            f"(max_over_time(SERIES{{<<.LabelMatchers>>}}[1m]))` with one window, got for {name}: {query}"
        )
    series = tuple(term["series"].replace("<<.Series>>", own) for term in terms if term)
    window_s = duration(windows.pop())
    assert window_s is not None
    return AdapterRule(name, series, window_s)


def shipped_rules() -> tuple[AdapterRule, ...]:
    """Those of the lab's own manifest."""
    (config_map,) = metric_rules(run="")
    return read_rules(config_map["data"]["config.yaml"])


class Adapter:
    """The rules that are in force: those of the ConfigMap in the store, `rules` until there is one."""

    def __init__(self, store: Store, clock: Clock, rules: tuple[AdapterRule, ...] = ()) -> None:
        self._events = Recorder(store, clock, NAME)
        self.rules = {rule.name: rule for rule in rules}
        store.subscribe(self._on_change, CONFIG_MAP)

    def _on_change(self, event: Event) -> None:
        labels = event.object["metadata"].get("labels") or {}
        if labels.get("app.kubernetes.io/name") != NAME:
            return
        self.rules = {}
        if event.type != DELETED:
            self._load(event.object)

    def _load(self, config_map: Object) -> None:
        try:
            found = read_rules((config_map.get("data") or {}).get("config.yaml", ""))
        except ValueError as error:
            self._events.warning(config_map, "InvalidRules", str(error))
            return
        self.rules = {rule.name: rule for rule in found}

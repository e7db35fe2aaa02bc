"""The rules that the embedded adapter reads from its ConfigMap."""

from __future__ import annotations

import pytest
import yaml

from pytest_gpulab.cluster.adapter import NAME, Adapter, AdapterRule, read_rules
from pytest_gpulab.cluster.clock import VirtualClock
from pytest_gpulab.cluster.objects import merged
from pytest_gpulab.cluster.resources import CONFIG_MAP, EVENT
from pytest_gpulab.cluster.store import Store
from pytest_gpulab.render import metric_rules

RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
PEAK = "max by (<<.GroupBy>>) (max_over_time(<<.Series>>{<<.LabelMatchers>>}[1m]))"


def config(query: str = PEAK, name: str = "m") -> str:
    rule = {"seriesQuery": 's:t{pod!=""}', "name": {"as": name}, "metricsQuery": query}
    return yaml.safe_dump({"rules": [rule]})


def config_map(text: str):
    meta = {"name": "rules", "namespace": "default", "labels": {"app.kubernetes.io/name": NAME}}
    return {"metadata": meta, "data": {"config.yaml": text}}


def test_the_manifest_has_the_rule_of_each_policy():
    (shipped,) = metric_rules(run="r")
    assert read_rules(shipped["data"]["config.yaml"]) == (
        AdapterRule("vllm_requests_running", (RUNNING,), 60.0),
        AdapterRule("vllm_requests_active", (RUNNING, WAITING), 60.0),
    )


@pytest.mark.parametrize(
    ("series", "samples", "expected"),
    [
        ((RUNNING,), {RUNNING: [3.0, 9.0, 1.0], WAITING: [50.0]}, 9.0),
        ((RUNNING, WAITING), {RUNNING: [3.0, 9.0, 1.0], WAITING: [0.0, 5.0, 2.0]}, 14.0),
        ((RUNNING, WAITING), {RUNNING: [3.0]}, None),
        ((RUNNING,), {WAITING: [5.0]}, None),
        ((RUNNING,), {}, None),
    ],
)
def test_a_rule_adds_the_peaks_of_its_series(series, samples, expected):
    assert AdapterRule("m", series, 60.0).value(samples) == expected


@pytest.mark.parametrize(("window", "seconds"), [("1m", 60.0), ("90s", 90.0), ("1m30s", 90.0)])
def test_windows_are_go_durations(window, seconds):
    assert read_rules(config(PEAK.replace("1m", window)))[0].window_s == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a list",
        "rules: {",
        "rules: [{}]",
        config("avg by (<<.GroupBy>>) (max_over_time(<<.Series>>{<<.LabelMatchers>>}[1m]))"),
        config("sum(rate(<<.Series>>{<<.LabelMatchers>>}[1m])) by (<<.GroupBy>>)"),
        config(f"{PEAK} + {PEAK.replace('1m', '2m')}"),
        config(PEAK.replace("1m", "soon")),
    ],
)
def test_what_is_no_rule_is_refused(text):
    with pytest.raises(ValueError, match=r"prometheus-adapter|embedded cluster reads|a duration is"):
        read_rules(text)


def test_the_config_map_in_the_store_is_in_force():
    clock = VirtualClock()
    store = Store(clock)
    adapter = Adapter(store, clock)
    store.create(
        CONFIG_MAP, merged(config_map(config()), {"metadata": {"labels": {"app.kubernetes.io/name": "other"}}})
    )
    store.delete(CONFIG_MAP, "rules", "default")
    assert adapter.rules == {}
    store.create(CONFIG_MAP, config_map(config()))
    assert adapter.rules == {"m": AdapterRule("m", ("s:t",), 60.0)}
    store.patch(CONFIG_MAP, "rules", "default", {"data": {"config.yaml": config(name="n")}})
    assert list(adapter.rules) == ["n"]
    store.patch(CONFIG_MAP, "rules", "default", {"data": {"config.yaml": "nothing"}})
    assert adapter.rules == {}
    (event,) = store.list(EVENT)
    assert (event["reason"], event["involvedObject"]["name"]) == ("InvalidRules", "rules")
    store.patch(CONFIG_MAP, "rules", "default", {"data": {"config.yaml": config()}})
    assert list(adapter.rules) == ["m"]
    store.delete(CONFIG_MAP, "rules", "default")
    assert adapter.rules == {}

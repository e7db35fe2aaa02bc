"""Prometheus: what is scraped, and what becomes of it."""

from __future__ import annotations

from pytest_gpulab.cluster.clock import VirtualClock
from pytest_gpulab.cluster.metrics import RUNNING, WAITING, Prometheus
from pytest_gpulab.cluster.resources import CONFIG_MAP, POD
from pytest_gpulab.cluster.store import Store
from pytest_gpulab.render import metric_rules


def scraped(read):
    clock = VirtualClock()
    store = Store(clock)
    container = {"name": "vllm", "image": "vllm"}
    pod = store.create(POD, {"metadata": {"name": "a"}, "spec": {"containers": [container]}}, "default")
    prometheus = Prometheus(store, clock, lambda _: read(clock.now() - start))
    (rules,) = metric_rules(run="test")
    store.create(CONFIG_MAP, {**rules, "metadata": {**rules["metadata"], "namespace": "default"}})
    start = clock.now()
    prometheus.start()
    return clock, store, prometheus, pod, start


def test_pods_are_scraped_every_15_seconds_and_the_peak_of_a_minute_counts():
    clock, store, prometheus, pod, start = scraped(lambda now: {RUNNING: 7.0 if now == 30 else 2.0, WAITING: 1.0})
    store.patch_status(POD, "a", "default", {"phase": "Running"})
    clock.run_until(start + 14.9)
    assert prometheus.values([pod], "vllm_requests_running") == {}
    clock.run_until(start + 15)
    assert prometheus.values([pod], "vllm_requests_running") == {"a": 2000}
    clock.run_until(start + 89.9)
    assert prometheus.values([pod], "vllm_requests_running") == {"a": 7000}
    assert prometheus.values([pod], "vllm_requests_active") == {"a": 8000}
    clock.run_until(start + 90)
    assert prometheus.values([pod], "vllm_requests_running") == {"a": 2000}


def test_pods_that_do_not_run_or_answer_have_no_sample():
    clock, store, prometheus, pod, start = scraped(lambda now: {RUNNING: 1.0} if now > 40 else None)
    clock.run_until(start + 60)
    assert prometheus.values([pod], "vllm_requests_running") == {}
    store.patch_status(POD, "a", "default", {"phase": "Running"})
    clock.run_until(start + 75)
    assert prometheus.values([pod], "vllm_requests_running") == {"a": 1000}
    assert prometheus.values([pod], "unknown") == {}
    listed = prometheus.metric_list([pod], "vllm_requests_running")["items"]
    assert [(item["describedObject"]["name"], item["value"]) for item in listed] == [("a", "1000m")]

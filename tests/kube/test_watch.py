"""Watches: every change is heard, also when the stream or the server stumbles."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from pytest_gpulab.kube import watch as watching
from pytest_gpulab.kube.client import Kube, connect
from pytest_gpulab.kube.objects import Object, Ref
from pytest_gpulab.kube.watch import watch
from tests.kube.project import until
from tests.kube.running import Running, running, trouble


def config_map(name: str, value: str) -> Object:
    meta = {"name": name, "namespace": "default", "labels": {"heard": "yes"}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"k": value}}


@pytest.fixture
def over() -> Iterator[threading.Event]:
    over = threading.Event()
    yield over
    over.set()


class Ear:
    """What was heard of ConfigMaps: (name, value), value None when gone."""

    def __init__(self, kube: Kube, over: threading.Event) -> None:
        self.heard: list[tuple[str, str | None]] = []
        watch(kube, over, "v1", "ConfigMap", self._take, namespace="default", labels="heard=yes")

    def _take(self, obj: Object, gone: bool) -> None:
        self.heard.append((obj["metadata"]["name"], None if gone else obj["data"]["k"]))


def test_what_is_there_and_what_changes_is_heard(cluster: Running, tmp_path: Path, over: threading.Event) -> None:
    with connect(cluster.kubeconfig, tmp_path) as kube:
        kube.apply(config_map("a", "1"))
        kube.apply({**config_map("b", "1"), "metadata": {"name": "b", "namespace": "default"}})
        ear = Ear(kube, over)
        assert ear.heard == [("a", "1")], "at once, and nothing that is not selected"
        kube.apply(config_map("a", "2"))
        kube.apply(config_map("c", "1"))
        kube.delete(Ref("v1", "ConfigMap", "a", "default"))
        assert until(lambda: ("a", None) in ear.heard)
        assert ear.heard == [("a", "1"), ("a", "2"), ("c", "1"), ("a", None)]
        over.set()
        kube.apply(config_map("c", "2"))
        assert ("c", "2") not in ear.heard


def test_a_stream_that_breaks_off_loses_nothing(
    tmp_path: Path, over: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every watch is refused, and every fourth call dropped: lists alone tell what has changed."""
    monkeypatch.setattr(watching, "_PAUSE_S", 0.05)

    def choose(request: web.Request, number: int) -> int | None:
        if "watch" in request.query:
            return 410 if number % 2 else 0
        return 0 if number % 4 == 0 else None

    trouble(monkeypatch, choose)
    with running(tmp_path) as cluster, connect(cluster.kubeconfig, tmp_path) as kube:
        ear = Ear(kube, over)
        for value in ("1", "2"):
            kube.apply(config_map("a", value))
            assert until(lambda value=value: ("a", value) in ear.heard)
        kube.delete(Ref("v1", "ConfigMap", "a", "default"))
        assert until(lambda: ("a", None) in ear.heard)
        assert ear.heard == [("a", "1"), ("a", "2"), ("a", None)], "each once"

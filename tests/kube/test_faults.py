"""Whatever goes wrong on the way up: an error that says what, within its deadline, then zero machines."""

from __future__ import annotations

import json
import ssl
import time
import urllib.request
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.fleet import FROM_ZERO, NO_FAULTS, Faults, Shortage
from pytest_gpulab.kube import client, serving
from pytest_gpulab.kube.client import KubeError, NoAnswer
from pytest_gpulab.kube.ledger import Ledger
from pytest_gpulab.kube.pool import Pool, bring_up, use_cluster
from pytest_gpulab.kube.process import Process
from pytest_gpulab.kube.serving import NoCapacity, serve
from pytest_gpulab.kube.teardown import tear_down
from pytest_gpulab.kube.wait import WaitFailed
from pytest_gpulab.render import documents, pool_objects, serving_objects
from tests.kube.conftest import PROFILE
from tests.kube.running import SPEED, Running, running, trouble

RaisePool = Callable[[Running], Pool]
(IMAGE,) = [
    container["image"]
    for obj in documents("vllm")
    if obj["kind"] == "Deployment"
    for container in obj["spec"]["template"]["spec"]["containers"]
]


def serve_profile(pool: Pool) -> Endpoint:
    objects = serving_objects(PROFILE, FROM_ZERO, run=pool.run, api_key=pool.api_key)
    return serve(pool, objects, PROFILE.model)


def fails(pool: Pool, kind: type[WaitFailed] = WaitFailed) -> tuple[str, float]:
    """What serving says, and how many cluster seconds it took to say it."""
    start = time.monotonic()
    with pytest.raises(WaitFailed) as failure:
        serve_profile(pool)
    assert failure.type is kind
    return str(failure.value), (time.monotonic() - start) * SPEED


def metrics_of(endpoint: Endpoint, cluster: Running) -> str:
    """What the first server says of itself, through the API server."""
    authority = json.loads(cluster.kubeconfig.read_text())["clusters"][0]["cluster"]["certificate-authority-data"]
    context = ssl.create_default_context(cadata=b64decode(authority).decode())
    request = urllib.request.Request(endpoint.metrics_urls[0], headers=dict(endpoint.metrics_headers()))
    with urllib.request.urlopen(request, context=context, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def ends_at_zero(cluster: Running, pool: Pool) -> None:
    """Teardown leaves nothing, seen from behind the API."""
    assert tear_down(pool.ledger).problems == []
    assert cluster.labelled(pool.run) == []
    assert cluster.capacity() == cluster.machines() == []
    assert not pool.ledger.path.exists() and not pool.ledger.folder.exists()


def test_nothing_goes_wrong(raised: RaisePool, cluster: Running) -> None:
    pool = raised(cluster)
    endpoint = serve_profile(pool)
    assert (endpoint.model, endpoint.api_key) == (PROFILE.model, pool.api_key)
    assert cluster.launched() == 1
    assert "vllm:num_requests_running" in metrics_of(endpoint, cluster)
    assert serve_profile(pool) == endpoint, "equal profiles share one deployment"
    assert cluster.launched() == 1
    ends_at_zero(cluster, pool)


@pytest.mark.slow
def test_a_fleet_that_starts_warm(raised: RaisePool, cluster: Running) -> None:
    pool = raised(cluster)
    fleet = FROM_ZERO.model_copy(update={"warm": 2})
    objects = serving_objects(PROFILE, fleet, run=pool.run, api_key=pool.api_key)
    endpoint = serve(pool, objects, PROFILE.model, replicas=fleet.deployed)
    assert len(endpoint.metrics_urls) == 2
    assert cluster.launched() == 2
    ends_at_zero(cluster, pool)


@pytest.mark.slow
def test_a_gpu_that_never_registers(raised: RaisePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "NODE_S", 300.0)
    with running(tmp_path, faults=Faults(never_allocatable=True)) as cluster:
        pool = raised(cluster)
        said, took_s = fails(pool)
        assert "waited for a GPU node that takes the pod: not within 300 s" in said
        assert "NodeClaim gpu-spot-" in said and 'Resource "nvidia.com/gpu" was requested but not registered' in said
        assert "Registered: Node ip-10-0-0-" in said, "the last events"
        assert took_s < 400
        ends_at_zero(cluster, pool)


@pytest.mark.slow
def test_a_machine_that_never_joins(raised: RaisePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "NODE_S", 300.0)
    with running(tmp_path, faults=Faults(never_register=True)) as cluster:
        pool = raised(cluster)
        said, _ = fails(pool)
        assert "Registered=Unknown" in said and "Launched g4dn.xlarge/" in said
        ends_at_zero(cluster, pool)


def test_an_image_that_does_not_exist(raised: RaisePool, tmp_path: Path) -> None:
    with running(tmp_path, faults=Faults(bad_images=(IMAGE,))) as cluster:
        pool = raised(cluster)
        said, took_s = fails(pool)
        assert "is in ImagePullBackOff" in said and "Back-off pulling image" in said
        assert took_s < 600, "no need to wait for the deadline"
        ends_at_zero(cluster, pool)


@pytest.mark.slow
def test_a_container_that_dies(raised: RaisePool, tmp_path: Path) -> None:
    with running(tmp_path, faults=Faults(crash_after_s=20.0)) as cluster:
        pool = raised(cluster)
        said, took_s = fails(pool)
        assert "is in CrashLoopBackOff" in said and "Back-off restarting failed container" in said
        assert took_s < 1000
        ends_at_zero(cluster, pool)


def test_no_capacity_anywhere(raised: RaisePool, tmp_path: Path) -> None:
    with running(tmp_path, faults=Faults(shortages=(Shortage(),))) as cluster:
        pool = raised(cluster)
        said, took_s = fails(pool, NoCapacity)
        assert "insufficient capacity in every NodePool (gpu-on-demand, gpu-spot)" in said
        assert took_s < 300
        ends_at_zero(cluster, pool)


@pytest.mark.slow
def test_a_shortage_that_is_over(raised: RaisePool, tmp_path: Path) -> None:
    """Events outlive what they say: a second attempt does not fail for the first one's reasons."""
    with running(tmp_path, faults=Faults(shortages=(Shortage(),))) as cluster:
        pool = raised(cluster)
        assert "insufficient capacity" in fails(pool, NoCapacity)[0]
        cluster.live.embedded.cloud.faults = NO_FAULTS
        serve_profile(pool)
        ends_at_zero(cluster, pool)


@pytest.mark.slow
def test_no_spot_capacity_is_no_failure(raised: RaisePool, tmp_path: Path) -> None:
    with running(tmp_path, faults=Faults(shortages=(Shortage(capacity_type="spot"),))) as cluster:
        pool = raised(cluster)
        serve_profile(pool)
        ends_at_zero(cluster, pool)


@pytest.mark.slow
@pytest.mark.parametrize("status", [0, 429, 500, 503], ids=["dropped connections", "429", "500", "503"])
def test_an_api_server_that_stumbles(
    raised: RaisePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    trouble(monkeypatch, lambda request, number: status if number % 4 == 0 else None)
    with running(tmp_path) as cluster:
        pool = raised(cluster)
        serve_profile(pool)
        ends_at_zero(cluster, pool)


@pytest.mark.slow
def test_an_api_server_that_stays_down_while_serving(
    raised: RaisePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait ends with the server's own words; the teardown works once the server does."""
    down: list[int] = []
    trouble(monkeypatch, lambda request, number: 500 if down else None)
    monkeypatch.setattr(serving, "_wait_for_node", lambda kube, run, pods, old: (down.append(1), pods()))
    with running(tmp_path) as cluster:
        pool = raised(cluster)
        pool.kube._retry_s = 1.0
        with pytest.raises(NoAnswer, match="list Pod: no answer from the API server within 1 s: 500 injected 500"):
            serve_profile(pool)
        down.clear()
        ends_at_zero(cluster, pool)


def test_a_teardown_without_an_api_server_keeps_the_ledger(
    raised: RaisePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    down: list[int] = []
    trouble(monkeypatch, lambda request, number: 500 if down else None)
    with running(tmp_path) as cluster:
        pool = raised(cluster)
        down.append(1)
        monkeypatch.setattr("pytest_gpulab.kube.teardown.connect", _impatient)
        ended = tear_down(pool.ledger)
        assert len(ended.problems) == 1 and "no answer from the API server" in ended.problems[0]
        assert pool.ledger.path.exists()
        down.clear()
        ends_at_zero(cluster, pool)


def _impatient(*arguments: object, **options: object) -> client.Kube:
    return client.connect(*arguments, **{**options, "retry_s": 1.0})  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_cluster_in_use_is_left_alone(raised: RaisePool, cluster: Running, tmp_path: Path) -> None:
    """A second run neither takes over nor removes what the first has put there."""
    pool = raised(cluster)
    before = cluster.labelled(pool.run)
    second = Ledger.create(tmp_path / "second.jsonl", Process(1, 0.0))
    kube = use_cluster(second, cluster.kubeconfig, speed=SPEED)
    with pytest.raises(KubeError, match=f"belongs to run {pool.run}"):
        bring_up(second, kube, pool_objects(FROM_ZERO, ["g4dn.xlarge"], run=second.run))
    assert tear_down(second).problems == []
    assert cluster.labelled(pool.run) == before and cluster.labelled(second.run) == []
    serve_profile(pool)
    third = Ledger.create(tmp_path / "third.jsonl", Process(1, 0.0))
    with pytest.raises(KubeError, match="there must be no GPU node, got NodeClaim gpu-spot-"):
        bring_up(third, use_cluster(third, cluster.kubeconfig), [])
    ends_at_zero(cluster, pool)

"""The pool between processes, and what serving refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from pytest_gpulab.fleet import FROM_ZERO
from pytest_gpulab.kube.apply import apply
from pytest_gpulab.kube.client import KubeError
from pytest_gpulab.kube.ledger import Ledger
from pytest_gpulab.kube.nodes import gpu_capacity
from pytest_gpulab.kube.pool import Pool, join
from pytest_gpulab.kube.serving import _address, _scheme, serve, withdraw
from pytest_gpulab.kube.teardown import tear_down
from pytest_gpulab.render import PublicAccess, documents, pool_objects, serving_name, serving_objects
from tests.kube.conftest import PROFILE
from tests.kube.running import Running


def test_a_pool_is_joined_once_it_is_complete(
    raised: Callable[[Running], Pool], cluster: Running, ledger: Ledger
) -> None:
    with pytest.raises(KubeError, match="did not come up"):
        join(ledger)
    pool = raised(cluster)
    other = join(Ledger(ledger.path))
    assert (other.run, other.api_key) == (pool.run, pool.api_key)
    assert other.kube.speed == pool.kube.speed
    assert gpu_capacity(other.kube) == []


@pytest.mark.slow
def test_withdrawing_one_serving_leaves_the_pool(raised: Callable[[Running], Pool], cluster: Running) -> None:
    pool = raised(cluster)
    objects = serving_objects(PROFILE, FROM_ZERO, run=pool.run, api_key=pool.api_key)
    serve(pool, objects, PROFILE.model)
    assert cluster.machines()
    withdraw(pool, serving_name(PROFILE))
    assert cluster.machines() == cluster.capacity() == []
    kinds = [name.partition(" ")[0] for name in cluster.labelled(pool.run)]
    assert "NodePool" in kinds and "Ingress" not in kinds and "Secret" not in kinds
    assert serve(pool, objects, PROFILE.model).model == PROFILE.model, "and once more"


def test_a_run_that_was_torn_down_creates_nothing_more(raised: Callable[[Running], Pool], cluster: Running) -> None:
    """A worker may outlive its session by seconds, and must not leave what nobody knows of."""
    pool = raised(cluster)
    tear_down(pool.ledger)
    with pytest.raises(FileNotFoundError):
        apply(pool.kube, pool.ledger, serving_objects(PROFILE, FROM_ZERO, run=pool.run, api_key="k" * 32))
    assert cluster.labelled() == []


def test_the_api_key_is_in_no_ledger_and_in_no_text(raised: Callable[[Running], Pool], cluster: Running) -> None:
    pool = raised(cluster)
    assert len(pool.api_key) >= 32
    assert pool.api_key not in pool.ledger.path.read_text() and pool.api_key not in repr(pool)


def test_what_cannot_serve_is_refused(raised: Callable[[Running], Pool], cluster: Running) -> None:
    pool = raised(cluster)
    objects = serving_objects(PROFILE, FROM_ZERO, run=pool.run, api_key=pool.api_key)
    with pytest.raises(ValueError, match="must include a Deployment, got Secret"):
        serve(pool, [obj for obj in objects if obj["kind"] != "Deployment"], PROFILE.model)


@pytest.mark.parametrize(
    ("entries", "scheme", "url"),
    [
        ([], "http", ""),
        ([{"hostname": "lb.elb.amazonaws.com"}], "http", "http://lb.elb.amazonaws.com"),
        ([{"hostname": "lb.elb.amazonaws.com"}], "https", "https://lb.elb.amazonaws.com"),
        ([{"ip": "10.0.0.1"}], "http", "http://10.0.0.1"),
        ([{"hostname": "127.0.0.1", "ports": [{"port": 8123}]}], "https", "https://127.0.0.1:8123"),
    ],
)
def test_addresses_of_load_balancers(entries: list[dict[str, Any]], scheme: str, url: str) -> None:
    assert _address({"status": {"loadBalancer": {"ingress": entries}}}, scheme) == url


def test_public_access_is_seen_in_the_cluster(raised: Callable[[Running], Pool], cluster: Running) -> None:
    pool = raised(cluster)
    (ingress,) = (obj for obj in documents("vllm") if obj["kind"] == "Ingress")
    assert _scheme(pool.kube, ingress) == "http"
    public = PublicAccess("arn:aws:acm:us-west-2:123456789012:certificate/a", ("203.0.113.7/32",))
    objects = pool_objects(FROM_ZERO, ["g4dn.xlarge"], run=pool.run, public=public)
    apply(pool.kube, pool.ledger, [obj for obj in objects if obj["kind"] == "IngressClassParams"])
    assert _scheme(pool.kube, ingress) == "https"


def test_an_ingress_that_nobody_has_seen_to() -> None:
    assert _address(None) == _address({}) == ""


def test_the_plugin_loads_none_of_it() -> None:
    heavy = ("kubernetes", "psutil", "filelock", "pytest_gpulab.kube.client")
    code = f"import sys, pytest_gpulab.plugin, pytest_gpulab.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

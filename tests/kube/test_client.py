"""The connection: TLS and token as configured, repeats where the server stumbles, errors that name the call."""

from __future__ import annotations

import json
import ssl
import tempfile
import urllib.request
from base64 import b64decode, b64encode
from pathlib import Path

import pytest
from aiohttp import web

from pytest_gpulab.cluster.api.access import new_certificates
from pytest_gpulab.kube.client import KubeError, NoAnswer, connect
from pytest_gpulab.kube.objects import Object, Ref
from tests.kube.running import Running, running, trouble

CONFIG_MAP = Ref("v1", "ConfigMap", "a", "default")


def config_map(**data: object) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "namespace": "default"}, "data": data}


def changed(kubeconfig: Path, part: str, **values: str) -> Path:
    """The kubeconfig with another user or cluster."""
    config = json.loads(kubeconfig.read_text())
    config[f"{part}s"][0][part] |= values
    other = kubeconfig.with_name("other.kubeconfig")
    other.write_text(json.dumps(config))
    return other


def test_objects_come_and_go(cluster: Running, tmp_path: Path) -> None:
    with connect(cluster.kubeconfig, tmp_path) as kube:
        assert kube.get(CONFIG_MAP) is None
        kube.apply(config_map(k="1"))
        kube.apply(config_map(k="2"))
        assert kube.get(CONFIG_MAP)["data"] == {"k": "2"}
        assert [Ref.of(obj) for obj in kube.list("v1", "ConfigMap", "default")] == [CONFIG_MAP]
        assert kube.list("v1", "ConfigMap", labels="none=such") == []
        kube.delete(CONFIG_MAP)
        kube.delete(CONFIG_MAP)
        assert kube.get(CONFIG_MAP) is None


def test_refusals_name_the_call_and_the_reason(cluster: Running, tmp_path: Path) -> None:
    with connect(cluster.kubeconfig, tmp_path) as kube:
        with pytest.raises(KubeError, match=r"^apply ConfigMap default/a: refused with 400: .*data"):
            kube.apply(config_map(k=1))
        with pytest.raises(KubeError, match="must serve kind Nothing of v1, but does not"):
            kube.list("v1", "Nothing")


def test_a_wrong_token_is_refused_at_once(cluster: Running, tmp_path: Path) -> None:
    with pytest.raises(KubeError, match="refused with 401: Unauthorized"):
        connect(changed(cluster.kubeconfig, "user", token="wrong"), tmp_path)


def test_a_server_with_another_authority_is_not_spoken_to(cluster: Running, tmp_path: Path) -> None:
    foreign = b64encode(new_certificates().authority).decode()
    kubeconfig = changed(cluster.kubeconfig, "cluster", **{"certificate-authority-data": foreign})
    with pytest.raises(NoAnswer, match=r"discovery: no answer from the API server within 0\.2 s: SSLError"):
        connect(kubeconfig, tmp_path, retry_s=0.2)


def test_nobody_listens(cluster: Running, tmp_path: Path) -> None:
    kubeconfig = changed(cluster.kubeconfig, "cluster", server="https://127.0.0.1:1")
    with pytest.raises(NoAnswer, match="refused"):
        connect(kubeconfig, tmp_path, retry_s=0.2)


def test_what_is_no_kubeconfig(tmp_path: Path) -> None:
    for text in ("", "{", "{}"):
        (tmp_path / "kubeconfig").write_text(text)
        with pytest.raises(KubeError, match="must be a kubeconfig"):
            connect(tmp_path / "kubeconfig", tmp_path)


def test_trouble_that_passes_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {1: 500, 2: 503, 3: 0, 4: 429, 9: 0, 11: 502, 12: 504}
    trouble(monkeypatch, lambda request, number: answers.get(number))
    with running(tmp_path) as cluster, connect(cluster.kubeconfig, tmp_path) as kube:
        kube.apply(config_map(k="1"))
        assert kube.get(CONFIG_MAP)["data"] == {"k": "1"}


@pytest.mark.parametrize("status", [500, 503], ids=["500", "503"])
def test_a_kind_is_not_missing_because_discovery_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """Every second question about a group fails, in every way the client asks it."""
    asked = 0

    def choose(request: web.Request, number: int) -> int | None:
        nonlocal asked
        if request.path.strip("/") not in ("api/v1", "apis"):
            return None
        asked += 1
        return status if asked % 2 else None

    trouble(monkeypatch, choose)
    with running(tmp_path) as cluster, connect(cluster.kubeconfig, tmp_path) as kube:
        assert kube.list("v1", "Node") == []
        with pytest.raises(KubeError, match="must serve kind Nothing of none/v1, but does not"):
            kube.list("none/v1", "Nothing")


def test_what_a_connection_writes_goes_with_its_run(
    cluster: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else reads its discovery, and after a kill nothing of it lies anywhere but in the run's folder."""
    elsewhere, private = tmp_path / "tmp", tmp_path / "private"
    elsewhere.mkdir()
    private.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    with connect(cluster.kubeconfig, private) as kube:
        kube.list("v1", "Node")
    assert not list(elsewhere.iterdir())
    authority = json.loads(cluster.kubeconfig.read_text())["clusters"][0]["cluster"]["certificate-authority-data"]
    (discovery,) = private.glob("discovery-*")
    (certificate,) = set(private.iterdir()) - {discovery}
    assert certificate.read_bytes() == b64decode(authority)


def test_its_headers_let_others_in(cluster: Running, tmp_path: Path) -> None:
    authority = json.loads(cluster.kubeconfig.read_text())["clusters"][0]["cluster"]["certificate-authority-data"]
    context = ssl.create_default_context(cadata=b64decode(authority).decode())
    with connect(cluster.kubeconfig, tmp_path) as kube:
        request = urllib.request.Request(f"{kube.url}/version", headers=kube.headers)
        with urllib.request.urlopen(request, context=context, timeout=10) as answer:
            assert answer.status == 200

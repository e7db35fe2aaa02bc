"""The way in from the internet: TLS with a certificate that is verified, from some addresses only."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pytest_gpulab.cluster.api.access import Certificates, new_certificates
from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.experiment import Constant, Shape, Workload
from pytest_gpulab.fleet import FROM_ZERO
from pytest_gpulab.gates import TargetRefused
from pytest_gpulab.kube.ledger import Ledger
from pytest_gpulab.kube.pool import bring_up, use_cluster
from pytest_gpulab.kube.serving import serve
from pytest_gpulab.kube.wait import WaitFailed
from pytest_gpulab.load import run_load
from pytest_gpulab.render import PublicAccess, pool_objects, serving_objects
from pytest_gpulab.run import Run
from pytest_gpulab.targets.endpoint import EndpointTarget
from tests.kube.conftest import PROFILE
from tests.kube.running import SPEED, Running

ARN = "arn:aws:acm:us-west-2:123456789012:certificate/a"
WORKLOAD = Workload(arrivals=Constant(rate=10), shape=Shape(prompt_tokens=16, output_tokens=4), duration_s=2.0)


def served_to(cidr: str, cluster: Running, ledger: Ledger) -> Endpoint:
    """A profile behind a public load balancer, once that answers."""
    kube = use_cluster(ledger, cluster.kubeconfig, speed=SPEED)
    public = PublicAccess(ARN, (cidr,))
    pool = bring_up(ledger, kube, pool_objects(FROM_ZERO, ["g4dn.xlarge"], run=ledger.run, public=public))
    return serve(pool, serving_objects(PROFILE, None, run=pool.run, api_key=pool.api_key), PROFILE.model)


def load(endpoint: Endpoint, workload: Workload = WORKLOAD) -> Run:
    """A load from processes that begin with this one's environment, as a session does."""
    settings = {"seed": 0, "target": "t", "basis": "emulated", "server": "s", "processes": 2}
    return run_load(workload, endpoint=endpoint, profile=PROFILE, **settings)  # type: ignore[arg-type]


@pytest.fixture
def authority(cluster: Running, tmp_path: Path) -> Path:
    """PEM of who signed the load balancers' certificates."""
    (known,) = json.loads(cluster.kubeconfig.read_text())["clusters"]
    path = tmp_path / "authority.pem"
    path.write_bytes(b64decode(known["cluster"]["certificate-authority-data"]))
    return path


@pytest.mark.slow
def test_the_model_is_reached_through_verified_tls(
    cluster: Running, ledger: Ledger, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    endpoint = served_to("127.0.0.0/8", cluster, ledger)
    assert endpoint.url.startswith("https://127.0.0.1:")
    run = load(endpoint)
    assert run.requests["ok"].all() and run.totals["request_success_total"] == len(run.requests) == 20
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{endpoint.url}/v1/models", timeout=10)
    plain = http.client.HTTPConnection(endpoint.url.removeprefix("https://"), timeout=10)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        plain.request("GET", "/v1/models")
        plain.getresponse()


def test_an_authority_that_is_not_known_ends_the_wait_with_what_to_do(
    cluster: Running, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.pem"
    other.write_bytes(new_certificates().authority)
    monkeypatch.setenv("SSL_CERT_FILE", str(other))
    said = rf"certificate of https://127.*Let SSL_CERT_FILE name the PEM file .*\(it is {other}\)"
    with pytest.raises(WaitFailed, match=said):
        served_to("127.0.0.0/8", cluster, ledger)


@pytest.mark.slow
def test_who_is_not_among_the_addresses_gets_no_answer(
    cluster: Running, ledger: Ledger, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    monkeypatch.setattr("pytest_gpulab.kube.serving.ANSWER_S", SPEED)
    with pytest.raises(WaitFailed, match=r"waited for https://.*/v1/models to list"):
        served_to("203.0.113.0/24", cluster, ledger)


# A server that has the certificate of another host: 127.0.0.2 is loopback too, but not what the certificate says.


@contextmanager
def listening(certificates: Certificates, host: str) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"data": [{"id": PROFILE.model}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer((host, 0), Handler) as server:
        server.socket = certificates.context().wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"https://{host}:{server.server_port}"
        server.shutdown()


def refusal(url: str, tmp_path: Path) -> str:
    target = EndpointTarget(url, PROFILE, "", tmp_path, lambda line: None)
    with pytest.raises(TargetRefused) as refused:
        target.run(WORKLOAD, PROFILE, 0)
    return str(refused.value)


@pytest.mark.slow
def test_a_certificate_of_another_host_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificates = new_certificates()
    path = tmp_path / "authority.pem"
    path.write_bytes(certificates.authority)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with (
        listening(certificates, "127.0.0.1") as url,  # the host that it names
        urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer,
    ):
        assert answer.status == 200
    with listening(certificates, "127.0.0.2") as url:
        said = refusal(url, tmp_path)
        assert "must be for that host" in said and "not valid for '127.0.0.2'" in said
        few = WORKLOAD.model_copy(update={"duration_s": 0.5})
        assert load(Endpoint(url, PROFILE.model), few).totals["client_failed_connect"] == 5

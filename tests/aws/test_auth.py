"""The way into an EKS cluster: the token as the authenticator reads it, and a connection that keeps it fresh."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
from datetime import UTC, datetime
from urllib.parse import parse_qs, quote, urlsplit

import pytest
import yaml

from pytest_gpulab.aws import auth
from pytest_gpulab.aws.errors import CredentialsError
from pytest_gpulab.experiment import Constant, Shape, Workload
from pytest_gpulab.fleet import FROM_ZERO
from pytest_gpulab.kube.client import KubeError, connect
from pytest_gpulab.kube.ledger import Ledger
from pytest_gpulab.kube.pool import bring_up
from pytest_gpulab.kube.process import Process
from pytest_gpulab.kube.serving import serve
from pytest_gpulab.kube.state import ledger_path
from pytest_gpulab.load import run_load
from pytest_gpulab.render import pool_objects, serving_objects
from tests.aws.conftest import REGION, SECRET, SESSION_TOKEN
from tests.cluster.serving import Served
from tests.kube.conftest import PROFILE
from tests.kube.running import SPEED, running


def url_of(token: str) -> str:
    """What the authenticator decodes: unpadded base64url behind the prefix."""
    prefix, encoded = token[:11], token[11:]
    assert prefix == "k8s-aws-v1." and "=" not in encoded
    return base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode()


def signature(url: str, headers: dict[str, str]) -> str:
    """Signature version 4 of a presigned GET, written from AWS's description of it."""
    parts = urlsplit(url)
    query = {key: values[0] for key, values in parse_qs(parts.query).items() if key != "X-Amz-Signature"}
    pairs = sorted((quote(key, safe="-_.~"), quote(value, safe="-_.~")) for key, value in query.items())
    names = sorted(headers)
    canonical = "\n".join(
        [
            "GET",
            parts.path or "/",
            "&".join(f"{key}={value}" for key, value in pairs),
            *[f"{name}:{headers[name]}" for name in names],
            "",
            ";".join(names),
            hashlib.sha256(b"").hexdigest(),
        ]
    )
    moment = query["X-Amz-Date"]
    scope = f"{moment[:8]}/{REGION}/sts/aws4_request"
    to_sign = "\n".join(["AWS4-HMAC-SHA256", moment, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{SECRET}".encode()
    for word in (moment[:8], REGION, "sts", "aws4_request"):
        key = hmac.new(key, word.encode(), hashlib.sha256).digest()
    return hmac.new(key, to_sign.encode(), hashlib.sha256).hexdigest()


def test_the_token_is_what_the_authenticator_expects(clients):
    url = url_of(auth.make_token(clients, "lab"))
    query = parse_qs(urlsplit(url).query)
    assert urlsplit(url).hostname == f"sts.{REGION}.amazonaws.com"
    assert query["Action"] == ["GetCallerIdentity"]
    assert query["X-Amz-Expires"] == ["60"]
    assert query["X-Amz-SignedHeaders"] == ["host;x-k8s-aws-id"]
    assert query["X-Amz-Security-Token"] == [SESSION_TOKEN]
    headers = {"host": f"sts.{REGION}.amazonaws.com", "x-k8s-aws-id": "lab"}
    assert query["X-Amz-Signature"] == [signature(url, headers)]
    assert query["X-Amz-Signature"] != [signature(url, {**headers, "x-k8s-aws-id": "another"})]


def test_other_calls_of_the_same_client_are_not_signed_for_a_cluster(clients):
    auth.make_token(clients, "lab")
    url = clients("sts").generate_presigned_url("get_caller_identity")
    assert "x-k8s-aws-id" not in url


def test_a_token_is_good_for_long_whenever_it_is_asked_for(clients, monkeypatch):
    made: list[float] = []
    time = 0.0
    monkeypatch.setattr(auth, "make_token", lambda *_: made.append(time) or f"token {len(made)}")
    tokens = auth.Tokens(clients, "lab", now=lambda: time)
    ages = []
    for second in range(0, 3600, 10):
        time = float(second)
        tokens.get()
        ages.append(time - made[-1])
    assert max(ages) < 2 * 60
    assert len(made) == 60  # not at every request


def test_without_credentials_the_error_says_to_sign_in(monkeypatch):
    from pytest_gpulab.aws.clients import make_clients

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("botocore.credentials.CredentialResolver.load_credentials", lambda _: None)
    with pytest.raises(CredentialsError, match="Sign in to AWS"):
        auth.make_token(make_clients(REGION), "lab")


def test_a_connection_goes_on_with_a_renewed_token(clients, monkeypatch, tmp_path):
    """The embedded cluster stands in for EKS; its token changes as an EKS token ends."""
    time = 0.0
    served = Served(tmp_path).start()
    try:
        monkeypatch.setattr(auth, "make_token", lambda *_: served.server.token)
        (known,) = yaml.safe_load(served.config.read_text())["clusters"]
        cluster = {
            "name": "lab",
            "endpoint": served.server.url,
            "certificateAuthority": {"data": known["cluster"]["certificate-authority-data"]},
        }
        with auth.connect(clients, cluster, tmp_path, now=lambda: time) as kube:
            assert kube.list("v1", "Node") == []
            served.server.token = "another"
            with pytest.raises(KubeError, match="401"):
                kube.list("v1", "Node")
            time = 14 * 60.0
            assert kube.list("v1", "Node") == []
    finally:
        served.stop()


@pytest.mark.slow
def test_metrics_are_read_to_the_end_of_a_run_that_outlives_its_first_token(clients, monkeypatch, tmp_path):
    """Ten minutes pass with each request to the API server, which lets a token live for 15."""
    time = 0.0
    refused: list[str] = []

    def let_in(header: str, _: str) -> bool:
        nonlocal time
        young = time - float(header.removeprefix("Bearer signed-at-")) <= 15 * 60
        refused.extend(() if young else [header])
        time += 10 * 60
        return young

    monkeypatch.setattr(auth, "make_token", lambda *_: f"signed-at-{time}")
    monkeypatch.setattr("pytest_gpulab.cluster.api.server.is_authorized", let_in)
    ledger = Ledger.create(ledger_path("run-1"), Process.of(os.getpid()))
    with running(tmp_path) as cluster:
        (known,) = yaml.safe_load(cluster.kubeconfig.read_text())["clusters"]
        authority = {"data": known["cluster"]["certificate-authority-data"]}
        described = {"name": "lab", "endpoint": known["cluster"]["server"], "certificateAuthority": authority}
        with auth.connect(clients, described, ledger.folder, now=lambda: time) as kube:
            kube.speed = SPEED
            pool = bring_up(ledger, kube, pool_objects(FROM_ZERO, ["g4dn.xlarge"], run=ledger.run))
            objects = serving_objects(PROFILE, None, run=ledger.run, api_key=pool.api_key)
            run = run_load(
                Workload(arrivals=Constant(rate=4), shape=Shape(prompt_tokens=16, output_tokens=4), duration_s=4.0),
                endpoint=serve(pool, objects, PROFILE.model),
                profile=PROFILE,
                seed=0,
                target="eks",
                basis="emulated",
                server="emulated",
            )
    assert refused == []
    assert len(run.server) >= 3
    assert run.totals["request_success_total"] == len(run.requests)


def test_the_kubeconfig_lets_another_process_in(clients, monkeypatch, tmp_path):
    """As kubectl and a later teardown use it; the server takes any token that looks like EKS's."""
    tokens: list[str] = []

    def let_in(header: str, _: str) -> bool:
        tokens.append(header)
        return header.startswith("Bearer k8s-aws-v1.")

    monkeypatch.setattr("pytest_gpulab.cluster.api.server.is_authorized", let_in)
    served = Served(tmp_path).start()
    try:
        (known,) = yaml.safe_load(served.config.read_text())["clusters"]
        authority = {"data": known["cluster"]["certificate-authority-data"]}
        cluster = {"name": "lab", "endpoint": served.server.url, "certificateAuthority": authority}
        auth.write_kubeconfig(cluster, REGION, tmp_path / "eks")
        with connect(tmp_path / "eks", tmp_path) as kube:
            assert kube.list("v1", "Node") == []
    finally:
        served.stop()
    assert tokens
    assert tokens[0].removeprefix("Bearer ") not in (tmp_path / "eks").read_text()


def test_the_kubeconfig_names_the_command_and_holds_no_secret(tmp_path):
    cluster = {"name": "lab", "endpoint": "https://x.eks.amazonaws.com", "certificateAuthority": {"data": "Q0E="}}
    path = tmp_path / "kubeconfig"
    auth.write_kubeconfig(cluster, REGION, path)
    written = yaml.safe_load(path.read_text())
    (user,) = written["users"]
    assert user["user"]["exec"]["args"] == ["-m", "pytest_gpulab", "token", "--cluster", "lab", "--region", REGION]
    assert written["clusters"][0]["cluster"]["server"] == "https://x.eks.amazonaws.com"


def test_gpulab_token_answers_as_kubectl_wants(clients, capsys):
    from pytest_gpulab.cli import main

    assert main(["token", "--cluster", "lab", "--region", REGION]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["kind"], answer["apiVersion"]) == ("ExecCredential", "client.authentication.k8s.io/v1")
    query = parse_qs(urlsplit(url_of(answer["status"]["token"])).query)
    signed = datetime.strptime(query["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    expires = datetime.fromisoformat(answer["status"]["expirationTimestamp"])
    assert 13 * 60 < (expires - signed).total_seconds() < 15 * 60

"""The way into an EKS cluster: its address from EKS, its token signed from AWS credentials.

The token is a presigned STS request that the API server's authenticator performs to learn who signed it
(kubernetes-sigs/aws-iam-authenticator): GetCallerIdentity, with the cluster's name as a signed header.
"""

from __future__ import annotations

import base64
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pytest_gpulab.aws.clients import Clients
from pytest_gpulab.aws.errors import explained

if TYPE_CHECKING:
    from pytest_gpulab.kube.client import Kube

_PREFIX = "k8s-aws-v1."
_HEADER = "x-k8s-aws-id"
_EXPIRES_S = 60
"""What the URL says. The authenticator lets a token live 15 minutes whatever it says."""
_VALID_S = 14 * 60.0
"""With a minute to spare."""
_RENEW_S = 60.0
"""Signing needs no network, so whoever takes a token along for a while gets one that is good for a while."""
_EXEC = {"apiVersion": "client.authentication.k8s.io/v1", "interactiveMode": "Never"}


def make_token(clients: Clients, cluster: str) -> str:
    """A bearer token for `cluster`, valid for 15 minutes.

    Raises:
        CredentialsError: there are none, or they cannot be renewed.
    """
    sts = clients("sts")
    event = "before-sign.sts.GetCallerIdentity"

    def add_header(request: Any, **_: object) -> None:
        request.headers[_HEADER] = cluster

    sts.meta.events.register(event, add_header)
    try:
        with explained(f"signing a token for the cluster {cluster}"):
            url = sts.generate_presigned_url("get_caller_identity", ExpiresIn=_EXPIRES_S, HttpMethod="GET")
    finally:
        sts.meta.events.unregister(event, add_header)
    return _PREFIX + base64.urlsafe_b64encode(url.encode()).decode().rstrip("=")


class Tokens:
    """A token that is always good for another 13 minutes: renewed when it is a minute old."""

    def __init__(self, clients: Clients, cluster: str, now: Callable[[], float] = time.monotonic) -> None:
        self._clients = clients
        self._cluster = cluster
        self._now = now
        self._token = ""
        self._made = 0.0

    def get(self) -> str:
        """The token."""
        if not self._token or self._now() - self._made >= _RENEW_S:
            self._made = self._now()
            self._token = make_token(self._clients, self._cluster)
        return self._token


def connect(
    clients: Clients, cluster: Mapping[str, Any], folder: Path, now: Callable[[], float] = time.monotonic
) -> Kube:
    """A connection to a cluster as EKS describes it; `folder` gets the cluster's certificate, which is public.

    Raises:
        CredentialsError: no token could be signed.
        KubeError: the API server does not answer.
    """
    from kubernetes.client import ApiClient, Configuration

    from pytest_gpulab.kube.client import CONNECTIONS, RETRY_S, Kube

    tokens = Tokens(clients, cluster["name"], now)

    def renew(configuration: Configuration) -> None:
        configuration.api_key["authorization"] = f"Bearer {tokens.get()}"

    authority = folder / f"{cluster['name']}-ca.pem"
    authority.write_bytes(base64.b64decode(cluster["certificateAuthority"]["data"]))
    configuration = Configuration()
    configuration.host = cluster["endpoint"]
    configuration.ssl_ca_cert = str(authority)
    configuration.connection_pool_maxsize = CONNECTIONS
    configuration.retries = 0  # Kube repeats by itself
    renew(configuration)  # the client asks the hook only where it finds a key already
    configuration.refresh_api_key_hook = renew
    return Kube(ApiClient(configuration), folder, speed=1.0, retry_s=RETRY_S)


def write_kubeconfig(cluster: Mapping[str, Any], region: str, path: Path) -> None:
    """The same way in for others: kubectl, and a teardown in another process. It holds no secret.

    Tokens come from `gpulab token`, which signs them with the credentials of whoever asks.
    """
    name = cluster["name"]
    command = ["-m", "pytest_gpulab", "token", "--cluster", name, "--region", region]
    user = {"exec": {**_EXEC, "command": sys.executable, "args": command}}
    server = {
        "server": cluster["endpoint"],
        "certificate-authority-data": cluster["certificateAuthority"]["data"],
    }
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": server}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "current-context": name,
    }
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def exec_credential(clients: Clients, cluster: str, now: datetime) -> dict[str, Any]:
    """A token as kubectl's client.authentication.k8s.io/v1 wants it."""
    expires = (now + timedelta(seconds=_VALID_S)).strftime("%Y-%m-%dT%H:%M:%SZ")
    status = {"token": make_token(clients, cluster), "expirationTimestamp": expires}
    return {"apiVersion": _EXEC["apiVersion"], "kind": "ExecCredential", "status": status}

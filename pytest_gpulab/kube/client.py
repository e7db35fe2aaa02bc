"""A cluster behind a kubeconfig: objects as plain dictionaries, asked for again where the API server stumbles."""

from __future__ import annotations

import builtins
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from kubernetes.client import ApiClient, Configuration
from kubernetes.client.exceptions import ApiException
from kubernetes.config import load_kube_config
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.resource import Resource
from kubernetes.watch import Watch
from urllib3.exceptions import HTTPError, MaxRetryError

from pytest_gpulab.kube.objects import Object, Ref

T = TypeVar("T")
FIELD_MANAGER: Final = "gpulab"
RETRY_S: Final = 30.0
"""How long a call that fails for no fault of its own is repeated."""
CONNECTIONS: Final = 32
"""Kept open at once: a fleet's run has five watches, and those of the run before end seconds later."""
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 2.0
_TIMEOUT_S: Final = (5.0, 30.0)
"""To connect, and between two bytes."""
_RETRIED: Final = frozenset({429, 500, 502, 503, 504})


class KubeError(Exception):
    """The API server refused a call, or did not answer in time; the message names the call."""


class NoAnswer(KubeError):
    """The API server failed for as long as it was asked; asking more will not help."""


class NotThere(KubeError):
    """There is no such object."""


class Kube:
    """Reads, applies and deletes objects. Every call is safe to repeat, and is, until `retry_s` are over.

    `speed`: cluster seconds a second, 1 on a real cluster. `folder`: private to the run, for what discovery finds.
    """

    def __init__(self, api: ApiClient, folder: Path, *, speed: float = 1.0, retry_s: float = RETRY_S) -> None:
        self.speed = speed
        self._api = api
        self._retry_s = retry_s
        self._kinds: dict[tuple[str, str], Any] = {}
        # Discovery's default cache is one file a host for all users: a reused port would be answered from it.
        cache = folder / f"discovery-{os.getpid()}.json"
        self._dynamic = self._ask("discovery", lambda: DynamicClient(api, cache_file=str(cache)))

    @property
    def url(self) -> str:
        """Of the API server."""
        return str(self._api.configuration.host)

    @property
    def ca(self) -> str | None:
        """PEM file of the authority that signed for it; None: one that this machine trusts."""
        found: str | None = self._api.configuration.ssl_ca_cert
        return found

    @property
    def headers(self) -> dict[str, str]:
        """What authorizes a request to it; short-lived on EKS."""
        settings = self._api.configuration.auth_settings().get("BearerToken")
        return {"Authorization": str(settings["value"])} if settings else {}

    def get(self, ref: Ref) -> Object | None:
        """The object as it is; None when there is none."""
        kind = self._kind(ref.api_version, ref.kind)
        try:
            return self._call(f"get {ref}", kind.get, name=ref.name, namespace=ref.namespace or None)
        except NotThere:
            return None

    def list(
        self, api_version: str, kind: str, namespace: str = "", *, labels: str = "", fields: str = ""
    ) -> list[Object]:
        """All objects of a kind that the selectors select."""
        return self.snapshot(api_version, kind, namespace, labels=labels, fields=fields)[0]

    def snapshot(
        self, api_version: str, kind: str, namespace: str = "", *, labels: str = "", fields: str = ""
    ) -> tuple[builtins.list[Object], str]:
        """As `list`, and the version from which `watch` tells what changes."""
        found = self._call(
            f"list {kind}",
            self._kind(api_version, kind).get,
            namespace=namespace or None,
            label_selector=labels or None,
            field_selector=fields or None,
        )
        items = [{"apiVersion": api_version, "kind": kind, **item} for item in found["items"]]
        return items, str(found["metadata"]["resourceVersion"])

    def watch(
        self, api_version: str, kind: str, namespace: str = "", *, labels: str = "", since: str, for_s: int
    ) -> Iterator[tuple[str, Object]]:
        """Changes after the version `since` as ("ADDED", "MODIFIED" or "DELETED", object), for `for_s` seconds.

        It may break off sooner, with any error: nothing is repeated.
        """
        changes = Watch().stream(
            self._kind(api_version, kind).get,
            namespace=namespace or None,
            label_selector=labels or None,
            resource_version=since,
            timeout_seconds=for_s,
            serialize=False,
            _request_timeout=(_TIMEOUT_S[0], for_s + _TIMEOUT_S[1]),
        )
        for change in changes:
            yield change["type"], {"apiVersion": api_version, "kind": kind, **change["raw_object"]}

    def serves(self, api_version: str) -> bool:
        """Whether the API server serves a group and version now; an extension's is served once it answers itself."""
        try:
            self._dynamic.request("GET", f"/apis/{api_version}", _request_timeout=_TIMEOUT_S)
        except (ApiException, HTTPError):
            return False
        return True

    def apply(self, obj: Object) -> Object:
        """Server-side apply: create the object, or make ours of its fields what `obj` says."""
        ref = Ref.of(obj)
        return self._call(
            f"apply {ref}",
            self._kind(ref.api_version, ref.kind).server_side_apply,
            body=obj,
            name=ref.name,
            namespace=ref.namespace or None,
            field_manager=FIELD_MANAGER,
        )

    def scale(self, ref: Ref, replicas: int) -> None:
        """Set how many replicas there are, now; an autoscaler may change it again."""
        self._call(
            f"scale {ref}",
            self._kind(ref.api_version, ref.kind).patch,
            body={"spec": {"replicas": replicas}},
            name=ref.name,
            namespace=ref.namespace,
            content_type="application/merge-patch+json",
        )

    def delete(self, ref: Ref) -> None:
        """Delete the object and, in the background, what it owns; harmless when there is none."""
        kind = self._kind(ref.api_version, ref.kind)
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        try:
            self._call(f"delete {ref}", kind.delete, name=ref.name, namespace=ref.namespace or None, body=body)
        except NotThere:
            return

    def close(self) -> None:
        """Let the connections go."""
        self._api.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _kind(self, api_version: str, kind: str) -> Any:
        key = (api_version, kind)
        if key not in self._kinds:
            with suppress(NotThere):  # not even the group
                self._kinds |= self._ask(f"discovery of {kind}", lambda: self._discover(api_version))
        if key not in self._kinds:
            raise KubeError(
                f"{self.url} must serve kind {kind} of {api_version}, but does not: install what defines it"
            )
        return self._kinds[key]

    def _discover(self, api_version: str) -> dict[tuple[str, str], Resource]:
        """All kinds of a group and version.

        Not the client's own search: that takes a 503 for an empty answer, and a refresh that breaks off leaves it
        unusable.
        """
        group, _, version = api_version.rpartition("/")
        place = {
            "prefix": "apis" if group else "api",
            "group": group,
            "api_version": version,
            "client": self._dynamic,
        }
        answer = self._dynamic.request("GET", f"/{place['prefix']}/{api_version}", _request_timeout=_TIMEOUT_S)
        return {
            (api_version, entry["kind"]): Resource(
                **place, **{key: entry[key] for key in ("kind", "name", "namespaced", "verbs")}
            )
            for entry in answer.to_dict()["resources"]
            if "/" not in entry["name"]
        }

    def _call(self, what: str, verb: Callable[..., Any], **arguments: Any) -> Object:
        answer: Object = self._ask(what, lambda: verb(**arguments, _request_timeout=_TIMEOUT_S).to_dict())
        return answer

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        """The answer of `call`. KubeError when it was refused, or failed until the time was over."""
        deadline = time.monotonic() + self._retry_s
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return call()
            except ApiException as refusal:
                if refusal.status == 404:
                    raise NotThere(f"{what}: {_message(refusal)}") from None
                if refusal.status not in _RETRIED:
                    raise KubeError(f"{what}: refused with {refusal.status}: {_message(refusal)}") from None
                trouble = f"{refusal.status} {_message(refusal)}"
            except HTTPError as broken:
                cause = broken.reason if isinstance(broken, MaxRetryError) and broken.reason else broken
                trouble = f"{type(cause).__name__}: {cause}"
            if time.monotonic() + pause_s > deadline:
                raise NoAnswer(f"{what}: no answer from the API server within {self._retry_s:g} s: {trouble}")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def connect(kubeconfig: Path, folder: Path, *, speed: float = 1.0, retry_s: float = RETRY_S) -> Kube:
    """A connection as the kubeconfig's current context says, TLS and all; its certificates are copied to `folder`.

    Raises:
        KubeError: the file is no kubeconfig, or the API server does not answer within `retry_s` seconds.
    """
    configuration = Configuration()
    try:
        load_kube_config(config_file=str(kubeconfig), client_configuration=configuration, temp_file_path=str(folder))
    except Exception as wrong:  # ConfigException, and whatever its parsers raise on a half-written file
        raise KubeError(f"{kubeconfig} must be a kubeconfig: {wrong}") from wrong
    configuration.connection_pool_maxsize = CONNECTIONS
    configuration.retries = 0  # Kube repeats by itself; not False, with which this client chokes on TLS errors
    return Kube(ApiClient(configuration), folder, speed=speed, retry_s=retry_s)


def _message(refusal: ApiException) -> str:
    """What the server's Status says."""
    try:
        return str(json.loads(refusal.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(refusal.reason)

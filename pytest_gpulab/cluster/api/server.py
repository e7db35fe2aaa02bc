"""The API server: HTTPS on loopback over a store."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Self

from aiohttp import web

from pytest_gpulab.cluster.api import discovery, kubeconfig, openapi
from pytest_gpulab.cluster.api.access import (
    LOOPBACK,
    Certificates,
    is_authorized,
    new_certificates,
    new_token,
)
from pytest_gpulab.cluster.api.attach import Attachable, attach
from pytest_gpulab.cluster.api.custom import serve_custom_resources
from pytest_gpulab.cluster.api.objects import answer
from pytest_gpulab.cluster.api.requests import Call, no_such_path, read_call
from pytest_gpulab.cluster.api.watching import stream
from pytest_gpulab.cluster.errors import ApiError, ServiceUnavailable, TooLarge, Unauthorized
from pytest_gpulab.cluster.objects import Object
from pytest_gpulab.cluster.resources import METRICS_GROUP, METRICS_VERSION, POD
from pytest_gpulab.cluster.store import Store

Metrics = Callable[[str, Object], Object | None]
"""Given a path below `/apis/custom.metrics.k8s.io/v1beta1` ("" for the list of metrics) and the query: the answer."""
Logs = Callable[[str, str, Mapping[str, str]], AsyncIterator[str]]
"""Given a pod's namespace and name, and the query: what its containers wrote, and are going to write."""
Proxy = Callable[[web.Request, str, str, str], Awaitable[web.StreamResponse]]
"""Given a request, a pod's namespace, its NAME or NAME:PORT, and a path: the answer of the pod's own server."""

_LARGEST_BODY = 3 << 20
_ATTACH = re.compile(r"^/api/v1/namespaces/([^/]+)/pods/([^/]+)/attach$")
_POD_PROXY = re.compile(r"^/api/v1/namespaces/([^/]+)/pods/([^/]+)/proxy(?:/(.*))?$")
_METRICS_PATH = f"/apis/{METRICS_GROUP}/{METRICS_VERSION}"
_NO_METRICS: Object = {
    "kind": "APIResourceList",
    "apiVersion": "v1",
    "groupVersion": f"{METRICS_GROUP}/{METRICS_VERSION}",
    "resources": [],
}
_log = logging.getLogger(__name__)


class ApiServer:
    """Serves a store to `kubectl` and client libraries. Runs in the event loop that changes the store.

    `async with ApiServer(store) as server` listens until the block ends. Loopback only, a fresh token each time.
    """

    def __init__(
        self,
        store: Store,
        *,
        port: int = 0,
        metrics: Metrics | None = None,
        logs: Logs | None = None,
        processes: Attachable | None = None,
        proxy: Proxy | None = None,
        certificates: Certificates | None = None,
    ) -> None:
        self.store = store
        self.token = new_token()
        self.port = port
        self._metrics, self._logs, self._proxy = metrics, logs, proxy
        self._processes = processes
        self._certificates = certificates or new_certificates()
        self._watching: set[asyncio.Task[object] | None] = set()
        self._runner: web.AppRunner | None = None
        serve_custom_resources(store)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"https://{LOOPBACK}:{self.port}"

    def write_kubeconfig(self, path: Path) -> None:
        """Write how to reach it, with the token. ValueError when `path` exists and is not such a file."""
        kubeconfig.write(path, self._kubeconfig())

    def remove_kubeconfig(self, path: Path) -> None:
        """Remove what was written there, if it is still that."""
        kubeconfig.remove(path, self._kubeconfig())

    def _kubeconfig(self) -> kubeconfig.Kubeconfig:
        return kubeconfig.kubeconfig(self.url, self._certificates.authority, self.token)

    async def start(self) -> None:
        """Listen; `port` is then the one in use."""
        app = web.Application(client_max_size=_LARGEST_BODY)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await self._runner.setup()
        site = web.TCPSite(self._runner, LOOPBACK, self.port, ssl_context=self._certificates.context())
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """End the watches and stop listening."""
        for task in [task for task in self._watching if task]:
            task.cancel()
        if self._runner:
            await self._runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            if not is_authorized(request.headers.get("Authorization", ""), self.token):
                raise Unauthorized("Unauthorized")
            return await self._answer(request)
        except ApiError as refusal:
            return _json(refusal.status(), refusal.code)
        except web.HTTPRequestEntityTooLarge:
            return _json(TooLarge(f"Request entity too large: limit is {_LARGEST_BODY}").status(), TooLarge.code)
        except ConnectionResetError:
            raise
        except Exception as error:
            _log.exception("%s %s", request.method, request.path)
            return _json(ApiError(f"Internal error occurred: {error!r}").status(), 500)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path.rstrip("/") or "/"
        if path in ("/healthz", "/livez", "/readyz"):
            return web.Response(text="ok")
        if path == _METRICS_PATH or path.startswith(f"{_METRICS_PATH}/"):
            return _json(self._custom_metrics(path, dict(request.query)))
        if proxied := _POD_PROXY.match(request.path):
            return await self._proxied(request, *proxied.groups(default=""))
        if attached := _ATTACH.match(request.path):
            return await self._attached(request, *attached.groups())
        if request.method == "GET" and (document := self._document(path, request)):
            return document
        call = await read_call(request, self.store.resources)
        if call.watches:
            return await self._cancellable(stream(self.store, call, request))
        if call.subresource == "log":
            return await self._cancellable(self._log_of(call, request))
        result = answer(self.store, call)
        response = _json(result.body, result.code)
        for warning in result.warnings:
            response.headers.add("Warning", f"299 - {json.dumps(warning)}")
        return response

    async def _cancellable(self, answer: Awaitable[web.StreamResponse]) -> web.StreamResponse:
        """An answer that may take for ever, but not longer than the server."""
        task = asyncio.current_task()
        self._watching.add(task)
        try:
            return await answer
        finally:
            self._watching.discard(task)

    async def _attached(self, request: web.Request, namespace: str, name: str) -> web.StreamResponse:
        if self._processes is None:
            raise ServiceUnavailable("no processes run behind this cluster's pods")
        return await self._cancellable(attach(self._processes, request, namespace, name))

    async def _proxied(self, request: web.Request, namespace: str, name: str, path: str) -> web.StreamResponse:
        if self._proxy is None:
            raise ServiceUnavailable("no servers run behind this cluster's pods")
        return await self._proxy(request, namespace, name, path)

    def _document(self, path: str, request: web.Request) -> web.Response | None:
        if path == "/version":
            return _json(discovery.VERSION)
        aggregated = "as=APIGroupDiscoveryList" in request.headers.get("Accept", "") and "v=v2;" in (
            request.headers.get("Accept", "") + ";"
        )
        found = discovery.document(path, self.store.resources, aggregated=aggregated)
        if found is not None:
            response = _json(found)
            if found["kind"] == "APIGroupDiscoveryList":
                response.headers["Content-Type"] = discovery.AGGREGATED
            return response
        if path == "/openapi/v2":
            return web.Response(body=openapi.VERSION_2, content_type=openapi.VERSION_2_TYPE)
        specification = openapi.document(path, self.store.resources)
        return _json(specification) if specification is not None else None

    def _custom_metrics(self, path: str, query: Object) -> Object:
        below = path.removeprefix(_METRICS_PATH).strip("/")
        found = self._metrics(below, query) if self._metrics else None
        if found is None and not below:
            return _NO_METRICS
        if found is None:
            raise no_such_path()
        return found

    async def _log_of(self, call: Call, request: web.Request) -> web.StreamResponse:
        self.store.get(POD, call.name, call.namespace)
        lines = self._logs(call.namespace, call.name, call.query) if self._logs else None
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionResetError):
            if lines is not None:
                async for line in lines:
                    await response.write(line.encode())
            await response.write_eof()
        return response


def _json(body: Object, code: int = 200) -> web.Response:
    return web.Response(text=json.dumps(body), status=code, content_type="application/json")

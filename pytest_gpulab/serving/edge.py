"""The load balancer in front of the servers: what the Ingress makes of an ALB.

It serves /v1 and nothing else, checks the API key, and hands requests round robin to the endpoints that are Ready.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, TCPConnector, web
from multidict import CIMultiDict

from pytest_gpulab.serving.app import bearer_is_one_of
from pytest_gpulab.serving.errors import UNAUTHORIZED
from pytest_gpulab.serving.server import listening

Endpoints = Callable[[], Sequence[str]]
"""The base URLs of the Ready endpoints now, such as ``http://127.0.0.1:8000``."""

_HOP_BY_HOP = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"),
    *("te", "trailer", "transfer-encoding", "upgrade"),
}
_POOL_S = 4.0
"""Real seconds an idle upstream connection is reused: below the 5 s after which vLLM closes it."""
_BUFFER = 1024**2
"""Bytes read from an endpoint at once."""


@dataclass
class Edge:
    """A load balancer; `url` is set while it listens.

    `in_flight` counts the unanswered requests of each endpoint, those included that are no longer Ready: they are
    finished there.
    """

    endpoints: Endpoints
    api_keys: tuple[str, ...]
    idle_timeout_s: float
    url: str = ""
    in_flight: Counter[str] = field(default_factory=Counter)
    _turn: int = 0
    _session: ClientSession | None = None
    _requests: dict[str, set[asyncio.Task[object]]] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def drain(self, endpoint: str, deadline_s: float) -> int:
        """Wait until `endpoint`, which must not be Ready any more, has answered all its requests.

        After `deadline_s` real seconds the rest is cut off; how many that were. (ALB: the deregistration delay.)
        """
        try:
            async with asyncio.timeout(deadline_s):
                while self.in_flight[endpoint]:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            left = list(self._requests.get(endpoint, ()))
            for request in left:
                request.cancel()
            return len(left)
        return 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        if not (request.path == "/v1" or request.path.startswith("/v1/")):
            return _page(404)
        if self.api_keys and not bearer_is_one_of(request, self.api_keys):
            return web.json_response(UNAUTHORIZED, status=401)
        ready = self.endpoints()
        if not ready:
            return _page(503)
        endpoint = ready[self._turn % len(ready)]
        self._turn += 1
        with self._counted(endpoint):
            return await self._forward(request, endpoint)

    def _counted(self, endpoint: str) -> _Counted:
        return _Counted(self, endpoint)

    async def _forward(self, request: web.Request, endpoint: str) -> web.StreamResponse:
        assert self._session is not None
        try:
            upstream = await self._session.request(
                request.method,
                endpoint + request.raw_path,
                headers=_forwarded(request),
                data=request.content if request.body_exists else None,
                allow_redirects=False,
            )
        except TimeoutError:
            return _page(504)
        except ClientError:
            return _page(502)
        try:
            return await _pass_through(request, upstream)
        finally:
            upstream.close()  # after a complete answer the connection is already back in the pool


class _Counted:
    """Counts the running task as a request of an endpoint."""

    def __init__(self, edge: Edge, endpoint: str) -> None:
        self._edge, self._endpoint = edge, endpoint
        self._task = asyncio.current_task()

    def __enter__(self) -> None:
        self._edge.in_flight[self._endpoint] += 1
        assert self._task is not None
        self._edge._requests.setdefault(self._endpoint, set()).add(self._task)

    def __exit__(self, *_: object) -> None:
        assert self._task is not None
        self._edge._requests[self._endpoint].discard(self._task)
        self._edge.in_flight[self._endpoint] -= 1
        self._edge._changed.set()


async def _pass_through(request: web.Request, upstream: ClientResponse) -> web.StreamResponse:
    """The endpoint's answer, each piece as it comes. One that breaks off breaks off for the client too."""
    response = web.StreamResponse(status=upstream.status, reason=upstream.reason, headers=_kept(upstream.headers))
    try:
        piece = await upstream.content.readany()
    except (ClientError, TimeoutError) as broken:
        return _page(504 if isinstance(broken, TimeoutError) else 502)
    await response.prepare(request)
    try:
        while piece:
            await response.write(piece)
            piece = await upstream.content.readany()
    except (ClientError, TimeoutError):
        if request.transport is not None:
            request.transport.close()
        return response
    await response.write_eof()
    return response


def _kept(headers: CIMultiDict[str] | object) -> CIMultiDict[str]:
    """The headers that go on from one connection to the next."""
    named = CIMultiDict[str](headers)  # type: ignore[arg-type]
    for name in list(named):
        if name.lower() in _HOP_BY_HOP:
            named.popall(name, None)
    return named


def _forwarded(request: web.Request) -> CIMultiDict[str]:
    headers = _kept(request.headers)
    seen = [headers["X-Forwarded-For"]] if "X-Forwarded-For" in headers else []
    headers["X-Forwarded-For"] = ", ".join([*seen, request.remote or "unknown"])
    headers["X-Forwarded-Proto"] = request.scheme
    return headers


def _page(status: int) -> web.Response:
    """The balancer's own answer."""
    title = f"{status} {HTTPStatus(status).phrase}"
    text = f"<html>\r\n<head><title>{title}</title></head>\r\n<body>\r\n<center><h1>{title}</h1></center>\r\n"
    return web.Response(status=status, text=f"{text}</body>\r\n</html>\r\n", content_type="text/html")


@asynccontextmanager
async def serve_edge(
    endpoints: Endpoints,
    *,
    api_key: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    idle_timeout_s: float = 60.0,
) -> AsyncIterator[Edge]:
    """Run a load balancer until the context ends.

    Args:
        endpoints: asked for each request.
        api_key: if given, requests need it as a bearer token, else 401.
        idle_timeout_s: real seconds without a byte from the endpoint until the client gets 504.
    """
    edge = Edge(endpoints, (api_key,) if api_key else (), idle_timeout_s)
    app = web.Application(client_max_size=0)
    app.router.add_route("*", "/{path:.*}", edge.handle)
    timeout = ClientTimeout(total=None, sock_connect=10.0, sock_read=idle_timeout_s)
    connector = TCPConnector(limit=0, keepalive_timeout=_POOL_S)
    async with ClientSession(
        connector=connector, timeout=timeout, auto_decompress=False, read_bufsize=_BUFFER
    ) as session:
        edge._session = session
        async with listening(app, host, port) as edge.url:
            yield edge

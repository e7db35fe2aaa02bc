"""The load balancer in front of the servers: what the Ingress makes of an ALB.

It serves the paths it has a rule for, and hands requests round robin to the endpoints behind the rule. API keys are
the servers' own business.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from ipaddress import IPv4Network, IPv6Network, ip_address

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web
from multidict import CIMultiDict

from pytest_gpulab.serving.forwarding import forward, kept
from pytest_gpulab.serving.server import listening

Routes = Callable[[str], Sequence[str] | None]
"""Given a path: the base URLs of the Ready endpoints now, such as ``http://127.0.0.1:8000``; None: no rule for it."""
Network = IPv4Network | IPv6Network

_POOL_S = 4.0
"""Real seconds an idle upstream connection is reused: below the 5 s after which vLLM closes it."""
_BUFFER = 1024**2
"""Bytes read from an endpoint at once."""


def under(prefix: str, path: str) -> bool:
    """Whether a path is `prefix` or below it, element by element, as Ingress rules of type Prefix match."""
    stem = prefix.rstrip("/")
    return path == stem or path.startswith(f"{stem}/")


@dataclass
class Edge:
    """A load balancer; `url` is set while it listens.

    `in_flight` counts the unanswered requests of each endpoint, those included that are no longer Ready: they are
    finished there.
    """

    routes: Routes
    inbound: Sequence[Network] | None = None
    """Where clients may be; None: anywhere."""
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
        """Answer one request; none from where no client may be, for which a security group has no answer."""
        if not self._lets_in(request.remote):
            assert request.transport is not None
            request.transport.abort()
            raise ConnectionResetError
        ready = self.routes(request.path)
        if ready is None:
            return _page(404)
        if not ready:
            return _page(503)
        endpoint = ready[self._turn % len(ready)]
        self._turn += 1
        assert self._session is not None
        with _Counted(self, endpoint):
            return await forward(self._session, request, endpoint + request.raw_path, _forwarded(request), _page)

    def _lets_in(self, address: str | None) -> bool:
        return self.inbound is None or any(ip_address(address or "") in network for network in self.inbound)


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


def _forwarded(request: web.Request) -> CIMultiDict[str]:
    headers = kept(request.headers)
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
    routes: Routes,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    idle_timeout_s: float = 60.0,
    tls: ssl.SSLContext | None = None,
    inbound: Sequence[Network] | None = None,
) -> AsyncIterator[Edge]:
    """Run a load balancer until the context ends.

    Args:
        routes: asked for each request.
        idle_timeout_s: real seconds without a byte from the endpoint until the client gets 504.
        tls: None: it speaks HTTP.
        inbound: where clients may be; None: anywhere.
    """
    edge = Edge(routes, inbound)
    app = web.Application(client_max_size=0)
    app.router.add_route("*", "/{path:.*}", edge.handle)
    timeout = ClientTimeout(total=None, sock_connect=10.0, sock_read=idle_timeout_s)
    connector = TCPConnector(limit=0, keepalive_timeout=_POOL_S)
    async with ClientSession(
        connector=connector, timeout=timeout, auto_decompress=False, read_bufsize=_BUFFER
    ) as session:
        edge._session = session
        async with listening(app, host, port, tls) as edge.url:
            yield edge

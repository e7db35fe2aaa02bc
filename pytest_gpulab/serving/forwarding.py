"""Passing a request on to another server, and its answer back piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from aiohttp import ClientError, ClientResponse, ClientSession, web
from multidict import CIMultiDict

_HOP_BY_HOP = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"),
    *("te", "trailer", "transfer-encoding", "upgrade"),
}

OwnAnswer = Callable[[int], web.Response]
"""What the proxy itself says with a status: 502 when the server cannot be reached, 504 when it is silent."""


def kept(headers: Mapping[str, str], drop: Iterable[str] = ()) -> CIMultiDict[str]:
    """The headers that go on from one connection to the next, without those named in `drop`."""
    named = CIMultiDict[str](headers)
    left_out = _HOP_BY_HOP | {name.lower() for name in drop}
    for name in list(named):
        if name.lower() in left_out:
            named.popall(name, None)
    return named


async def forward(
    session: ClientSession, request: web.Request, url: str, headers: CIMultiDict[str], own_answer: OwnAnswer
) -> web.StreamResponse:
    """Send `request` to `url`, and its answer to the client: one that breaks off breaks off for the client too."""
    try:
        upstream = await session.request(
            request.method,
            url,
            headers=headers,
            data=request.content if request.body_exists else None,
            allow_redirects=False,
        )
    except TimeoutError:
        return own_answer(504)
    except ClientError:
        return own_answer(502)
    try:
        return await _pass_through(request, upstream, own_answer)
    finally:
        upstream.close()  # after a complete answer the connection is already back in the pool


async def _pass_through(request: web.Request, upstream: ClientResponse, own_answer: OwnAnswer) -> web.StreamResponse:
    response = web.StreamResponse(status=upstream.status, reason=upstream.reason, headers=kept(upstream.headers))
    try:
        piece = await upstream.content.readany()
    except (ClientError, TimeoutError) as broken:
        return own_answer(504 if isinstance(broken, TimeoutError) else 502)
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

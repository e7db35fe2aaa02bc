"""`/api/v1/namespaces/NAMESPACE/pods/NAME/attach`: a container's standard input and output over a WebSocket.

Each message starts with the number of its channel: 0 is stdin, 1 stdout, 2 stderr, 3 the Status at the end. Version 5
of the protocol adds 255, which closes the channel that follows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Final, Protocol

from aiohttp import WSMsgType, web

from pytest_gpulab.cluster.api.requests import flag

PROTOCOLS: Final = ("v5.channel.k8s.io", "v4.channel.k8s.io")
_STDIN, _STDOUT, _ERROR = b"\x00", b"\x01", b"\x03"
_SUCCESS: Final = {"metadata": {}, "status": "Success"}


class Attachable(Protocol):
    """The processes behind pods."""

    def write(self, namespace: str, name: str, data: bytes) -> None:
        """To the process' standard input. ApiError: it has none."""

    def output(self, namespace: str, name: str) -> AsyncIterator[str]:
        """What it writes from now on, to its end. ApiError: it has not started."""


async def attach(processes: Attachable, request: web.Request, namespace: str, name: str) -> web.StreamResponse:
    """Connect the caller with a pod's process until one of them ends."""
    output = processes.output(namespace, name)
    if flag(request.query, "stdin"):
        processes.write(namespace, name, b"")  # refused before the protocol changes
    socket = web.WebSocketResponse(protocols=PROTOCOLS)
    await socket.prepare(request)
    for channel in (_STDIN, _STDOUT, _ERROR):
        await socket.send_bytes(channel)
    telling = asyncio.create_task(_tell(socket, output))
    try:
        async for message in socket:
            data = message.data.encode() if message.type is WSMsgType.TEXT else message.data
            if data[:1] == _STDIN and flag(request.query, "stdin"):
                processes.write(namespace, name, data[1:])
    finally:
        telling.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await telling
    return socket


async def _tell(socket: web.WebSocketResponse, output: AsyncIterator[str]) -> None:
    async for line in output:
        await socket.send_bytes(_STDOUT + line.encode())
    await socket.send_bytes(_ERROR + json.dumps(_SUCCESS).encode())
    await socket.close()

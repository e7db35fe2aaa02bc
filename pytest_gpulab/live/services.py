"""Services: each port of one is an address on loopback, which leads to its Ready pods as kube-proxy's rules do.

Every new connection goes to a pod at random; one without Ready pods is refused. There is no DNS here: pods get these
addresses as Kubernetes gives them to every pod, in variables such as ``VLLM_SERVICE_HOST``.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from urllib.parse import urlsplit

from pytest_gpulab.cluster.events import DELETED, Event
from pytest_gpulab.cluster.objects import Object, name_of, namespace_of, uid_of
from pytest_gpulab.cluster.resources import SERVICE
from pytest_gpulab.cluster.service import ready_targets
from pytest_gpulab.cluster.store import Store
from pytest_gpulab.live.background import Background
from pytest_gpulab.live.servers import ModelServers

_LOOPBACK = "127.0.0.1"
_CHUNK_BYTES = 1 << 16


class ServiceAddresses:
    """The addresses of a cluster's Services, from when they are first asked for until the Service is gone."""

    def __init__(self, store: Store, servers: ModelServers, background: Background) -> None:
        self._store = store
        self._servers = servers
        self._background = background
        self._listening: dict[tuple[str, int], tuple[asyncio.Server, asyncio.Task[None]]] = {}
        store.subscribe(self._forget, SERVICE)

    async def variables(self, namespace: str) -> dict[str, str]:
        """What a pod of the namespace is told of the Services in it."""
        found: dict[str, str] = {}
        for service in self._store.list(SERVICE, namespace):
            name = name_of(service).upper().replace("-", "_")
            for place, port in enumerate(service["spec"].get("ports") or ()):
                number = str(await self._port(service, port["port"]))
                found[f"{name}_SERVICE_HOST"] = _LOOPBACK
                if place == 0:
                    found[f"{name}_SERVICE_PORT"] = number
                if port.get("name"):
                    found[f"{name}_SERVICE_PORT_{port['name'].upper().replace('-', '_')}"] = number
        return found

    async def _port(self, service: Object, port: int) -> int:
        """Where a port of a Service really listens."""
        key = (uid_of(service), port)
        if key not in self._listening:

            async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await self._connected(namespace_of(service), name_of(service), port, reader, writer)

            server = await asyncio.start_server(connected, _LOOPBACK, 0)
            self._listening[key] = (server, self._background.start(_serve(server)))
        return int(self._listening[key][0].sockets[0].getsockname()[1])

    async def _connected(
        self, namespace: str, name: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        targets = ready_targets(self._store, namespace, name, {"number": port})
        urls = [url for uid, number in targets if (url := self._servers.url(uid, number)) is not None]
        try:
            if not urls:
                return
            address = urlsplit(random.choice(urls))
            there, back = await asyncio.open_connection(address.hostname, address.port)
            try:
                await asyncio.gather(_pump(reader, back), _pump(there, writer))
            finally:
                back.transport.abort()
        except OSError:
            pass
        finally:
            writer.transport.abort()

    def _forget(self, event: Event) -> None:
        if event.type == DELETED:
            for key in [key for key in self._listening if key[0] == uid_of(event.object)]:
                self._listening.pop(key)[1].cancel()


async def _serve(server: asyncio.Server) -> None:
    async with server:
        await asyncio.get_running_loop().create_future()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what comes, and its end."""
    while data := await reader.read(_CHUNK_BYTES):
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()

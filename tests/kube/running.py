"""An embedded cluster in a thread of this process: what is behind its API can be looked at."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pytest_gpulab.cluster.api.server import ApiServer
from pytest_gpulab.cluster.cloud import Instance
from pytest_gpulab.cluster.resources import BUILT_IN, NODE, NODE_CLAIM
from pytest_gpulab.fleet import NO_FAULTS, Faults
from pytest_gpulab.live.cluster import LiveCluster, live_cluster

SPEED = 300.0

Trouble = Callable[[web.Request, int], int | None]
"""Given a request and its number: the status to answer instead, 0 to drop the connection, None to let it pass."""


class Running:
    """A cluster that runs, and what only its operator can see."""

    def __init__(self, live: LiveCluster, kubeconfig: Path) -> None:
        self.live = live
        self.kubeconfig = kubeconfig

    def labelled(self, run: str = "") -> list[str]:
        """Every object with the label of a run, or of any."""
        store = self.live.embedded.store
        found = [obj for kind in BUILT_IN for obj in store.list(kind)]
        return [
            f"{obj['kind']} {obj['metadata']['name']}"
            for obj in found
            if (label := (obj["metadata"].get("labels") or {}).get("gpulab.dev/run")) and run in ("", label)
        ]

    def machines(self) -> list[str]:
        """Ids of GPU instances that somebody still pays for."""
        return [one.id for one in self._gpu_instances() if one.stopped is None]

    def launched(self) -> int:
        """How many GPU instances were ever bought."""
        return len(self._gpu_instances())

    def capacity(self) -> list[str]:
        """Nodes and NodeClaims with the taint that keeps others off GPU nodes."""
        store = self.live.embedded.store
        found = [obj for kind in (NODE, NODE_CLAIM) for obj in store.list(kind)]
        return [obj["metadata"]["name"] for obj in found if "nvidia.com/gpu" in str(obj["spec"].get("taints"))]

    def _gpu_instances(self) -> list[Instance]:
        return [one for one in self.live.embedded.cloud.instances.values() if one.offering.type.gpus]


@contextmanager
def running(folder: Path, *, faults: Faults = NO_FAULTS, speed: float = SPEED) -> Iterator[Running]:
    """A cluster until the block ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def call(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    context = live_cluster(speed=speed, faults=faults)
    live = call(context.__aenter__())
    kubeconfig = folder / "cluster.kubeconfig"
    live.api.write_kubeconfig(kubeconfig)
    try:
        yield Running(live, kubeconfig)
    finally:
        call(context.__aexit__(None, None, None))
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def trouble(monkeypatch: pytest.MonkeyPatch, choose: Trouble) -> None:
    """Servers that are started from now on fail as `choose` says."""
    handle = ApiServer._handle
    asked = 0

    async def failing(self: ApiServer, request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        status = choose(request, asked)
        if status is None:
            return await handle(self, request)
        if status == 0:
            assert request.transport is not None
            request.transport.abort()
            raise ConnectionResetError
        return web.json_response({"kind": "Status", "message": f"injected {status}"}, status=status)

    monkeypatch.setattr(ApiServer, "_handle", failing)

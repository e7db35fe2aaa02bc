"""`live_cluster`: the controllers, the API, the pods' servers and the load balancers, in the running event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import ClientSession, ClientTimeout, TCPConnector

from pytest_gpulab.cluster.api.access import new_certificates
from pytest_gpulab.cluster.api.custom_metrics import pod_metrics
from pytest_gpulab.cluster.api.server import ApiServer
from pytest_gpulab.cluster.auto_mode import C6A_LARGE, DEFAULT_CLASS, GENERAL_PURPOSE
from pytest_gpulab.cluster.cloud import catalog, instance_types
from pytest_gpulab.cluster.embedded import EmbeddedCluster
from pytest_gpulab.cluster.resources import NODE_CLASS, NODE_POOL
from pytest_gpulab.fleet import NO_FAULTS, Faults
from pytest_gpulab.live.background import Background, WatchedClock
from pytest_gpulab.live.containers import JobContainers
from pytest_gpulab.live.ingress import DEREGISTRATION_S, Ingresses
from pytest_gpulab.live.logs import PodLogs
from pytest_gpulab.live.orders import obey
from pytest_gpulab.live.proxy import PodProxy
from pytest_gpulab.live.servers import ModelServers
from pytest_gpulab.live.services import ServiceAddresses


@dataclass(frozen=True)
class LiveCluster:
    """A cluster that runs. `failed` gets the exception when a part of it crashes: nothing can be relied on then."""

    api: ApiServer
    embedded: EmbeddedCluster
    containers: JobContainers
    failed: asyncio.Future[None]


@asynccontextmanager
async def live_cluster(
    *, port: int = 0, speed: float = 1.0, seed: int = 0, faults: Faults = NO_FAULTS
) -> AsyncIterator[LiveCluster]:
    """Run an empty cluster until the context ends; nothing listens after that.

    Custom metrics are those of the prometheus-adapter's ConfigMap; without one there are none.

    Args:
        port: of the API on 127.0.0.1; 0 takes a free one.
        speed: cluster seconds in one real second. Requests take their own time at any speed.

    Raises:
        OSError: the port is taken.
        RuntimeError: a part crashed while it ran; its cause is that error.
    """
    background = Background()
    clock = WatchedClock(speed, background.fail)
    embedded = EmbeddedCluster(
        clock,
        seed=seed,
        faults=faults,
        offerings=catalog((*instance_types(), C6A_LARGE)),
        read=lambda pod: servers.read(pod),
        rules=(),
    )
    store = embedded.store
    obey(embedded)
    embedded.apply(NODE_CLASS, DEFAULT_CLASS)
    embedded.apply(NODE_POOL, GENERAL_PURPOSE)
    logs = PodLogs(store, clock)
    servers = ModelServers(store, clock, background, logs)
    servers.attach(embedded.kubelets.hooks)
    services = ServiceAddresses(store, servers, background)
    containers = JobContainers(store, embedded.kubelets, background, logs, services)
    containers.attach(embedded.kubelets.hooks)
    delay, certificates = DEREGISTRATION_S / speed, new_certificates()
    embedded.manager.add(Ingresses(store, clock, embedded.durations, servers, background, delay, certificates))
    metrics = pod_metrics(store, embedded.prometheus.metric_list)
    connector = TCPConnector(limit=0, force_close=True)
    async with ClientSession(connector=connector, timeout=ClientTimeout(), auto_decompress=False) as session:
        proxy = PodProxy(store, servers, session)
        async with ApiServer(
            store,
            port=port,
            metrics=metrics,
            logs=logs.read,
            processes=containers,
            proxy=proxy,
            certificates=certificates,
        ) as api:
            try:
                yield LiveCluster(api, embedded, containers, background.failed)
            finally:
                clock.stop()
                await background.stop()
    if background.failed.done():
        raise RuntimeError("a part of the cluster crashed") from background.failed.exception()
    background.failed.cancel()

"""`gpulab cluster`: the embedded cluster behind its API until it is interrupted."""

from __future__ import annotations

import asyncio
import signal
from argparse import Namespace
from pathlib import Path

from pytest_gpulab.cluster.api.custom_metrics import pod_metrics
from pytest_gpulab.cluster.api.server import ApiServer
from pytest_gpulab.cluster.clock import RealClock
from pytest_gpulab.cluster.embedded import EmbeddedCluster


def run(options: Namespace) -> int:
    """Serve until SIGINT or SIGTERM; the kubeconfig is removed at the end."""
    asyncio.run(_serve(options.kubeconfig, options.port, options.speed, options.seed))
    return 0


async def _serve(path: Path, port: int, speed: float, seed: int) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    cluster = EmbeddedCluster(RealClock(speed), seed=seed)
    metrics = pod_metrics(cluster.store, cluster.prometheus.metric_list)
    async with ApiServer(cluster.store, port=port, metrics=metrics) as server:
        server.write_kubeconfig(path)
        print(f"{server.url} is up: kubectl --kubeconfig {path} get nodes", flush=True)
        try:
            await stopped.wait()
        finally:
            path.unlink(missing_ok=True)

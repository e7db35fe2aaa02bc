"""`gpulab cluster`: the embedded cluster in real time, until it is interrupted."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from pytest_gpulab.serving.command import loop_factory, port, stopping_on_signals


def add_cluster(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "cluster",
        help="run the embedded cluster behind a Kubernetes API on loopback",
        description="Runs the embedded cluster until it is interrupted, for kubectl and the kubernetes client. Pods "
        "with a GPU are emulated vLLM servers, an Ingress is a load balancer on 127.0.0.1.",
    )
    parser.add_argument(
        "--kubeconfig",
        required=True,
        type=Path,
        metavar="FILE",
        help="write the way in here: a new file, removed at the end",
    )
    parser.add_argument("--port", type=port, default=0, help="on 127.0.0.1 (default: any free one)")
    parser.add_argument(
        "--speed", type=float, default=1.0, help="cluster seconds a second; requests take their own time (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of durations and names (default: 0)")
    parser.add_argument(
        "--faults", "--fleet-faults", type=Path, metavar="FILE", help="what goes wrong: a Faults definition as JSON"
    )
    parser.set_defaults(run=run_cluster)


def run_cluster(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; the kubeconfig is removed at the end, whatever ends it.

    ValueError when that file is there already.
    """
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_run(options))
    return 0


async def _run(options: argparse.Namespace) -> None:
    from pytest_gpulab.fleet import NO_FAULTS, Faults
    from pytest_gpulab.live.cluster import live_cluster

    path: Path = options.kubeconfig
    faults = Faults.model_validate_json(options.faults.read_text(encoding="utf-8")) if options.faults else NO_FAULTS
    with stopping_on_signals() as stop:
        async with live_cluster(port=options.port, speed=options.speed, seed=options.seed, faults=faults) as cluster:
            cluster.api.write_kubeconfig(path)
            try:
                print(f"{cluster.api.url} is up: kubectl --kubeconfig {path} get nodes", flush=True)
                cluster.failed.add_done_callback(lambda failed: stop.set())
                await stop.wait()
            finally:
                cluster.api.remove_kubeconfig(path)

"""`serve`: a profile as a running server."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from pytest_gpulab.engine.calibration import find_variant
from pytest_gpulab.engine.defaults import scheduler_config
from pytest_gpulab.engine.scheduler import SchedulerConfig
from pytest_gpulab.experiment import Profile
from pytest_gpulab.models import find_model
from pytest_gpulab.serving.app import Service, make_app
from pytest_gpulab.serving.clock import ModelClock
from pytest_gpulab.serving.engine_loop import EngineLoop
from pytest_gpulab.serving.metrics import Metrics
from pytest_gpulab.serving.protocol import Limits

_KEEP_ALIVE_S = 5.0
"""Real seconds an idle connection is kept, as vLLM does."""


@dataclass(frozen=True)
class Server:
    """A server that runs. `url` has no path: append ``/v1`` for OpenAI clients."""

    url: str
    model: str
    engine: EngineLoop


@asynccontextmanager
async def serve(
    profile: Profile,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    speed: float = 1.0,
    model_name: str | None = None,
    api_key: str | None = None,
    calibration: str | None = None,
) -> AsyncIterator[Server]:
    """Serve `profile` over HTTP until the context ends; requests that are unanswered then are dropped.

    Args:
        port: 0 takes a free one; `url` says which.
        speed: model seconds in one real second. Clients see latencies divided by it; ``/metrics`` has model seconds.
        model_name: what clients call the model; default: the profile's name of it.
        api_key: if given, requests below /v1 need it as a bearer token.
        calibration: the step costs, as for `simulate`.

    Raises:
        ValueError: the profile has no calibration, or vLLM would refuse its engine arguments.
        OSError: the port is taken.
    """
    source, variant = find_variant(profile, calibration)
    config = scheduler_config(profile, source.reserved_bytes)
    name = model_name or profile.model
    metrics = Metrics(name, config.max_model_len, _cache_config(profile, config))
    engine = EngineLoop(config, variant, ModelClock(speed), metrics, eager=profile.engine_args.enforce_eager)
    limits = Limits(name, find_model(profile.model).vocab_size, config.max_model_len)
    service = Service(engine, limits, (api_key,) if api_key else (), int(time.time()))
    stepping = asyncio.create_task(engine.run())
    try:
        async with listening(make_app(service), host, port) as url:
            yield Server(url, name, engine)
            await _stop(stepping)  # before the sockets close, so that open streams end at once
    finally:
        await _stop(stepping)


@asynccontextmanager
async def listening(
    app: web.Application, host: str, port: int, tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """The application on a socket, behind TLS if asked; gives its URL. A handler is cancelled when its client leaves.

    A context that ends with an exception or is cancelled is a process that was killed: its connections are cut.
    """
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, keepalive_timeout=_KEEP_ALIVE_S, shutdown_timeout=0.2
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, ssl_context=tls, backlog=2048)
        await site.start()
        bound = runner.addresses[0]
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        yield f"{'https' if tls else 'http'}://{shown}:{bound[1]}"
    except BaseException:
        for connection in runner.server.connections if runner.server else ():
            connection.force_close()
        raise
    finally:
        await runner.cleanup()


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _cache_config(profile: Profile, config: SchedulerConfig) -> dict[str, object]:
    """Labels of ``vllm:cache_config_info``."""
    args = profile.engine_args
    return {
        "block_size": config.block_size,
        "cache_dtype": args.kv_cache_dtype,
        "enable_prefix_caching": config.enable_prefix_caching,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "num_gpu_blocks": config.num_blocks,
        "num_gpu_blocks_override": args.num_gpu_blocks_override,
    }

"""``gpulab serve``: an emulated vLLM on a port, until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_DEFAULT_PORT = 8000


def add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "serve",
        help="serve an emulated vLLM over HTTP",
        description="Serves a model on an accelerator with vLLM's HTTP routes and metrics. Answers are emulated: "
        "tokens mean nothing, their times are those of the calibration.",
    )
    parser.add_argument("--model", required=True, help="such as llama-3.1-8b")
    parser.add_argument("--accelerator", required=True, help="such as h200")
    parser.add_argument("--engine-args", default="{}", metavar="JSON", help="vLLM engine arguments, by vLLM's names")
    parser.add_argument("--served-model-name", metavar="NAME", help="what clients call the model (default: --model)")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default: %(default)s)")
    parser.add_argument("--port", type=port, default=_DEFAULT_PORT, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--speed", type=float, default=1.0, help="model seconds in one real second (default: 1)")
    parser.add_argument(
        "--api-key",
        default=os.environ.get("VLLM_API_KEY"),
        metavar="KEY",
        help="bearer token that requests below /v1 need (default: $VLLM_API_KEY, else no check)",
    )
    parser.set_defaults(run=run_serve)


def port(text: str) -> int:
    """A TCP port as argparse's ``type``; a greater number would be taken modulo 65536 by the system."""
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"must be a port from 0 to 65535, got {text!r}")
    return int(text)


def run_serve(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. The first line on stdout is the URL."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_serve(options))
    return 0


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed, else asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


@contextmanager
def stopping_on_signals() -> Iterator[asyncio.Event]:
    """An event that SIGINT and SIGTERM set while the running loop is in here; afterwards they end the process again.

    A loop of uvloop's that is closed with handlers leaves its own behind, which swallows every signal.
    """
    loop, stop, signals = asyncio.get_running_loop(), asyncio.Event(), (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


async def _serve(options: argparse.Namespace) -> None:
    from pytest_gpulab.experiment import EngineArgs, Profile
    from pytest_gpulab.serving.server import serve

    profile = Profile(
        model=options.model,
        accelerator=options.accelerator,
        engine_args=EngineArgs.model_validate_json(options.engine_args),
    )
    with stopping_on_signals() as stop:
        async with serve(
            profile,
            host=options.host,
            port=options.port,
            speed=options.speed,
            model_name=options.served_model_name,
            api_key=options.api_key,
        ) as server:
            print(server.url, flush=True)
            await stop.wait()

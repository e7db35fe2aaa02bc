"""What a vLLM container's arguments and environment say to its HTTP server; the engine's are in `vllm_args`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from pytest_gpulab.engine.calibration import find_variant
from pytest_gpulab.engine.defaults import scheduler_config
from pytest_gpulab.experiment import Profile
from pytest_gpulab.vllm_args import dashed, from_argv


@dataclass(frozen=True)
class ServerArguments:
    """A server that vLLM would start. `drain_s`: how long it finishes requests after SIGTERM, seconds."""

    profile: Profile
    model_name: str
    port: int
    drain_s: float
    api_key: str | None = field(repr=False)


def read_arguments(argv: Sequence[str], environment: Mapping[str, str], accelerator: str) -> ServerArguments:
    """The server that `argv` starts on a GPU.

    Defaults are vLLM's: port 8000, no drain, the key in ``VLLM_API_KEY``, clients call the model what `--model` says.

    Raises:
        ValueError: vLLM would exit with an error, or the lab has no calibration for it.
    """
    parser = _Parser(prog="vllm", add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    parser.add_argument("--served-model-name")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--shutdown-timeout", type=float, default=0.0)
    parser.add_argument("--api-key", default=environment.get("VLLM_API_KEY") or None)
    given, engine = parser.parse_known_args(dashed(argv))
    model = ["--model", given.model] if given.model else []
    profile = from_argv([*model, *engine], accelerator)
    calibration, _ = find_variant(profile)
    scheduler_config(profile, calibration.reserved_bytes)
    name = given.served_model_name or given.model
    return ServerArguments(profile, name, given.port, given.shutdown_timeout, given.api_key)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"vLLM's arguments cannot be read: {message}")

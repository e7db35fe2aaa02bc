"""The target `vllm`: real vLLM on this machine, started with each profile's arguments."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.experiment import ClosedLoop, Profile, Shape, Workload
from pytest_gpulab.gates import TargetRefused
from pytest_gpulab.models import find_model
from pytest_gpulab.run import CLIENT_FAILED, Basis, Run
from pytest_gpulab.targets import machine
from pytest_gpulab.targets.base import MEASURED_REPEATS, Serving
from pytest_gpulab.targets.loading import Loading
from pytest_gpulab.targets.server import Server, StartFailed
from pytest_gpulab.vllm_args import to_argv

if TYPE_CHECKING:
    from pytest_gpulab.options import Options

WARM_UP = Workload(arrivals=ClosedLoop(concurrency=4), shape=Shape(prompt_tokens=128, output_tokens=16), requests=16)
"""Sent to a fresh server before it is measured: its first requests pay for what is loaded on first use."""

_SERVER_KEY = "VLLM_API_KEY"
"""Environment variable from which the server takes the key that it asks for."""


class VllmTarget:
    """One server at a time, kept as long as the runs ask for its arguments.

    Args:
        model_dir: folder with one folder a model, named as in `pytest_gpulab.models`; a model without weights is
            served with random ones. None: models come from where they are published.
        log_dir: where servers leave their logs, and Ctrl-C what there was of a run.
        tell: takes a line for the user.
    """

    name = "vllm"
    basis: Basis = "measured"
    max_repeats = MEASURED_REPEATS
    repeatable = False

    def __init__(self, model_dir: Path | None, log_dir: Path, tell: Callable[[str], None]) -> None:
        self._model_dir = model_dir
        self._log_dir = log_dir
        self._tell = tell
        self._loading = Loading(log_dir / "interrupted", tell)
        self._running: Server | None = None
        self._starts = 0
        self._refused: dict[tuple[str, ...], str] = {}

    @classmethod
    def from_options(cls, options: Options, tell: Callable[[str], None], serving: Serving) -> Self:
        return cls(options.model_dir, options.report_dir / "vllm", tell)

    def server(self, profile: Profile) -> str:
        """vLLM's version, the GPU and its driver, and whether the weights are random."""
        if self._refusal(profile) or self._vllm is None:
            return ""
        gpu = f"{self._gpu.name}, driver {self._gpu.driver}" if self._gpu else "no GPU"
        weights = ", random weights" if self._has_random_weights(profile) else ""
        return f"{self._vllm.version}, {gpu}{weights}"

    def run(self, workload: Workload, profile: Profile, seed: int) -> Run:
        """Load the profile's server, started if another one runs; its starts stand in the run's timeline."""
        refusal = self._refusal(profile)
        if refusal:
            raise TargetRefused(refusal)
        server = self._server_for(profile)
        started_s = server.started - time.monotonic()
        run = self._load(workload, profile, seed, server)
        start = (started_s, f"server start {self._starts} of this session; ready after {server.ready_s:.0f} s")
        return replace(run, timeline=(start, *run.timeline))

    def close(self) -> None:
        """Stop the server."""
        if self._running is not None:
            self._running.stop()
            self._running = None

    # --- what can be served here --------------------------------------------------------------------------------

    @cached_property
    def _gpu(self) -> machine.Gpu | None:
        return machine.find_gpu()

    @cached_property
    def _vllm(self) -> machine.Vllm | None:
        return machine.find_vllm()

    def _refusal(self, profile: Profile) -> str:
        """Why this machine cannot serve `profile`; empty when it can."""
        if profile.fleet is not None:
            return "the target vllm is one server: a profile with a fleet needs a cluster"
        there = self._gpu.accelerators if self._gpu else {machine.CPU}
        if profile.accelerator not in there:
            shown = self._gpu.name if self._gpu else "no GPU (nvidia-smi shows none)"
            return f"this machine must have the profile's accelerator {profile.accelerator}, it has {shown}"
        if self._vllm is None:
            return "vLLM must be installed here, or its command be on the PATH: neither was found"
        if self._model_dir is not None and not self._folder(profile).is_dir():
            return f"--gpulab-model-dir must hold a folder {profile.model}, {self._model_dir} does not"
        return ""

    def _folder(self, profile: Profile) -> Path:
        assert self._model_dir is not None
        return self._model_dir / profile.model

    def _has_random_weights(self, profile: Profile) -> bool:
        if self._model_dir is None:
            return False
        return not any(any(self._folder(profile).glob(f"*.{kind}")) for kind in ("safetensors", "bin", "pt", "gguf"))

    # --- the server ---------------------------------------------------------------------------------------------

    def _server_for(self, profile: Profile) -> Server:
        """The running server when it has the profile's arguments, else a new one. TargetRefused: none will answer."""
        arguments = self._arguments(profile)
        if self._running is not None and self._running.is_running and self._running.arguments == arguments:
            return self._running
        self.close()
        if arguments in self._refused:
            raise TargetRefused(self._refused[arguments])
        try:
            self._running = self._start(profile, arguments)
        except StartFailed as failure:
            self._refused[arguments] = str(failure)
            raise TargetRefused(str(failure)) from None
        return self._running

    def _start(self, profile: Profile, arguments: tuple[str, ...]) -> Server:
        """A new server, warm. StartFailed: it does not start, or does not answer."""
        assert self._vllm is not None
        self._starts += 1
        self._log_dir.mkdir(parents=True, exist_ok=True)
        log = self._log_dir / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{self._starts}.log"
        self._tell(f"starting vLLM: {' '.join(arguments)}")
        server = Server(self._vllm.python, arguments, log)
        try:
            self._warm_up(profile, server)
        except BaseException:  # a server that is not warm is not measured
            server.stop()
            raise
        return server

    def _warm_up(self, profile: Profile, server: Server) -> None:
        """Send the first requests. StartFailed when they are not all delivered: a run's would not be either."""
        run = self._load(WARM_UP, profile, 0, server)
        if not run.requests["ok"].all():
            failed = [(name, n) for name, n in run.totals.items() if name.startswith(CLIENT_FAILED)]
            counted = ", ".join(f"{n:.0f} {name.removeprefix(CLIENT_FAILED)}" for name, n in failed)
            raise StartFailed(
                f"vLLM must answer the first {len(run.requests)} requests in full, got {counted}; see {server.log}"
            )

    def _arguments(self, profile: Profile) -> tuple[str, ...]:
        model = find_model(profile.model).repository if self._model_dir is None else str(self._folder(profile))
        random = ("--load-format", "dummy") if self._has_random_weights(profile) else ()
        return (*to_argv(profile, model), *random)

    def _load(self, workload: Workload, profile: Profile, seed: int, server: Server) -> Run:
        endpoint = Endpoint(
            server.url,
            profile.model,
            api_key=os.environ.get(_SERVER_KEY),
            metrics_urls=(f"{server.url}/metrics",),
        )
        return self._loading.run(
            workload, profile, seed, endpoint=endpoint, target=self.name, server=self.server(profile)
        )

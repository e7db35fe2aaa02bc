"""The emulated vLLM behind each pod with a GPU: it begins, drains and is killed when the kubelet says so."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pytest_gpulab.cluster.clock import Clock
from pytest_gpulab.cluster.cloud import GPU
from pytest_gpulab.cluster.environment import environment
from pytest_gpulab.cluster.events import DELETED, Event
from pytest_gpulab.cluster.kubelet import Hooks
from pytest_gpulab.cluster.metrics import RUNNING, WAITING
from pytest_gpulab.cluster.objects import Object, at, timestamp, uid_of
from pytest_gpulab.cluster.resources import NODE, POD
from pytest_gpulab.cluster.store import Store
from pytest_gpulab.live.arguments import ServerArguments, read_arguments
from pytest_gpulab.live.background import Background
from pytest_gpulab.live.logs import PodLogs
from pytest_gpulab.serving.server import Server, serve

_GPU_NAME: Final = "eks.amazonaws.com/instance-gpu-name"
"""The label of a node that says which accelerator its instance type has."""
_KV_USAGE: Final = "vllm:kv_cache_usage_perc"


@dataclass
class _Process:
    """One run of a pod's server. `server` is set while it listens."""

    arguments: ServerArguments
    task: asyncio.Task[None] | None = None
    server: Server | None = None
    drained_by: float = math.inf
    """After SIGTERM: when it gives up the requests that are left, Unix seconds of the cluster."""
    leave: asyncio.Event = field(default_factory=asyncio.Event)


class ModelServers:
    """The servers of a cluster, by their pods' uids. Every server runs at speed 1, whatever the cluster's speed."""

    def __init__(self, store: Store, clock: Clock, background: Background, logs: PodLogs) -> None:
        self._store = store
        self._clock = clock
        self._background = background
        self._processes: dict[str, _Process] = {}
        self._logs = logs
        store.subscribe(self._forget, POD)

    def attach(self, hooks: Hooks) -> None:
        """Follow the kubelets."""
        hooks.refusal = self._refusal
        hooks.answers = self._answers
        hooks.drains = self._drains
        hooks.healthy.append(self._start)
        hooks.terminated.append(self._terminate)
        hooks.stopped.append(self._kill)

    # what others ask

    def url(self, uid: str, port: int) -> str | None:
        """Where a pod's server listens really; None when nothing listens on that port of the pod."""
        process = self._processes.get(uid)
        if process is None or process.server is None or process.arguments.port != port:
            return None
        return process.server.url

    def read(self, pod: Object) -> Mapping[str, float] | None:
        """The gauges that Prometheus scrapes; None when the pod has no server that listens."""
        process = self._processes.get(uid_of(pod))
        if process is None or process.server is None:
            return None
        state = process.server.engine.state()
        return {RUNNING: state.running, WAITING: state.waiting, _KV_USAGE: state.kv_usage}

    # what the kubelets ask and say

    def _refusal(self, pod: Object) -> str:
        """The process is created with what arguments and Secrets say now; it listens when the model is loaded."""
        try:
            arguments = self._arguments(pod)
        except ValueError as error:
            self._write(pod, f"ERROR {error}")
            return str(error)
        if arguments is not None:
            self._processes[uid_of(pod)] = _Process(arguments)
        return ""

    def _answers(self, pod: Object) -> bool:
        process = self._processes.get(uid_of(pod))
        return process is None or process.server is not None

    def _drains(self, pod: Object) -> bool:
        process = self._processes.get(uid_of(pod))
        if process is None or process.server is None:
            return False
        return process.server.engine.clients > 0 and self._clock.now() < process.drained_by

    def _start(self, pod: Object) -> None:
        process = self._processes.get(uid_of(pod))
        if process is not None:
            process.task = self._background.start(self._run(pod, process))

    def _terminate(self, pod: Object) -> None:
        """SIGTERM: without a drain time, vLLM aborts its requests and ends."""
        process = self._processes.get(uid_of(pod))
        if process is not None:
            self._write(pod, "INFO Shutting down")
            process.drained_by = self._clock.now() + process.arguments.drain_s
            if not process.arguments.drain_s:
                process.leave.set()

    def _kill(self, pod: Object) -> None:
        process = self._processes.pop(uid_of(pod), None)
        if process is not None and process.task is not None:
            process.task.cancel()

    async def _run(self, pod: Object, process: _Process) -> None:
        arguments = process.arguments
        async with serve(arguments.profile, model_name=arguments.model_name, api_key=arguments.api_key) as server:
            process.server = server
            self._write(pod, f"INFO Serving {arguments.model_name} (emulated) on port {arguments.port}")
            try:
                await process.leave.wait()
            finally:
                process.server = None

    def _arguments(self, pod: Object) -> ServerArguments | None:
        """What its container asks vLLM for; None for a pod without a GPU. ValueError when vLLM would refuse it."""
        container: dict[str, Any] = pod["spec"]["containers"][0]
        node = self._store.find(NODE, pod["spec"]["nodeName"])
        accelerator = at(node, "metadata.labels", {}).get(_GPU_NAME)
        if accelerator is None or GPU not in at(container, "resources.limits", {}):
            return None
        variables = environment(self._store, pod, container)
        return read_arguments(container.get("args") or (), variables, accelerator)

    def _write(self, pod: Object, line: str) -> None:
        self._logs.write(uid_of(pod), f"{timestamp(self._clock.now())} {line}")

    def _forget(self, event: Event) -> None:
        if event.type == DELETED:
            self._kill(event.object)

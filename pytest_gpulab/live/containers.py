"""The containers of Jobs: real processes on this machine, as far as they run Python.

A container whose command is ``python3`` runs this Python with its arguments, its environment and nothing of this
process' own but the PATH. There is no image and no file system of its own: its ConfigMaps, Secrets and empty volumes
are folders, and what names their mount paths in arguments and environment names the folders. Its output is the pod's
log, its exit status that of the container. Every other command is one that its image does not have.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
from base64 import b64decode
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pytest_gpulab.cluster.environment import environment
from pytest_gpulab.cluster.errors import BadRequest
from pytest_gpulab.cluster.kubelet import Hooks, Kubelets
from pytest_gpulab.cluster.objects import Object, at, controller_of, name_of, namespace_of, uid_of
from pytest_gpulab.cluster.resources import CONFIG_MAP, POD, SECRET
from pytest_gpulab.cluster.store import Store
from pytest_gpulab.live.background import Background
from pytest_gpulab.live.logs import PodLogs
from pytest_gpulab.live.services import ServiceAddresses

PYTHON: Final = ("python", "python3")
_LONGEST_LINE: Final = 1 << 20


@dataclass
class _Container:
    """One run. Signals that come before the process does are given to it when it is there."""

    process: asyncio.subprocess.Process | None = None
    signals: list[int] = field(default_factory=list)

    def signal(self, number: int) -> None:
        if self.process is None:
            self.signals.append(number)
        elif number == signal.SIGKILL:
            _kill_all(self.process)
        else:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


class JobContainers:
    """The processes of a cluster's Jobs, by their pods' uids."""

    def __init__(
        self,
        store: Store,
        kubelets: Kubelets,
        background: Background,
        logs: PodLogs,
        services: ServiceAddresses,
    ) -> None:
        self._store = store
        self._kubelets = kubelets
        self._background = background
        self._logs = logs
        self._services = services
        self._running: dict[str, _Container] = {}

    def attach(self, hooks: Hooks) -> None:
        """Follow the kubelets, beside the model servers."""
        refusal, drains = hooks.refusal, hooks.drains
        hooks.refusal = lambda pod: self._refusal(pod) or refusal(pod)
        hooks.drains = lambda pod: uid_of(pod) in self._running or drains(pod)
        hooks.starts = self._start
        hooks.terminated.append(lambda pod: self._signal(pod, signal.SIGTERM))
        hooks.stopped.append(self._kill)

    def pid(self, namespace: str, name: str) -> int | None:
        """Of a pod's process; None when none runs."""
        found = self._running.get(uid_of(self._store.get(POD, name, namespace)))
        return found.process.pid if found and found.process else None

    def write(self, namespace: str, name: str, data: bytes) -> None:
        """To the standard input of a pod's process. BadRequest: it has none."""
        found = self._running.get(uid_of(self._store.get(POD, name, namespace)))
        if found is None or found.process is None or found.process.stdin is None:
            raise BadRequest(f"pod {name} has no process with a standard input")
        found.process.stdin.write(data)

    def output(self, namespace: str, name: str) -> AsyncIterator[str]:
        """What a pod's process writes from now on."""
        return self._logs.read(namespace, name, {"follow": "true", "tailLines": "0"})

    # what the kubelets say

    def _start(self, pod: Object) -> bool:
        if not _is_job(pod):
            return False
        self._running[uid_of(pod)] = container = _Container()
        self._background.start(self._run(pod, container))
        return True

    def _signal(self, pod: Object, number: int) -> None:
        if (container := self._running.get(uid_of(pod))) is not None:
            container.signal(number)

    def _kill(self, pod: Object) -> None:
        if (container := self._running.pop(uid_of(pod), None)) is not None:
            container.signal(signal.SIGKILL)

    # the process

    async def _run(self, pod: Object, container: _Container) -> None:
        """From its start to its end; the kubelet hears of the end unless it has brought it about."""
        uid = uid_of(pod)
        async with self._started(pod) as container.process:
            for number in container.signals:
                container.signal(number)
            assert container.process.stdout is not None
            async for line in container.process.stdout:
                self._logs.write(uid, line.decode(errors="replace").rstrip("\n"))
            code = await container.process.wait()
        self._logs.end(uid)
        if self._running.pop(uid, None) is not None:
            self._kubelets.exited(pod, _status(code))

    @contextlib.asynccontextmanager
    async def _started(self, pod: Object) -> AsyncIterator[asyncio.subprocess.Process]:
        spec: dict[str, Any] = pod["spec"]["containers"][0]
        folder = Path(tempfile.mkdtemp(prefix=f"gpulab-{name_of(pod)}-"))
        try:
            places = self._mounted(pod, spec, folder)
            links = await self._services.variables(namespace_of(pod)) if _wants_links(pod) else {}
            variables = {**links, **environment(self._store, pod, spec)}
            words = [*spec["command"][1:], *(spec.get("args") or ())]
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *(_placed(word, places) for word in words),
                env={
                    "PATH": os.environ.get("PATH", os.defpath),
                    **{name: _placed(value, places) for name, value in variables.items()},
                },
                cwd=folder,
                stdin=asyncio.subprocess.PIPE if spec.get("stdin") else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                limit=_LONGEST_LINE,
                start_new_session=True,
            )
            try:
                yield process
            finally:
                _kill_all(process)
                await process.wait()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _mounted(self, pod: Object, container: dict[str, Any], folder: Path) -> dict[str, str]:
        """Mount path to folder, filled."""
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes") or ()}
        places = {}
        for mount in container.get("volumeMounts") or ():
            place = folder / mount["name"]
            place.mkdir(exist_ok=True)
            for name, content in self._contents(namespace_of(pod), volumes[mount["name"]]).items():
                (place / name).write_bytes(content)
            places[mount["mountPath"]] = str(place)
        return places

    def _contents(self, namespace: str, volume: dict[str, Any]) -> dict[str, bytes]:
        if "configMap" in volume:
            found = self._store.find(CONFIG_MAP, volume["configMap"]["name"], namespace)
            texts = {name: text.encode() for name, text in at(found, "data", {}).items()}
            return {**texts, **_decoded(at(found, "binaryData", {}))}
        if "secret" in volume:
            return _decoded(at(self._store.find(SECRET, volume["secret"]["secretName"], namespace), "data", {}))
        return {}

    def _refusal(self, pod: Object) -> str:
        """Why a Job's container cannot be started; empty when it can, or is none of a Job's."""
        if not _is_job(pod):
            return ""
        command = pod["spec"]["containers"][0].get("command") or ["the image's own command"]
        if command[0] not in PYTHON:
            return f"exec: {command[0]!r}: the embedded cluster runs {' and '.join(PYTHON)} only"
        for volume in pod["spec"].get("volumes") or ():
            for kind, name in ((CONFIG_MAP, at(volume, "configMap.name")), (SECRET, at(volume, "secret.secretName"))):
                if name and self._store.find(kind, name, namespace_of(pod)) is None:
                    return f'{kind.singular} "{name}" not found'
        return ""


def _decoded(values: Mapping[str, str]) -> dict[str, bytes]:
    return {name: b64decode(value) for name, value in values.items()}


def _placed(text: str, places: Mapping[str, str]) -> str:
    """What a word says of mounted paths, said of the folders."""
    paths = sorted(map(re.escape, places), key=len, reverse=True)
    return re.sub(rf"(?:{'|'.join(paths)})(?=/|$|:)", lambda found: places[found[0]], text) if paths else text


def _is_job(pod: Object) -> bool:
    return bool(at(controller_of(pod), "kind") == "Job")


def _wants_links(pod: Object) -> bool:
    return bool(at(pod, "spec.enableServiceLinks", True))


def _kill_all(process: asyncio.subprocess.Process) -> None:
    """With what it has started: nothing of a container outlives its first process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _status(code: int) -> int:
    """As a container has it: 128 and the signal."""
    return 128 - code if code < 0 else code

"""An API server in a thread of its own, for tests that use blocking clients."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from pytest_gpulab.cluster.api.server import ApiServer
from pytest_gpulab.cluster.store import Store

EPOCH = 1_767_225_600.0


class StillClock:
    """Time moves when a test moves it."""

    def __init__(self) -> None:
        self.time = EPOCH

    def now(self) -> float:
        return self.time


class Served:
    """A store behind an API. `do` runs something on the store in the server's loop."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.clock = StillClock()
        self.store = Store(self.clock)
        self.server = ApiServer(self.store, **options)
        self.config = folder / "kubeconfig"
        self.folder = folder
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> Served:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.server.start(), self._loop).result(10)
        self.server.write_kubeconfig(self.config)
        return self

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def do(self, action: Callable[[], Any]) -> Any:
        done: Future[Any] = Future()

        def run() -> None:
            try:
                done.set_result(action())
            except BaseException as error:
                done.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return done.result(10)

    def kubectl(self, *words: str, stdin: str = "", ok: bool = True) -> str:
        """Run kubectl; its output and errors together. `ok` says whether it must succeed."""
        binary = shutil.which("kubectl")
        if binary is None:
            pytest.skip("kubectl is not installed (apt: kubernetes-client)")
        environment = {**os.environ, "HOME": str(self.folder), "KUBECONFIG": str(self.config), "KUBE_EDITOR": "false"}
        done = subprocess.run(
            [binary, *words], input=stdin, capture_output=True, text=True, env=environment, timeout=30, check=False
        )
        output = done.stdout + done.stderr
        assert (done.returncode == 0) == ok, f"kubectl {' '.join(words)} exited {done.returncode}: {output}"
        return output

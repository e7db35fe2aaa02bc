"""A pytest plugin that kills its own process with SIGKILL at the step GPULAB_KILL_AT says; without, it counts them.

Steps are: before, within and after each HTTP request and each line of the ledger, around the start of the cluster's
process, and before each file that is removed.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool

KILL_AT = int(os.environ.get("GPULAB_KILL_AT", "0"))
steps = 0


def step() -> None:
    global steps
    steps += 1
    if steps == KILL_AT:
        os.kill(os.getpid(), signal.SIGKILL)


def stepping(function: Callable[..., Any]) -> Callable[..., Any]:
    """A step before and one after."""

    def stepped(*arguments: Any, **options: Any) -> Any:
        step()
        result = function(*arguments, **options)
        step()
        return result

    return stepped


def torn(write: Callable[[int, bytes], int]) -> Callable[[int, bytes], int]:
    """A step before, one in the middle of what is written, and one after."""

    def written(file: int, data: bytes) -> int:
        step()
        half = len(data) // 2
        write(file, data[:half])
        step()
        write(file, data[half:])
        step()
        return len(data)

    return written


def pytest_configure() -> None:
    HTTPConnectionPool.urlopen = stepping(HTTPConnectionPool.urlopen)  # type: ignore[method-assign]
    HTTPConnection.getresponse = stepping(HTTPConnection.getresponse)  # type: ignore[method-assign]
    os.write = torn(os.write)
    os.posix_spawn = stepping(os.posix_spawn)
    os.fsync = stepping(os.fsync)
    shutil.rmtree = stepping(shutil.rmtree)
    Path.mkdir = stepping(Path.mkdir)  # type: ignore[method-assign]
    Path.unlink = stepping(Path.unlink)  # type: ignore[method-assign]


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    counted = os.environ.get("GPULAB_STEPS")
    if counted:
        Path(counted).write_text(str(steps))

"""One vLLM server process group on this machine: start, wait until it answers, stop all of it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pytest_gpulab.endpoint import fetch
from pytest_gpulab.targets import leash

START_LIMIT_S = 900.0
"""Longest wait for a server: large weights are read from a slow disk, and graphs are captured."""

_MODULE = "vllm.entrypoints.openai.api_server"
"""Works for every build; the ``vllm`` command asks for a distribution of that name, which CPU builds are not."""


class StartFailed(Exception):
    """The server ended, or did not answer in time, or not in full; the message says why."""


class Server:
    """A vLLM that answers on loopback. Leaves nothing running: not after `stop`, nor after this process's death."""

    def __init__(self, python: str, arguments: Sequence[str], log: Path, *, limit_s: float = START_LIMIT_S) -> None:
        """Start it with `python` and wait until it answers. StartFailed says why it did not."""
        self.arguments = tuple(arguments)
        self.log = log
        self.url = f"http://127.0.0.1:{_free_port()}"
        self.started = time.monotonic()
        address = ("--host", "127.0.0.1", "--port", self.url.rpartition(":")[2])
        with log.open("wb") as output:
            self._leash = subprocess.Popen(
                [sys.executable, "-I", leash.__file__, python, "-m", _MODULE, *address, *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready(limit_s)
        except BaseException:
            self.stop()
            raise
        self.ready_s = time.monotonic() - self.started
        """Seconds from start to the first answer."""

    @property
    def is_running(self) -> bool:
        return self._leash.poll() is None

    def stop(self) -> None:
        """End the process group and wait until it is gone."""
        assert self._leash.stdin is not None
        self._leash.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._leash.wait(2 * leash.GRACE_S)
        with suppress(ProcessLookupError):
            os.killpg(self._leash.pid, signal.SIGKILL)
        self._leash.wait()

    def _wait_until_ready(self, limit_s: float) -> None:
        while not self._answers():
            if time.monotonic() - self.started > limit_s:
                raise StartFailed(f"vLLM did not answer within {limit_s:g} s; see {self.log}")
            with suppress(subprocess.TimeoutExpired):
                self._leash.wait(0.2)
                raise StartFailed(f"vLLM did not start: {failure_reason(self.log)}; see {self.log}")

    def _answers(self) -> bool:
        try:
            with fetch(f"{self.url}/health", 5.0) as answer:
                return answer.status == 200
        except OSError:
            return False


def failure_reason(log: Path) -> str:
    """The line of a vLLM log that says why it ended.

    Every process logs its own traceback; the last ones only say that another failed.
    """
    text = _COLOUR.sub("", log.read_text(errors="replace"))
    lines = [_PREFIX.sub("", line) for line in text.splitlines()]
    reasons = [index for index, line in enumerate(lines) if _REASON.match(line) and "See root cause" not in line]
    if not reasons:
        return next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")
    reason = lines[reasons[-1]]
    if "validation error" in reason and reasons[-1] + 1 < len(lines):  # pydantic: what is wrong stands below
        reason = lines[reasons[-1] + 1].strip()
    return reason[:_REASON_CHARACTERS]


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
"""Of the level and of the process: older versions write it into files too, and VLLM_LOGGING_COLOR=1 has all do so."""
_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?(ERROR [\d-]+ [\d:]+ \[[^\]]*\] )?")
_REASON = re.compile(r"^[\w.]*(Error|Exception)(: |$)|^\S+: error: |^[\w.]*ValidationError: ")
_REASON_CHARACTERS = 300


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

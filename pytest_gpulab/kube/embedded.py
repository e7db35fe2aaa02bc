"""The embedded cluster as a process of its own, which outlives a session that is killed, so that it can be reaped.

No kill loses it: the shell that becomes the cluster waits for a line on its standard input, and the ledger names the
process before the line is sent. A session that dies before that closes the pipe, and the shell ends without a trace.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Final

from pytest_gpulab.kube.client import Kube, KubeError, connect
from pytest_gpulab.kube.ledger import Ledger
from pytest_gpulab.kube.process import Process

START_S: Final = 60.0
"""Real seconds until the API must answer."""
_POLL_S: Final = 0.02
_SHELL: Final = "/bin/sh"
_WAIT_THEN_BECOME: Final = 'read -r go && exec "$@"'


def start_cluster(ledger: Ledger, speed: float) -> Kube:
    """Start an embedded cluster that runs `speed` times as fast as real time, and connect to it.

    Raises:
        KubeError: it ended, or its API did not answer within a minute; with what it wrote.
    """
    kubeconfig, log = ledger.folder / "kubeconfig", _log(ledger)
    ledger.cluster(kubeconfig, speed)
    process = _spawn(ledger, _command(kubeconfig, speed), log)
    deadline = time.monotonic() + START_S
    while not _is_up(log):
        if not process.alive() or time.monotonic() > deadline:
            raise KubeError(f"the embedded cluster did not start within {START_S:g} s. It wrote: {_said(log)}")
        time.sleep(_POLL_S)
    return connect(kubeconfig, ledger.folder, speed=speed)


def last_words(ledger: Ledger) -> str:
    """What the run's cluster has written, which says why it ended; empty when it wrote nothing."""
    log = _log(ledger)
    return _said(log) if log.exists() else ""


def _log(ledger: Ledger) -> Path:
    return ledger.folder / "cluster.log"


def _command(kubeconfig: Path, speed: float) -> list[str]:
    options = ["--kubeconfig", str(kubeconfig), "--speed", f"{speed:g}"]
    return [sys.executable, "-P", "-m", "pytest_gpulab", "cluster", *options]


def _spawn(ledger: Ledger, command: list[str], log: Path) -> Process:
    """The process of `command`, in a session of its own: a Ctrl-C in the terminal is not meant for it."""
    reads, writes = os.pipe()
    try:
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            inherits = [
                (os.POSIX_SPAWN_DUP2, file, number) for file, number in ((reads, 0), (written, 1), (written, 2))
            ]
            words = [_SHELL, "-c", _WAIT_THEN_BECOME, _SHELL, *command]
            pid = os.posix_spawn(_SHELL, words, os.environ, file_actions=inherits, setsid=True)
        finally:
            os.close(written)
        process = Process.of(pid)
        ledger.process(process)
        os.write(writes, b"go\n")
    finally:
        os.close(reads)
        os.close(writes)
    return process


def _is_up(log: Path) -> bool:
    """Whether it says so; then the kubeconfig is written."""
    return "is up" in _said(log)


def _said(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace").strip()

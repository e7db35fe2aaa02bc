"""Holds a server on a leash: ends its whole process group when the holder lets go, however the holder ended.

Run as ``python leash.py COMMAND...`` in a session of its own, with a pipe as stdin. The pipe closes when the holder
closes it or dies, SIGKILL included; vLLM's engine processes outlive a killed API server, so the group is what ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

GRACE_S = 10.0
"""How long the server may take to end by itself after SIGTERM."""


def main(command: list[str]) -> None:
    """Start `command` and outlive it only to end what it left behind."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # the group's own SIGTERM, sent below, is for the others
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_when_let_go, args=(server,), daemon=True).start()
    server.wait()
    os.killpg(0, signal.SIGKILL)  # and with the rest of the group this process


def _end_when_let_go(server: subprocess.Popen[bytes]) -> None:
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGTERM)
    try:
        server.wait(GRACE_S)
    finally:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])

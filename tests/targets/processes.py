"""What tests of server processes share: a stand-in for vLLM's module, and process groups that are really gone."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

STAND_IN = '''
"""Takes vLLM's arguments; behaves as its ``--model`` folder is called. Refuses every request, or emulates vLLM."""
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
behaviour = os.path.basename(flags["--model"])
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn])
print("pids", os.getpid(), child.pid, flush=True)
print("non-default args:", flags, flush=True)
if behaviour == "fails":
    print("(EngineCore pid=7) ERROR 11-24 12:40:29 [core.py:1510] ValueError: No common block size for 7.")
    print("RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    sys.exit(1)
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behaviour == "hangs":
    time.sleep(600)
if behaviour == "emulates":
    asked = ("--model", flags["--served-model-name"], "--accelerator", "t4", "--port", flags["--port"])
    sys.exit(subprocess.call([sys.executable, "-m", "pytest_gpulab", "serve", *asked]))

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        self.send_response(401)
        self.end_headers()
    def log_message(self, *_): ...

HTTPServer(("127.0.0.1", int(flags["--port"])), Handler).serve_forever()
'''


def install_stand_in(folder: Path) -> Path:
    """A package `vllm` whose API server is the stand-in; put `folder` on the path of Python."""
    package = folder / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for parent in (folder / "vllm", folder / "vllm" / "entrypoints", package):
        (parent / "__init__.py").touch()
    (package / "api_server.py").write_text(textwrap.dedent(STAND_IN))
    facts = folder / "vllm-1.2.3.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 1.2.3\n")
    (facts / "top_level.txt").write_text("vllm\n")
    return folder


def pids_in(log: Path) -> list[int]:
    """Process ids that the stand-in has written into its log: its own and its child's; waits for them."""
    wait_for(lambda: log.is_file() and "pids" in log.read_text())
    line = next(line for line in log.read_text().splitlines() if line.startswith("pids"))
    return [int(pid) for pid in line.split()[1:]]


def is_gone(pid: int) -> bool:
    """Whether the process has ended; one that nobody has reaped yet has."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True


def wait_for(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    """Return when `condition` holds; AssertionError after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)

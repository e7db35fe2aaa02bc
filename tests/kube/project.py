"""A project whose tests use the pool, run as a session of its own; and what such a session may leave."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
import zipfile
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import QUICK

ROOT = Path(__file__).parents[2]

CONFTEST = """
import os
import signal
from pathlib import Path

import pytest

from pytest_gpulab import Profile

PROFILE = Profile(model="qwen2.5-0.5b", accelerator="t4", engine_args={"max_model_len": 9216})


@pytest.fixture(scope="session")
def cluster_speed():
    return 300.0
"""

ELSEWHERE = """

@pytest.fixture(scope="session")
def gpu_pool(pytestconfig, tmp_path_factory, cluster_speed):
    '''On a cluster that is there before the session and after it.'''
    from pytest_gpulab.fleet import FROM_ZERO
    from pytest_gpulab.kube.pool import use_cluster
    from pytest_gpulab.render import pool_objects
    from pytest_gpulab.shared_pool import shared_pool_of

    shared = shared_pool_of(pytestconfig)
    return shared.obtain(
        pool_objects(FROM_ZERO, ["g4dn.xlarge"], run=shared.run),
        start=lambda ledger: use_cluster(ledger, Path(os.environ["GPULAB_ELSEWHERE"]), speed=cluster_speed),
        lock=tmp_path_factory.getbasetemp() / "pool.lock",
    )
"""


class Project:
    """A folder with one test file, and a state folder of its own."""

    def __init__(self, folder: Path, body: str, conftest: str = CONFTEST) -> None:
        self.folder = folder
        self.state = folder / "state"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pytest.ini").write_text("[pytest]\n")
        (folder / "conftest.py").write_text(conftest)
        (folder / "test_pool.py").write_text("from conftest import PROFILE\n" + textwrap.dedent(body))

    def start(self, *options: str, **environment: str) -> subprocess.Popen[str]:
        """A session that has begun."""
        return self._popen(self._session(options), environment)

    def start_on(self, terminal: int) -> subprocess.Popen[str]:
        """A session that has begun on a terminal, where it also writes."""
        return self._popen(self._session(), {}, preexec_fn=lambda: os.login_tty(terminal))

    def run(self, *options: str, **environment: str) -> tuple[int, str]:
        """A session to its end: exit status and output."""
        with self.start(*options, **environment) as session:
            output = session.communicate(timeout=120)[0]
        return session.returncode, output

    def reap(self, *options: str) -> tuple[int, str]:
        """`gpulab reap`: exit status and output."""
        with self._popen([sys.executable, "-m", "pytest_gpulab", "reap", *options], {}) as command:
            output = command.communicate(timeout=120)[0]
        return command.returncode, output

    def left(self) -> list[str]:
        """Files of the state folder, and processes that know it. Those that are about to end may take a moment."""
        until(lambda: not self._processes())
        files = [path for path in self.state.rglob("*") if path.is_file()]
        return [*map(str, files), *self._processes()]

    def holding(self, *secrets: str) -> list[str]:
        """Files of the project in which one of `secrets` stands, as it is or in base64, packed or not."""
        wanted = [form for secret in map(str.encode, secrets) for form in (secret, b64encode(secret).rstrip(b"="))]

        def texts(path: Path) -> Iterator[bytes]:
            yield path.read_bytes()
            if zipfile.is_zipfile(path):  # a stored run
                with zipfile.ZipFile(path) as packed:
                    yield from map(packed.read, packed.namelist())

        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return [str(path) for path in files if any(form in text for text in texts(path) for form in wanted)]

    def _processes(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            if any(str(self.state) in word for word in words):
                found.append(f"{process.pid}: {' '.join(words)}")
        return found

    def _session(self, options: Sequence[str] = ()) -> list[str]:
        return [sys.executable, "-m", "pytest", *QUICK, "-p", "no:cacheprovider", *options]

    def _popen(self, words: list[str], environment: dict[str, str], **more: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            words,
            cwd=self.folder,
            env={**os.environ, "XDG_STATE_HOME": str(self.state), "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **more,
        )


def until(holds: Callable[[], bool], deadline_s: float = 10.0) -> bool:
    """Whether something comes to hold in time."""
    end = time.monotonic() + deadline_s
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.02)
    return held

"""A server's processes: started, waited for, and gone afterwards, whichever way its holder ended."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_gpulab.targets.server import Server, StartFailed, failure_reason
from tests.targets.processes import install_stand_in, is_gone, pids_in, wait_for


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(install_stand_in(tmp_path / "site")))
    return tmp_path / "vllm.log"


def start(log: Path, behaviour: str, limit_s: float = 20.0) -> Server:
    return Server(sys.executable, ["--model", f"/models/{behaviour}"], log, limit_s=limit_s)


def test_stop_ends_the_whole_group(log: Path) -> None:
    server = start(log, "answers")
    assert server.is_running and server.ready_s > 0
    server.stop()
    assert not server.is_running
    wait_for(lambda: all(map(is_gone, pids_in(log))))


def test_a_proxy_does_not_hide_it(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    start(log, "answers", limit_s=10.0).stop()


@pytest.mark.slow  # waits for the grace of a server that does not want to end
def test_a_server_that_ignores_the_signal_ends_too(log: Path) -> None:
    server = start(log, "stubborn")
    server.stop()
    wait_for(lambda: all(map(is_gone, pids_in(log))))


def test_a_start_that_fails_says_why_and_leaves_nothing(log: Path) -> None:
    with pytest.raises(StartFailed, match=r"vLLM did not start: ValueError: No common block size for 7\.; see .*log"):
        start(log, "fails")
    wait_for(lambda: all(map(is_gone, pids_in(log))))


def test_a_start_that_takes_too_long_is_ended(log: Path) -> None:
    with pytest.raises(StartFailed, match=r"did not answer within 1 s"):
        start(log, "hangs", limit_s=1)
    wait_for(lambda: all(map(is_gone, pids_in(log))))


HOLDER = """
import sys
from pathlib import Path
from pytest_gpulab.targets.server import Server
server = Server(sys.executable, ["--model", "/models/answers"], Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_nothing_outlives_its_holder(log: Path, number: signal.Signals) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(log)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        pids = pids_in(log)
        assert not any(map(is_gone, pids))
        holder.send_signal(number)
        holder.communicate()
    wait_for(lambda: all(map(is_gone, pids)))


@pytest.mark.parametrize("victim", [0, 1], ids=["server", "child"])
def test_a_server_that_ends_takes_its_children_along(log: Path, victim: int) -> None:
    server = start(log, "answers")
    pids = pids_in(log)
    subprocess.run(["kill", "-9", str(pids[victim])], check=True)
    if victim == 0:
        wait_for(lambda: not server.is_running)
    server.stop()
    wait_for(lambda: all(map(is_gone, pids)))


# Lines as vLLM 0.32.0 wrote them.
LOGS = {
    "argparse": (
        "usage: api_server.py [options]\n                 [model_tag]\n"
        "api_server.py: error: argument --dtype: invalid choice: 'float8' (choose from 'auto', 'half')\n",
        "api_server.py: error: argument --dtype: invalid choice: 'float8' (choose from 'auto', 'half')",
    ),
    "pydantic": (
        "Traceback (most recent call last):\n"
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, User-specified max_model_len (99999) is greater than the derived one [type=value_error]\n"
        "    For further information visit https://errors.pydantic.dev/2.14/v/value_error\n",
        "Value error, User-specified max_model_len (99999) is greater than the derived one [type=value_error]",
    ),
    "memory": (
        "(APIServer pid=1) WARNING 11-24 12:39:36 [system_utils.py:255] errors like `OSError: [Errno 24] Too many`\n"
        "(EngineCore pid=8) ERROR 11-24 12:41:05 [core.py:1510] torch.OutOfMemoryError: CUDA out of memory. Tried\n"
        "(EngineCore pid=8) Process EngineCore:\n"
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed: {}\n"
        "/lib/resource_tracker.py:254: UserWarning: resource_tracker: leaked\n",
        "torch.OutOfMemoryError: CUDA out of memory. Tried",
    ),
    "colours": (
        "\x1b[1;36m(EngineCore_DP0 pid=276)\x1b[0;0m \x1b[31mERROR\x1b[0m 11-24 12:41:05 [core.py:1510] "
        "ValueError: No available memory for the cache blocks.\n"
        "\x1b[1;36m(EngineCore_DP0 pid=276)\x1b[0;0m Process EngineCore_DP0:\n"
        "\x1b[1;36m(APIServer pid=1)\x1b[0;0m RuntimeError: Engine core failed. See root cause above.\n",
        "ValueError: No available memory for the cache blocks.",
    ),
    "no message": (
        "(EngineCore pid=8) ERROR 11-24 12:41:05 [core.py:1510]     assert self.block_size is not None\n"
        "(EngineCore pid=8) ERROR 11-24 12:41:05 [core.py:1510] AssertionError\n"
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed: {}\n",
        "AssertionError",
    ),
    "killed": ("(APIServer pid=1) INFO 11-24 12:39:36 [x.py:1] loading\nKilled\n\n", "Killed"),
    "nothing": ("", "its log is empty"),
}


@pytest.mark.parametrize(("text", "reason"), LOGS.values(), ids=LOGS.keys())
def test_the_reason_is_the_line_that_says_it(tmp_path: Path, text: str, reason: str) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(text)
    assert failure_reason(log) == reason

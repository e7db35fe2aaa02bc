"""What a pod of an Indexed Job runs: from the archive that travels, beside what vLLM's image has."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest

from pytest_gpulab.arrivals import schedule
from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.experiment import Poisson, Shape, Workload
from pytest_gpulab.load.pod import service_url
from pytest_gpulab.load.share import Share
from pytest_gpulab.load.shipped import shard_archive
from pytest_gpulab.load.wire import PART_CHARACTERS, outcome_of_parts, outcome_to_parts, share_to_line
from pytest_gpulab.load.words import Heard
from tests.load.golden import golden_server
from tests.load.test_merge import outcome

POISSON = Workload(arrivals=Poisson(rate=60.0), shape=Shape(prompt_tokens=20, output_tokens=12), requests=120)
KEY = "a-key-of-the-test"
NOT_IN_THE_IMAGE = ("pytest", "kubernetes", "boto3", "botocore", "matplotlib", "rich", "yaml", "psutil")


class Pod:
    """The process as its container starts it: no editable install, no environment but the Job's."""

    def __init__(self, folder: Path, url: str, model: str = "golden") -> None:
        archive, share = folder / "gpulab.zip", folder / "share.json"
        archive.write_bytes(shard_archive())
        endpoint = Endpoint("http://to-be-replaced", model)
        share.write_text(share_to_line(Share(POISSON, endpoint, 3, (400, 401), 30.0, index=0, count=4)))
        host, port = url.removeprefix("http://").split(":")
        libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        variables = {
            "PYTHONPATH": os.pathsep.join([str(archive), *libraries]),
            "JOB_COMPLETION_INDEX": "2",
            "GPULAB_LOAD_SHARE": str(share),
            "GPULAB_LOAD_SERVICE": "vllm-a-1",
            "VLLM_A_1_SERVICE_HOST": host,
            "VLLM_A_1_SERVICE_PORT": port,
            "GPULAB_API_KEY": KEY,
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, "-S", "-X", "importtime", "-m", "pytest_gpulab.load.pod"]
        self.process = subprocess.Popen(command, env=variables, cwd=folder, text=True, **pipes)  # type: ignore[call-overload]

    def says(self) -> str:
        return str(self.process.stdout.readline()).rstrip("\n")

    def tell(self, line: str) -> None:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def end(self) -> tuple[list[str], str]:
        """Its last lines, and what went to stderr."""
        out, errors = self.process.communicate(timeout=60)
        return out.splitlines(), errors


@pytest.mark.slow
def test_the_archive_alone_sends_a_share(tmp_path: Path) -> None:
    with golden_server() as url:
        pod = Pod(tmp_path, url)
        assert pod.says() == "ready"
        before = time.time()
        pod.tell("clock")
        clock = Heard()
        clock.line(pod.says())
        assert clock.clock is not None and before <= clock.clock <= time.time()
        pod.tell(repr(time.time() + 1.0))
        lines, errors = pod.end()
    assert pod.process.returncode == 0
    heard = Heard()
    for line in lines:
        heard.line(line)
    assert heard.outcome is not None and heard.progress is not None and not heard.others
    assert heard.outcome.requests["ok"].all() and len(heard.outcome.requests) == heard.progress.offered == 30
    np.testing.assert_array_equal(heard.outcome.requests["scheduled"], schedule(POISSON, 3)["scheduled"][2::4])
    imported = {line.rpartition("|")[2].strip() for line in errors.splitlines() if line.startswith("import time:")}
    assert "pytest_gpulab.load.pod" in imported or "pytest_gpulab.load.sending" in imported
    assert imported.isdisjoint(NOT_IN_THE_IMAGE)
    assert KEY not in errors and KEY not in "\n".join(lines)


def test_it_ends_when_it_comes_too_late(tmp_path: Path) -> None:
    with golden_server() as url:
        pod = Pod(tmp_path, url)
        assert pod.says() == "ready"
        pod.tell(repr(time.time() - 1.0))
        _, errors = pod.end()
    assert pod.process.returncode == 1
    assert "too late: the start was 1." in errors


def test_it_says_what_is_wrong_with_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_gpulab.load import pod as module

    monkeypatch.setattr(module, "_ANSWER_S", 0.0)
    with golden_server() as url:
        assert module._unreachable(Endpoint(url, "golden")) is None
        assert module._unreachable(Endpoint(url, "another")) == "it lists golden, qwen2.5-0.5b"
    assert "refused" in str(module._unreachable(Endpoint(url, "golden")))


def test_the_archive_is_small_and_always_the_same() -> None:
    assert shard_archive() == shard_archive()
    assert len(shard_archive()) < 100_000  # a ConfigMap takes 1 MiB, and the share needs room


def test_a_service_is_where_its_variables_say() -> None:
    four = {"VLLM_QWEN2_5_SERVICE_HOST": "10.0.0.7", "VLLM_QWEN2_5_SERVICE_PORT": "80"}
    six = {**four, "VLLM_QWEN2_5_SERVICE_HOST": "fd00::7"}
    assert service_url(four, "vllm-qwen2-5") == "http://10.0.0.7:80"
    assert service_url(six, "vllm-qwen2-5") == "http://[fd00::7]:80"


def test_an_outcome_in_parts_is_whole_or_none() -> None:
    sent = outcome(3000)
    parts = outcome_to_parts(sent)
    assert len(parts) > 3 and max(map(len, parts)) < PART_CHARACTERS + 20
    got = outcome_of_parts([parts[1], *reversed(parts), parts[0]])
    assert got is not None
    np.testing.assert_array_equal(got.requests, sent.requests)
    np.testing.assert_array_equal(got.send_lag_s, sent.send_lag_s)
    assert (got.failures, got.counts, got.ended_s) == (sent.failures, sent.counts, sent.ended_s)
    assert outcome_of_parts(parts[:-1]) is None and outcome_of_parts([]) is None
    damaged = parts[1].replace("A", "B")
    with pytest.raises(Exception, match=r".*"):
        outcome_of_parts([parts[0], damaged, *parts[2:]])


def test_lines_that_are_heard_twice_change_nothing() -> None:
    sent = outcome(2000)
    lines = ["ready", *(f"outcome {part}" for part in outcome_to_parts(sent))]
    heard = Heard()
    for line in [*lines[:2], *lines, *lines]:
        heard.line(line)
    assert heard.ready and heard.outcome is not None
    np.testing.assert_array_equal(heard.outcome.requests, sent.requests)

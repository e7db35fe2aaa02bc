"""Load from inside the cluster, end to end: a Job on the embedded cluster, real processes, real HTTP."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
import zipfile
from base64 import b64encode
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kubernetes import client

from pytest_gpulab import BoundedQueue, ClosedLoop, Constant, Poisson, Shape, Workload, render
from pytest_gpulab.arrivals import schedule
from pytest_gpulab.cluster.resources import CONFIG_MAP, JOB, NODE_POOL, POD
from pytest_gpulab.kube import load as module
from pytest_gpulab.kube import shard_pod
from pytest_gpulab.kube.ledger import Ledger
from pytest_gpulab.kube.load import Pods, longest_s
from pytest_gpulab.kube.pool import Pool
from pytest_gpulab.kube.serving import serve
from pytest_gpulab.kube.shard_pod import PodLost, ShardPod
from pytest_gpulab.kube.teardown import tear_down
from pytest_gpulab.kube.wait import WaitFailed
from pytest_gpulab.load import BeyondHeadroom, LoadInterrupted, run_load
from pytest_gpulab.load.shipped import shard_archive
from pytest_gpulab.run import Run
from tests.kube.conftest import PROFILE
from tests.kube.running import Running
from tests.load.loads import without_lag

SHORT = Workload(arrivals=Poisson(rate=12.0), shape=Shape(prompt_tokens=64, output_tokens=16), requests=30)
LONG = Workload(arrivals=Constant(rate=5.0), shape=Shape(prompt_tokens=64, output_tokens=16), duration_s=60.0)
INDEX = "JOB_COMPLETION_INDEX"
SERVICE = render.serving_name(PROFILE)


class Lab:
    """A model served without a public way in, and loads of it."""

    def __init__(self, pool: Pool, cluster: Running) -> None:
        self.pool, self.cluster = pool, cluster
        self.store = cluster.live.embedded.store
        objects = render.serving_objects(PROFILE, None, run=pool.run, api_key=pool.api_key)
        self.endpoint = serve(pool, [obj for obj in objects if obj["kind"] != "Ingress"], PROFILE.model)

    def load(self, workload: Workload, seed: int = 0, pods: int = 2, **options: Any) -> Run:
        sent = {"target": "cluster", "basis": "emulated", "server": "emulated", "processes": pods, **options}
        elsewhere = partial(Pods, self.pool, SERVICE)
        return run_load(
            workload,
            endpoint=self.endpoint,
            profile=PROFILE,
            seed=seed,
            elsewhere=elsewhere,
            **sent,  # type: ignore[arg-type]
        )

    def pods(self) -> list[dict[str, Any]]:
        return [pod for pod in self.store.list(POD) if pod["metadata"]["name"].startswith("load-")]

    def pids(self) -> list[int]:
        """Of the pods' processes, by index."""
        names = sorted(pod["metadata"]["name"] for pod in self.pods())
        return [pid for name in names if (pid := self.cluster.live.containers.pid("gpulab", name)) is not None]

    def logs(self) -> list[str]:
        """Of the pods, so far."""
        core = client.CoreV1Api(self.pool.kube._api)
        names = [pod["metadata"]["name"] for pod in self.pods()]
        return [core.read_namespaced_pod_log(name, "gpulab", _preload_content=False).data.decode() for name in names]

    def left(self) -> list[str]:
        """What a load must not leave behind."""
        kinds = (JOB, CONFIG_MAP, POD)
        found = [obj["metadata"]["name"] for kind in kinds for obj in self.store.list(kind)]
        return [name for name in found if name.startswith("load-")]

    def gone(self) -> bool:
        """Pods that are ended take a moment."""
        return until(lambda: not self.left())


def _exited(reason: str, code: int) -> dict[str, Any]:
    return {"name": "load", "state": {"terminated": {"reason": reason, "exitCode": code}}}


def until(holds: Callable[[], Any], deadline_s: float = 30.0) -> bool:
    end = time.monotonic() + deadline_s
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(holds())


def when(holds: Callable[[], Any], act: Callable[[], Any]) -> threading.Thread:
    """Do something, beside the test, as soon as something holds."""
    thread = threading.Thread(target=lambda: until(holds) and act(), daemon=True)
    thread.start()
    return thread


@pytest.fixture
def lab(raised: Callable[[Running], Pool], cluster: Running) -> Lab:
    return Lab(raised(cluster), cluster)


class Watching:
    """What a load says of itself; `sending` once requests are answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pytest_gpulab.load.generator._PROGRESS_S", 0.2)
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)

    def sending(self) -> bool:
        return any(not line.split(", ")[1].startswith("0 of") for line in self.lines)


@pytest.mark.slow
def test_pods_send_the_schedule_and_come_back_with_what_the_server_counted(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the key is in no object but the Secret, and in no log."""
    assert lab.endpoint.url == f"http://{SERVICE}.gpulab.svc"
    watching, seen = Watching(monkeypatch), []
    looking = when(
        watching.sending, lambda: seen.extend([lab.store.list(JOB), lab.store.list(CONFIG_MAP), *lab.logs()])
    )
    run = lab.load(SHORT, seed=5, progress=watching)
    looking.join()
    rows, offered = run.requests, schedule(SHORT, 5)
    np.testing.assert_array_equal(rows["scheduled"], offered["scheduled"])
    np.testing.assert_array_equal(rows["prompt_tokens"], offered["prompt_tokens"])
    assert rows["ok"].all() and (rows["output_tokens"] == 16).all()
    assert run.totals["request_success_total"] == 30
    assert run.totals["prompt_tokens_total"] == rows["prompt_tokens"].sum() == 30 * 64
    assert run.totals["generation_tokens_total"] == rows["output_tokens"].sum() == 30 * 16
    assert [problem for problem in without_lag(run.problems) if "apart" not in problem] == []
    assert 0 < run.totals["client_clock_error_s"] < 5
    written = str(seen)
    assert written.count("progress {") >= 2 and SERVICE in written
    for secret in (
        lab.pool.api_key,
        b64encode(lab.pool.api_key.encode()).decode(),
        *lab.endpoint.metrics_headers().values(),
    ):
        assert secret not in written
    assert lab.gone()


@pytest.mark.slow
def test_a_closed_loop_is_one_pods_and_its_start_needs_no_common_clock(lab: Lab) -> None:
    four = Workload(arrivals=ClosedLoop(concurrency=4), shape=SHORT.shape, requests=12)
    run = lab.load(four, pods=1)
    assert run.requests["ok"].all() and "client_clock_error_s" not in run.totals
    assert without_lag(run.problems) == []


@pytest.mark.slow
def test_a_pod_that_is_killed_ends_the_run_and_is_not_replaced(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    watching = Watching(monkeypatch)
    killing = when(watching.sending, lambda: os.kill(lab.pids()[0], signal.SIGKILL))
    started = time.monotonic()
    with pytest.raises(PodLost, match=r"load-\w+-0-\w+ ended: Error, exit status 137"):
        lab.load(LONG, progress=watching)
    killing.join()
    assert time.monotonic() - started < 50, "LONG takes 60 s"
    assert lab.gone()


@pytest.mark.slow
def test_a_pod_that_is_evicted_ends_the_run(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what it has sent, which is not what it should have."""
    watching = Watching(monkeypatch)

    def evict() -> None:
        name = sorted(pod["metadata"]["name"] for pod in lab.pods())[1]
        lab.pool.kube.delete(module.Ref("v1", "Pod", name, "gpulab"))

    evicting = when(watching.sending, evict)
    with pytest.raises(PodLost, match=r"asked to end while it sent|ended without its outcome"):
        lab.load(LONG, progress=watching)
    evicting.join()
    assert lab.gone()


@pytest.mark.slow
def test_a_pod_that_falls_silent_ends_the_run(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for of in (module, shard_pod):
        monkeypatch.setattr(of, "SILENCE_S", 4.0)
    watching = Watching(monkeypatch)
    stopping = when(watching.sending, lambda: os.kill(lab.pids()[1], signal.SIGSTOP))
    with pytest.raises(PodLost, match=r"pod load-\w+-1-\w+ has said nothing for 4 s"):
        lab.load(LONG, progress=watching)
    stopping.join()
    assert lab.gone()


@pytest.mark.slow
def test_a_pod_that_comes_too_late_ends_the_run(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pods, "lead_s", -2.0)
    with pytest.raises(PodLost, match=r"wrote: too late: the start was \d\.\d s ago"):
        lab.load(SHORT)
    assert lab.gone()


def test_a_job_that_finds_no_machine_ends_in_time(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RUNNING_S", 300.0)
    documents = render.documents

    def cramped(file: str) -> list[dict[str, Any]]:
        found = documents(file)
        for obj in found:
            if file == "load" and obj["kind"] == "NodePool":
                obj["spec"]["limits"] = {"cpu": "0"}
        return found

    monkeypatch.setattr(render, "documents", cramped)
    with pytest.raises(WaitFailed, match=r"waited for all pods to run.*Unschedulable"):
        lab.load(SHORT)
    assert lab.gone()


def test_an_image_that_cannot_be_pulled_ends_it_at_once(lab: Lab) -> None:
    image = render.documents("load")[-1]["spec"]["template"]["spec"]["containers"][0]["image"]
    lab.cluster.live.embedded.cloud.faults = lab.cluster.live.embedded.cloud.faults.model_copy(
        update={"bad_images": (image,)}
    )
    with pytest.raises(WaitFailed, match="ImagePullBackOff"):
        lab.load(SHORT)
    assert lab.gone()


@pytest.mark.slow
def test_a_pod_that_cannot_keep_up_refuses(lab: Lab) -> None:
    """More than any process here reads, from a handful of requests."""
    heavy = Workload(
        arrivals=Constant(rate=400.0), shape=Shape(prompt_tokens=16, output_tokens=2000), requests=400, timeout_s=5.0
    )
    with pytest.raises(BeyondHeadroom, match="cannot read 160,000 tokens/s in time: use more pods"):
        lab.load(heavy, pods=1)
    assert lab.gone()


@pytest.mark.slow
def test_ctrl_c_ends_it_within_seconds_with_what_there_is(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    watching = Watching(monkeypatch)
    pressed: list[float] = []

    def press() -> None:
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    pressing = when(watching.sending, press)
    with pytest.raises(LoadInterrupted) as ended:
        lab.load(LONG, progress=watching, interrupted_to=tmp_path)
    assert time.monotonic() - pressed[0] < 15
    pressing.join()
    run = ended.value.run
    assert 0 < run.requests["ok"].sum() < len(run.requests) == 300
    assert ended.value.saved is not None and "interrupted before its end" in run.problems
    assert lab.gone()


@pytest.mark.slow
def test_teardown_takes_a_load_along_and_its_machines(
    lab: Lab, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after the death of the session that loads."""
    watching = Watching(monkeypatch)
    ended: list[list[str]] = []
    tearing = when(watching.sending, lambda: ended.append(tear_down(ledger).problems))
    with pytest.raises((WaitFailed, FileNotFoundError)):
        lab.load(LONG, progress=watching)
    tearing.join()
    assert ended == [[]]
    assert lab.cluster.labelled(lab.pool.run) == [] and lab.gone()
    assert not [pool for pool in lab.store.list(NODE_POOL) if pool["metadata"]["name"] == "load"]


@pytest.mark.slow
def test_a_pod_whose_clock_is_wrong_starts_with_the_others(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is an hour ahead, one an hour behind: both send on time, and the server's gauges fit what they saw."""
    ahead = f"3600 * (1 - 2 * int(os.environ['{INDEX}']))"
    wrong = f"import os, time as t; n = t.time; t.time = lambda: n() + {ahead}"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive, zipfile.ZipFile(io.BytesIO(shard_archive())) as shipped:
        for name in shipped.namelist():
            text = shipped.read(name).decode()
            archive.writestr(
                name, text.replace("import json\n", f"import json\n{wrong}\n") if "/pod" in name else text
            )
    monkeypatch.setattr(module, "shard_archive", packed.getvalue)
    told: list[float] = []
    tell = ShardPod.tell

    async def telling(self: ShardPod, line: str) -> None:
        if line != "clock":
            told.append(float(line) - time.time())
        await tell(self, line)

    monkeypatch.setattr(ShardPod, "tell", telling)
    run = lab.load(SHORT)
    assert told == [pytest.approx(3600, abs=10), pytest.approx(-3600, abs=10)]
    assert run.requests["ok"].all()
    assert run.totals["request_success_total"] == 30
    assert run.duration_s < 60
    assert lab.gone()


def test_more_than_a_log_holds_is_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_REQUESTS", 14)
    with pytest.raises(BeyondHeadroom, match="each of 2 would send 15"):
        lab.load(SHORT)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (
            {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."},
            "Evicted: The n",
        ),
        ({"phase": "Failed", "containerStatuses": [_exited("OOMKilled", 137)]}, "OOMKilled, exit status 137"),
        ({"phase": "Succeeded", "containerStatuses": [_exited("Completed", 0)]}, ""),
        ({"phase": "Running"}, ""),
    ],
)
def test_how_a_pod_ended_is_said_in_kubernetes_words(status: dict[str, Any], said: str) -> None:
    found = module._end({"metadata": {"name": "load-1-0-abc"}, "status": status})
    assert (f"load-1-0-abc ended: {said}" in found) if said else not found


def test_the_longest_a_run_can_take() -> None:
    shape = Shape(prompt_tokens=8, output_tokens=2)
    burst = Workload(arrivals=Constant(rate=10.0), shape=shape, duration_s=20.0)
    assert longest_s(burst, 0, 300.0) == pytest.approx(20 + 300, abs=0.2)
    queue = BoundedQueue(capacity=9, max_wait_s=60.0)
    assert longest_s(burst.model_copy(update={"admission": queue}), 0, 300.0) == pytest.approx(380, abs=0.2)
    assert longest_s(burst.model_copy(update={"timeout_s": 5.0}), 0, 300.0) == pytest.approx(25, abs=0.2)
    four = Workload(arrivals=ClosedLoop(concurrency=4), shape=shape, requests=41)
    assert longest_s(four, 0, 10.0) == 11 * 10.0

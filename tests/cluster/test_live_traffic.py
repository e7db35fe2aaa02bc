"""The live cluster under load: autoscaling, spot interruption, latencies, and clients that do not behave."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import openai
import pytest
from kubernetes import client, config

from pytest_gpulab.engine import simulate
from pytest_gpulab.experiment import Profile
from pytest_gpulab.fleet import Faults
from pytest_gpulab.render import metric_rules
from tests.cluster import scene
from tests.cluster.live import (
    ARGS,
    CLASS,
    KEY,
    MODEL,
    POOL,
    SECRET,
    SERVICE,
    Live,
    answered,
    deployment,
    ingress,
    listens,
    openai_client,
    ready,
    typed,
    until,
)
from tests.serving.test_two_clocks import WORKLOAD, send_all

PROFILE = Profile(model=MODEL, accelerator="t4", engine_args={"max_model_len": 9216})
LONG = 8000
"""Tokens that take a T4 longer than a test."""


@contextmanager
def served(folder: Path, speed: float, **options: Any) -> Iterator[tuple[Live, str]]:
    """A cluster with Ready replicas behind a balancer: the cluster and the balancer's URL."""
    live = Live(folder, speed=speed)
    try:
        made = deployment(**options)
        live.create(SECRET, POOL, made, SERVICE, CLASS, ingress())
        ready(live, made["spec"]["replicas"])
        url = until("a balancer", live.edge)
        with openai_client(url) as one:
            until("an answer", lambda: answered(one.models.list))
        yield live, url
    finally:
        live.stop()


@contextmanager
def commanded(path: Path, speed: float) -> Iterator[tuple[subprocess.Popen[str], client.CoreV1Api, str]]:
    """`gpulab cluster` as a process with one replica behind a balancer: the process, its API, the balancer's URL."""
    words = [sys.executable, "-m", "pytest_gpulab", "cluster", "--kubeconfig", str(path), "--speed", str(speed)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and "is up" in process.stdout.readline()
        with config.new_client_from_config(str(path)) as api:
            core, network = client.CoreV1Api(api), client.NetworkingV1Api(api)
            core.create_namespaced_secret("default", SECRET)
            client.CustomObjectsApi(api).create_cluster_custom_object("karpenter.sh", "v1", "nodepools", POOL)
            client.AppsV1Api(api).create_namespaced_deployment("default", deployment())
            core.create_namespaced_service("default", SERVICE)
            network.create_ingress_class(CLASS)
            network.create_namespaced_ingress("default", ingress())

            def balancers() -> Any:
                return network.read_namespaced_ingress("vllm", "default").status.load_balancer.ingress

            url = f"http://127.0.0.1:{until('a balancer', balancers)[0].ports[0].port}"
            with openai_client(url) as one:
                until("an answer", lambda: answered(one.models.list))
            try:
                yield process, core, url
            finally:
                process.terminate()


def generated(live: Live, pod: str) -> float:
    """Tokens that a pod's server has generated."""
    found = re.search(r"^vllm:generation_tokens_total\{.*\} (\S+)$", live.proxied(pod, "metrics"), re.MULTILINE)
    assert found
    return float(found[1])


def stream(url: str, tokens: int, started: threading.Event | None = None) -> bool:
    """Whether a streamed answer of so many tokens came whole; if not, it broke off."""
    chunks = 0
    with openai_client(url) as one:
        try:
            for _ in one.completions.create(model=MODEL, prompt="a", max_tokens=tokens, stream=True):
                chunks += 1
                if started:
                    started.set()
        except openai.APIStatusError:
            raise
        except Exception:
            return False
    return chunks == tokens


@pytest.mark.slow
def test_a_lost_machine_swallows_requests_until_it_is_missed(tmp_path: Path) -> None:
    """Its pod stays an endpoint for the time that a node may be silent: every other request goes there."""
    with served(tmp_path, speed=50.0, replicas=2) as (live, url):

        def statuses() -> set[int]:
            headers = {"Authorization": f"Bearer {KEY}"}
            asked = (
                live.api.rest_client.pool_manager.request("GET", f"{url}/v1/models", headers=headers) for _ in "12"
            )
            return {answer.status for answer in asked}

        assert statuses() == {200}
        faults = Faults(losses=(0.0,))
        live.do(lambda: live.cluster.embedded.suffer(faults))
        assert until("lost requests", lambda: 502 in statuses())
        assert until("nobody sent there", lambda: statuses() == {200})


@pytest.mark.slow
def test_pressure_brings_a_second_replica_that_gets_traffic(tmp_path: Path) -> None:
    """Twelve streams at a time against a target of four: the HPA asks for three."""
    with served(tmp_path, speed=300.0) as (live, url), ThreadPoolExecutor(12) as clients:
        first = live.pods()[0].metadata.name
        rules = metric_rules(run="test")
        for rule in rules:
            rule["metadata"]["namespace"] = "default"
        scaler = scene.hpa("4", most=2)
        # At this speed the second replica would go a second after the load, and cut the last streams.
        scaler["spec"]["behavior"] = {"scaleDown": {"selectPolicy": "Disabled"}}
        live.create(*rules, typed(scaler, "autoscaling/v2", "HorizontalPodAutoscaler"))
        enough = threading.Event()

        def send() -> None:
            while not enough.is_set():
                assert stream(url, 200)

        load = [clients.submit(send) for _ in range(12)]
        try:
            second = next(pod.metadata.name for pod in ready(live, 2) if pod.metadata.name != first)
            until("traffic on the second", lambda: generated(live, second) > 400)
            assert len(live.gpu_nodes()) == 2
        finally:
            enough.set()
        for one in load:
            one.result()


@pytest.mark.slow
def test_a_spot_interruption_during_traffic(tmp_path: Path) -> None:
    """The notice moves the pod: a short stream ends whole, one that outlives the grace period is cut, none is new."""
    drains = {"args": [*ARGS, "--shutdown-timeout", "90"], "terminationGracePeriodSeconds": 100}
    with served(tmp_path, speed=60.0, replicas=2, **drains) as (live, url), ThreadPoolExecutor(4) as clients:
        running: list[Future[bool]] = []
        for tokens in (100, 100, LONG, LONG):  # in turn: one of each length on either pod
            started = threading.Event()
            running.append(clients.submit(stream, url, tokens, started))
            assert started.wait(10)
        instance = live.do(lambda: next(iter(live.cluster.embedded.cloud.instances.values())))
        lost = next(
            pod.metadata.name
            for pod in live.pods()
            if live.core.read_node(pod.spec.node_name).spec.provider_id == instance.provider_id
        )
        kept = next(pod.metadata.name for pod in live.pods() if pod.metadata.name != lost)
        live.do(lambda: live.cluster.embedded.cloud.interrupt(instance))
        until("the notice", lambda: live.core.read_namespaced_pod(lost, "default").metadata.deletion_timestamp)
        before = generated(live, kept)
        assert all(stream(url, 5) for _ in range(4))
        assert generated(live, kept) >= before + 20
        until("the end of the pod", lambda: lost not in [pod.metadata.name for pod in live.pods()])
        assert [one.result() for one in running[:2]] == [True, True]
        done = until("the cut", lambda: [one for one in running[2:] if one.done()])
        assert [one.result() for one in done] == [False], "the other one goes on, on the pod that stays"
        live.delete(deployment())
        assert not any(one.result(30) for one in running[2:])


def test_sigterm_without_a_drain_time_ends_streams_at_once(tmp_path: Path) -> None:
    """vLLM's default: however long the grace period is, it is not used."""
    patient = {"terminationGracePeriodSeconds": 1_000_000}
    with served(tmp_path, speed=500.0, **patient) as (live, url), ThreadPoolExecutor(1) as clients:
        started = threading.Event()
        answer = clients.submit(stream, url, LONG, started)
        assert started.wait(10)
        live.delete(deployment())
        assert not answer.result(10)
        until("the pod's end", lambda: not live.pods())


@pytest.mark.slow
def test_latencies_through_the_balancer_agree_with_virtual_time(tmp_path: Path) -> None:
    """E2E p50 within 5 %, whatever the cluster's speed."""
    simulated = simulate(PROFILE, WORKLOAD).requests
    expected = np.median(simulated["last_token"] - simulated["scheduled"])

    async def measure(url: str) -> list[float]:
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session:
            took: list[float] = await send_all(session, url, WORKLOAD, 0)
            return took

    with commanded(tmp_path / "kubeconfig", speed=300) as (_, _, url):
        assert np.median(asyncio.run(measure(url))) == pytest.approx(expected, rel=0.05)


def test_a_client_that_does_not_read_stalls_nobody(tmp_path: Path) -> None:
    with served(tmp_path, speed=500.0) as (live, url):
        host, port = url.rpartition("/")[2].split(":")
        body = f'{{"model":"{MODEL}","prompt":"a","max_tokens":{LONG},"stream":true,"return_token_ids":true}}'
        deaf = socket.create_connection((host, int(port)))
        with deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            deaf.sendall((head + body).encode())
            pod = live.pods()[0].metadata.name
            until("its tokens", lambda: generated(live, pod) > 10)
            assert stream(url, 20)
            live.delete(deployment())
            until("the pods' end", lambda: not live.pods())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_the_command_ends_within_two_seconds_under_load(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "kubeconfig"
    with commanded(path, speed=500) as (process, core, url), ThreadPoolExecutor(2) as clients:
        started = threading.Event()
        open_stream = clients.submit(stream, url, LONG, started)
        watching = clients.submit(core.list_namespaced_pod, "default", watch=True)
        assert started.wait(10)
        process.send_signal(number)
        assert process.wait(2) == 0
        assert not open_stream.result(10)
        watching.exception(10)
    assert not path.exists()
    assert not listens(url)

"""The embedded cluster in real time: API, pods' servers and balancer together, as clients see them."""

from __future__ import annotations

import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from pytest_gpulab import cli
from pytest_gpulab.cluster.resources import NAMESPACE
from pytest_gpulab.cluster.service import Services
from pytest_gpulab.fleet import Faults
from tests.cluster.live import (
    CLASS,
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
    until,
)

FAST = 500.0
"""Cluster seconds a second: a cold start takes one."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Live]]:
    """Starts live clusters."""
    running: list[Live] = []

    def started(speed: float = FAST, **options: Any) -> Live:
        running.append(Live(tmp_path, speed=speed, **options))
        return running[-1]

    yield started
    for live in running:
        live.stop()


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_from_nothing_to_v1_and_back_to_zero(tmp_path: Path) -> None:
    live = Live(tmp_path, speed=FAST)
    assert not live.gpu_nodes()
    live.create(SECRET, POOL, SERVICE, CLASS, ingress())
    edge = until("a balancer", live.edge)
    client = openai_client(edge)
    assert status(f"{edge}/v1/models") == 503, "no target yet"
    live.create(deployment())
    pod = ready(live)[0].metadata.name
    assert len(live.gpu_nodes()) == 1

    answer = until(
        "an answer", lambda: answered(lambda: client.completions.create(model=MODEL, prompt="a", max_tokens=3))
    )
    assert answer.usage.completion_tokens == 3
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "a"}], max_tokens=5, stream=True
        )
    )
    assert len([chunk for chunk in chunks if chunk.choices[0].delta.content]) == 5
    with pytest.raises(openai.AuthenticationError):
        openai_client(edge, "wrong").completions.create(model=MODEL, prompt="a")
    assert [status(f"{edge}{path}") for path in ("/metrics", "/tokenize", "/v1beta")] == [404] * 3

    metrics = live.proxied(pod, "metrics")
    assert f'vllm:request_success_total{{engine="0",model_name="{MODEL}",finished_reason="length"}} 2.0' in metrics
    proxy = f"/api/v1/namespaces/default/pods/{pod}:8000/proxy"
    assert live.post(f"{proxy}/tokenize", {"prompt": "one two"})[0] == 200
    refusal = live.post(f"{proxy}/v1/completions", {"model": MODEL, "prompt": "a"})
    assert refusal == (401, {"error": "Unauthorized"}), "the cluster's token is not passed on as vLLM's key"
    assert "Serving" in live.core.read_namespaced_pod_log(pod, "default")

    live.delete(ingress(), deployment(), POOL)
    until("zero", lambda: not live.gpu_nodes() and not live.pods())
    until("no balancer", lambda: not live.network.list_namespaced_ingress("default").items)
    assert not listens(edge)
    api = live.cluster.api.url
    assert listens(api)
    live.stop()
    assert not listens(api)


def test_arguments_that_vllm_refuses(start: Callable[..., Live]) -> None:
    """The pod crashes again and again; its log and its status say why."""
    live = start()
    made = deployment("--max-num-seqs", "many")
    made["spec"]["template"]["spec"]["containers"][0]["terminationMessagePolicy"] = "FallbackToLogsOnError"
    live.create(SECRET, POOL, made)

    def crashed() -> Any:
        found = [status for pod in live.pods() for status in pod.status.container_statuses or ()]
        return next((one for one in found if one.restart_count >= 2 and one.state.waiting), None)

    container = until("restarts", crashed)
    assert container.state.waiting.reason == "CrashLoopBackOff"
    assert container.last_state.terminated.exit_code == 1
    for said in (
        container.last_state.terminated.message,
        live.core.read_namespaced_pod_log(live.pods()[0].metadata.name, "default"),
    ):
        assert "max_num_seqs" in said or "max-num-seqs" in said


def test_a_missing_secret_is_waited_for(start: Callable[..., Live]) -> None:
    live = start()
    live.create(POOL, deployment())

    def refused() -> Any:
        states = [status.state.waiting for pod in live.pods() for status in pod.status.container_statuses or ()]
        return next((state for state in states if state and state.reason == "CreateContainerConfigError"), None)

    assert until("the error", refused).message == 'secret "vllm" not found'
    live.create(SECRET)
    assert ready(live)


def test_the_pod_proxy_of_a_pod_that_is_not_up(start: Callable[..., Live]) -> None:
    live = start()
    live.create(SECRET, deployment())
    pod = until("a pod", live.pods)[0].metadata.name
    with pytest.raises(Exception, match="connection refused") as refused:
        live.proxied(pod, "metrics")
    assert refused.value.status == 503
    with pytest.raises(Exception, match="not found") as missing:
        live.proxied("other", "metrics")
    assert missing.value.status == 404


def test_only_the_classes_of_the_controller_are_served(start: Callable[..., Live]) -> None:
    live = start()
    other = {**CLASS, "metadata": {"name": "nginx"}, "spec": {"controller": "k8s.io/ingress-nginx"}}
    live.create(CLASS, other, ingress("foreign", "nginx"), ingress())
    until("a balancer", live.edge)
    foreign = live.network.read_namespaced_ingress("foreign", "default")
    assert not foreign.status.load_balancer.ingress and not foreign.metadata.finalizers
    assert live.network.read_namespaced_ingress("vllm", "default").metadata.finalizers
    live.delete(ingress("foreign"), ingress())
    assert "foreign" not in [item.metadata.name for item in live.network.list_namespaced_ingress("default").items]
    until("the balancer's end", lambda: not live.network.list_namespaced_ingress("default").items)


def test_faults_come_from_a_file(
    start: Callable[..., Live], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What they do is tested in virtual time; here: a file that is none is refused, and they reach the cluster."""
    file = tmp_path / "faults.json"
    file.write_text('{"bad_image": []}')
    words = ["cluster", "--kubeconfig", str(tmp_path / "kubeconfig"), "--faults", str(file)]
    assert cli.main(words) == 2
    assert "bad_image" in capsys.readouterr().err
    live = start(faults=Faults(bad_images=("vllm/vllm-openai@sha256:1",)))
    live.create(SECRET, POOL, deployment())

    def pulling() -> Any:
        states = [status.state.waiting for pod in live.pods() for status in pod.status.container_statuses or ()]
        return any(state and state.reason == "ImagePullBackOff" for state in states)

    until("the backoff", pulling)


@pytest.mark.parametrize("method", ["refs", "reconcile"])
def test_a_crash_of_a_controller_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    path = tmp_path / "kubeconfig"

    def crash(*_: object) -> None:
        raise ZeroDivisionError("the controller's own mistake")

    monkeypatch.setattr(Services, "watches", (NAMESPACE,))
    monkeypatch.setattr(Services, "refs", lambda self, event: [("default", "")])
    monkeypatch.setattr(Services, method, crash)
    with pytest.raises(RuntimeError) as crashed:
        cli.main(["cluster", "--kubeconfig", str(path)])
    assert isinstance(crashed.value.__cause__, ZeroDivisionError)
    assert not path.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "Ctrl-C ends what comes after it"

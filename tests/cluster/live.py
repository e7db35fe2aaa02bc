"""A live cluster in a thread of its own, what the tests apply to it, and blocking clients for it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import openai
from kubernetes import client, config, dynamic

from pytest_gpulab.live.cluster import LiveCluster, live_cluster
from tests.cluster import scene

MODEL = "qwen2.5-0.5b"
ARGS = ["--model", "Qwen/Qwen2.5-0.5B-Instruct", "--served-model-name", MODEL, "--max-model-len", "9216"]
KEY = "not-a-secret"
DEADLINE_S = 60.0


class Live:
    """The cluster, its kubernetes client, and a way to run something in its loop."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self._options = options
        self._leave = asyncio.Event()
        self._up: Future[LiveCluster] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        self.cluster = self._up.result(DEADLINE_S)
        self.config = folder / "kubeconfig"
        self.cluster.api.write_kubeconfig(self.config)
        self.api = config.new_client_from_config(str(self.config))
        self.core = client.CoreV1Api(self.api)
        self.network = client.NetworkingV1Api(self.api)
        self._dynamic = dynamic.DynamicClient(self.api, cache_file=str(folder / "discovery"))

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            async with live_cluster(**self._options) as cluster:
                self._up.set_result(cluster)
                await self._leave.wait()
        except BaseException as error:
            if not self._up.done():
                self._up.set_exception(error)
            raise

    def stop(self) -> None:
        self.api.close()
        self._loop.call_soon_threadsafe(self._leave.set)
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def do(self, action: Callable[[], Any]) -> Any:
        """Run something on the cluster in its loop."""

        async def act() -> Any:
            return action()

        return asyncio.run_coroutine_threadsafe(act(), self._loop).result(DEADLINE_S)

    # kubectl

    def create(self, *manifests: dict[str, Any]) -> None:
        for manifest in manifests:
            self._kind(manifest).create(body=manifest, namespace="default")

    def delete(self, *manifests: dict[str, Any]) -> None:
        for manifest in manifests:
            self._kind(manifest).delete(name=manifest["metadata"]["name"], namespace="default")

    def _kind(self, manifest: dict[str, Any]) -> Any:
        return self._dynamic.resources.get(api_version=manifest["apiVersion"], kind=manifest["kind"])

    def pods(self) -> list[Any]:
        return list(self.core.list_namespaced_pod("default").items)

    def gpu_nodes(self) -> list[Any]:
        return list(self.core.list_node(label_selector="lab/pool=gpu").items)

    def edge(self) -> str | None:
        """The balancer's URL, once the Ingress has one."""
        balancers = self.network.read_namespaced_ingress("vllm", "default").status.load_balancer.ingress
        return f"http://{balancers[0].hostname}:{balancers[0].ports[0].port}" if balancers else None

    def proxied(self, pod: str, path: str) -> str:
        ask = self.core.connect_get_namespaced_pod_proxy_with_path
        return str(ask(f"{pod}:8000", "default", path, _preload_content=False).data.decode())

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON of a request to the API server with the kubeconfig's token."""
        headers = {"Authorization": f"Bearer {self.cluster.api.token}", "Content-Type": "application/json"}
        url = self.cluster.api.url + path
        answer = self.api.rest_client.pool_manager.request("POST", url, body=json.dumps(body), headers=headers)
        return answer.status, json.loads(answer.data)


def until(what: str, condition: Callable[[], Any], deadline_s: float = DEADLINE_S) -> Any:
    """Ask until it holds; its value."""
    end = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {deadline_s} s"
        time.sleep(0.02)
    return found


def answered(ask: Callable[[], Any]) -> Any:
    """What `ask` returns; None while the balancer has no target."""
    try:
        return ask()
    except openai.InternalServerError as error:
        assert error.status_code == 503
        return None


def ready(live: Live, count: int = 1) -> list[Any]:
    """The Ready pods once there are so many."""

    def found() -> list[Any]:
        pods = [pod for pod in live.pods() if _is_ready(pod)]
        return pods if len(pods) >= count else []

    pods: list[Any] = until(f"{count} ready", found)
    return pods


def _is_ready(pod: Any) -> bool:
    return any(item.type == "Ready" and item.status == "True" for item in pod.status.conditions or ())


def listens(url: str) -> bool:
    host, port = url.rpartition("/")[2].split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def typed(obj: dict[str, Any], api_version: str, kind: str) -> dict[str, Any]:
    return {"apiVersion": api_version, "kind": kind, **obj}


SECRET = typed({"metadata": {"name": "vllm"}, "stringData": {"api-key": KEY}}, "v1", "Secret")
POOL = typed(scene.pool("gpu", "spot"), "karpenter.sh/v1", "NodePool")
SERVICE = typed(scene.service(), "v1", "Service")
CLASS = typed(
    {"metadata": {"name": "alb"}, "spec": {"controller": "eks.amazonaws.com/alb"}},
    "networking.k8s.io/v1",
    "IngressClass",
)


def deployment(*more: str, replicas: int = 1, args: list[str] = ARGS, **pod: Any) -> dict[str, Any]:
    """vLLM with these arguments and its key from the Secret."""
    made = typed(scene.deployment(replicas, **pod), "apps/v1", "Deployment")
    container = made["spec"]["template"]["spec"]["containers"][0]
    container["args"] = [*args, *more]
    container["env"] = [
        {"name": "VLLM_API_KEY", "valueFrom": {"secretKeyRef": {"name": "vllm", "key": "api-key"}}},
    ]
    return made


def ingress(name: str = "vllm", kind: str = "alb") -> dict[str, Any]:
    """/v1 and nothing else."""
    backend = {"service": {"name": "vllm", "port": {"number": 80}}}
    paths = [{"path": "/v1", "pathType": "Prefix", "backend": backend}]
    spec = {"ingressClassName": kind, "rules": [{"http": {"paths": paths}}]}
    return typed({"metadata": {"name": name}, "spec": spec}, "networking.k8s.io/v1", "Ingress")


def openai_client(url: str, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=DEADLINE_S)

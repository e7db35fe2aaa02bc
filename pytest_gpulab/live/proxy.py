"""The pod proxy of the API server: `/api/v1/namespaces/NAMESPACE/pods/NAME[:PORT]/proxy/PATH`."""

from __future__ import annotations

from aiohttp import ClientSession, web

from pytest_gpulab.cluster.errors import ServiceUnavailable
from pytest_gpulab.cluster.objects import Object, at, uid_of
from pytest_gpulab.cluster.resources import POD
from pytest_gpulab.cluster.store import Store
from pytest_gpulab.live.servers import ModelServers
from pytest_gpulab.serving.forwarding import forward, kept


class PodProxy:
    """Passes requests on to the pods' real servers. The caller's own credentials stay behind, as upstream."""

    def __init__(self, store: Store, servers: ModelServers, session: ClientSession) -> None:
        self._store = store
        self._servers = servers
        self._session = session

    async def __call__(self, request: web.Request, namespace: str, name: str, path: str) -> web.StreamResponse:
        """Answer a request for a path of the pod called NAME or NAME:PORT; `ServiceUnavailable` when it is not up."""
        pod_name, _, port_text = name.partition(":")
        pod = self._store.get(POD, pod_name, namespace)
        port = int(port_text) if port_text.isdigit() else _port(pod, port_text)
        url = self._servers.url(uid_of(pod), port)
        if url is None:
            raise _unreachable(pod, port)
        target = f"{url}/{path}" + (f"?{request.query_string}" if request.query_string else "")
        headers = kept(request.headers, drop=("Authorization",))
        return await forward(self._session, request, target, headers, lambda status: _own_answer(pod, port))


def _port(pod: Object, name: str) -> int:
    """A container port by name; without one, the first container's first port, or 80."""
    ports = [port for container in pod["spec"]["containers"] for port in container.get("ports") or ()]
    named = [port["containerPort"] for port in ports if not name or port.get("name") == name]
    return int(named[0]) if named else 80


def _unreachable(pod: Object, port: int) -> ServiceUnavailable:
    address = f"{at(pod, 'status.podIP', '')}:{port}"
    return ServiceUnavailable(f"error trying to reach service: dial tcp {address}: connect: connection refused")


def _own_answer(pod: Object, port: int) -> web.Response:
    refusal = _unreachable(pod, port)
    return web.json_response(refusal.status(), status=refusal.code)
